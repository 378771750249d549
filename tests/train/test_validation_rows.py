"""The rows that weftlora train scores rank slots on: of the validation part, none of them trained on; without such rows an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import weftlora
from weftlora.host.attach import schedules
from weftlora.runs.recipe import Recipe
from weftlora.train.prepare import prepare

Make = Callable[..., dict[str, Any]]
ALORA = {"recipe": "alora", "r": 2, "first": 1, "every": 1, "max_rounds": 1, "rows": 4}


def test_without_validation_rows_it_is_an_error_before_anything_is_written(recipe: Make, tmp_path: Path) -> None:
    given = recipe(adapter=ALORA)
    given["data"]["validation_fraction"] = 0
    with pytest.raises(
        weftlora.ConfigError,
        match=r"decides on validation rows which modules get rank, .* data\.validation_fraction=0\.1",
    ):
        weftlora.train(given)
    assert not (tmp_path / "run").exists()
    given["adapter"] = {**ALORA, "score": "random"}
    assert weftlora.train(given).status == "complete"


def test_no_row_that_is_scored_on_is_trained_on(recipe: Make) -> None:
    given = recipe(adapter=ALORA)
    given["data"]["validation_fraction"] = 0.25
    prepared = prepare(Recipe.read(given))
    [schedule] = schedules(prepared.model).values()
    rows = schedule.controllers[-1].scorer.rows.items
    scored, trained = ({tuple(ids) for ids in part["input_ids"]} for part in (rows, prepared.data.train))
    assert len(rows) == len(prepared.data.validation) > 4
    assert scored.isdisjoint(trained)
