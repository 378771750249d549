"""A look before training: the account of every row, what is learned, and what the run will cost, measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny

import weftlora
from weftlora.train.previewing import histogram

Make = Callable[..., dict[str, Any]]


def test_every_row_is_accounted_for_and_what_is_learnt_is_marked(recipe: Make, tmp_path: Path) -> None:
    made = recipe(train={"steps": 10, "accumulation": 2})
    rows = [*tiny.answers(40), *({"prompt": f"{n} ->", "completion": "b" * 30, "domain": "a"} for n in range(7))]
    tiny.write_rows(Path(made["data"]["train"]), rows)
    made["data"] |= {"max_length": 20, "validation_fraction": 0.25}
    before = sorted(path for path in tmp_path.rglob("*"))
    found = weftlora.preview(made)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    train, held = found.splits["train"], found.splits["validation"]
    assert train.read + held.read == 47
    assert train.dropped + held.dropped == 7
    assert list(found.files.values()) == [47, 12]
    assert sum(count for _, _, count in train.lengths) == train.rows
    assert (train.lengths[-1][1], train.longest <= 20) == (train.longest, True)
    assert (found.tokens_per_epoch, found.answer_tokens_per_epoch) == (train.tokens, train.answer_tokens)
    assert (found.steps, found.rows_per_step, found.epochs) == (10, 16, round(160 / train.rows, 2))
    assert found.measured_rows == held.rows
    assert len(found.samples) == 3
    answer = {row["prompt"]: row["completion"] for row in rows}
    for given, learned in found.samples:
        assert (given[1], learned[1]) == (False, True)
        assert learned[0] == f"{answer[given[0]]}</s>"


def test_what_it_costs_is_measured_on_the_recipes_own_model(recipe: Make) -> None:
    found = weftlora.preview(recipe(adapter="lora", train={"steps": 10})).estimate
    assert found is not None
    run = weftlora.train(recipe(adapter="lora", train={"steps": 10}))
    assert found.trainable == run.parameters["trainable"]
    assert found.seconds == pytest.approx(10 * found.seconds_per_step, rel=0.05)  # both are rounded
    assert 0 < found.seconds < 60
    if found.memory_bytes is not None:
        assert found.memory_bytes > 50 * 2**20
    bare = weftlora.preview(recipe(), model=False, rows=1)
    assert bare.estimate is None
    assert len(bare.samples) == 1


def test_a_run_shows_the_rows_it_was_trained_on(recipe: Make) -> None:
    run = weftlora.train(recipe())
    found = weftlora.preview(run.folder, model=False)
    assert found.splits["train"].rows == run.data["counts"]["train"]["rows"]
    assert found.splits["train"].tokens == run.data["counts"]["train"]["tokens"]


def test_a_classifier_and_an_encoder_decoder_have_one_too(recipe: Make) -> None:
    classes = weftlora.preview(recipe("bert", adapter="lora"))
    assert (classes.task, classes.samples[0][0][1]) == ("classification", False)
    pairs = weftlora.preview(recipe("t5", adapter="lora"))
    assert [learned for _, learned in pairs.samples[0]] == [False, True]


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [1, 2], list(range(1, 100)), [1, 1000]])
def test_a_histogram_counts_every_row_once(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert len(bins) <= 10
    assert sum(count for _, _, count in bins) == len(lengths)
    assert (bins[0][0], bins[-1][1]) == (min(lengths), max(lengths))
    assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(bins))
    for low, high, count in bins:
        assert count == sum(low <= length <= high for length in lengths)


def test_a_preview_is_plain_data(recipe: Make) -> None:
    found = weftlora.preview(recipe())
    assert json.loads(json.dumps(found.record()))["splits"]["train"]["rows"] == found.splits["train"].rows
