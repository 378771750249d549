"""One table of metrics: what a recipe takes is what `weftlora.evaluate` measures and what pages and sentences know."""

from __future__ import annotations

import dataclasses
from typing import get_args

from weftlora.compare.record import METRICS, Name, metric_of
from weftlora.train.evaluation import Scores


def test_a_recipe_takes_every_metric_and_every_metric_is_measured():
    assert set(METRICS) == set(get_args(Name))
    assert set(METRICS) <= {field.name for field in dataclasses.fields(Scores)}


def test_only_the_loss_is_better_lower_and_only_shares_end_at_one():
    assert [name for name, metric in METRICS.items() if not metric.higher] == ["loss"]
    assert {name for name, metric in METRICS.items() if metric.share} == {
        name for name, metric in METRICS.items() if metric.most == 1
    }


def test_a_metric_that_is_not_known_is_said_by_its_own_name():
    assert (metric_of("my_score").word, metric_of("my_score").title) == ("my_score", "my score")
