"""What a run takes where its recipe says nothing: its rate, its length, the rows its loss is measured on; and that it says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
from interrupting import Interrupt, weights

import weftlora
from weftlora.runs.rates import of_width
from weftlora.runs.recipe import Recipe
from weftlora.runs.run import Run
from weftlora.train.loop import lost_rows
from weftlora.train.prepare import MOST_MEASURED, prepare

Make = Callable[..., dict[str, Any]]


def bare(made: dict[str, Any], **train: Any) -> dict[str, Any]:
    """A recipe that says nothing of how to train but what is given."""
    return {**made, "train": {"save_every": 0, **train}}


def test_a_builtin_recipe_on_a_model_and_rows_of_ones_own(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.answers())
    caplog.set_level(logging.INFO, "weftlora")
    run = weftlora.train("lora", f"model={bases['llama']}", f"data.train={rows}", f"out={tmp_path / 'run'}")
    assert run.steps == 4  # one epoch of 54 rows, 16 at a time
    assert run.recipe["train"]["lr"] == of_width(32)
    assert run.adapter["r"] == 8
    assert run.data["max_length"] == 512
    (said,) = [record.getMessage() for record in caplog.records if "by default" in record.getMessage()]
    for part in ("512 tokens", "1 epoch of 54 rows (4 steps)", "batches of 16 rows", "for lora at hidden size 32"):
        assert part in said
    start = json.loads((run.folder / "events.jsonl").read_text().splitlines()[0])
    assert start["event"] == "start"
    assert any("learning rate" in one for one in start["defaults"])


def test_what_was_said_is_not_called_a_default(recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "weftlora")
    made = recipe()
    made["data"]["max_length"] = 32
    made["train"]["warmup"] = 99
    weftlora.train(made)
    said = [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "by default" in text]
    assert [text for text in said if "train.warmup=99 is no less than the" in text]


def test_a_run_whose_rate_was_chosen_for_it_resumes_exactly(recipe: Make, tmp_path: Path) -> None:
    whole = weftlora.train(bare(recipe(adapter="lora", out=str(tmp_path / "whole")), steps=6, batch_size=8))
    given = bare(recipe(adapter="lora", out=str(tmp_path / "cut")), steps=6, batch_size=8, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(3)])
    assert given["train"].get("lr") is None
    assert weights(weftlora.train(given, resume=True)) == weights(whole)


def test_rows_that_are_lost_are_a_sentence_of_their_own(recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    made = recipe()
    rows = [*tiny.answers(), *({"prompt": f"{n % 10} a ->", "completion": "b" * 20, "domain": "a"} for n in range(20))]
    tiny.write_rows(Path(made["data"]["train"]), rows)
    made["data"] |= {"max_length": 12, "validation_fraction": 0.2}
    run = weftlora.train(made)
    dropped = sum(count["dropped"] for count in run.data["counts"].values())
    assert dropped == 20
    said = [one for one in caplog.records if one.levelno == logging.WARNING and one.name.startswith("weftlora")]
    assert [record.getMessage() for record in said] == lost_rows(run)
    assert len(said) == 2
    assert "were dropped, since their answer does not fit (data.max_length=12)" in said[0].getMessage()


def measured(made: dict[str, Any], *overrides: str) -> tuple[int, int]:
    """How many validation rows are measured at a time, and how many there are."""
    prepared = prepare(Recipe.read(made, *overrides))
    assert prepared.measured_on is not None
    assert prepared.data.validation is not None
    return len(prepared.measured_on), len(prepared.data.validation)


def test_measuring_costs_no_more_than_a_part_of_the_training(recipe: Make, tmp_path: Path) -> None:
    """Three steps on 64 rows are not followed by a measurement of thousands."""
    made = recipe(train={"steps": 3, "batch_size": 16})
    many = [{"prompt": f"{n}", "completion": " b"} for n in range(3000)]
    made["data"] = {"train": str(tiny.write_rows(tmp_path / "many.jsonl", many)), "validation_fraction": 0.5}
    rows, of = measured(made)
    assert of == 1500
    assert rows == 23  # half of the 48 rows that are trained on, which are a little shorter
    assert measured(made, "train.eval_every=1")[0] == 16  # four times: no less than a batch
    assert measured(made, "train.steps=100000")[0] == MOST_MEASURED
    assert measured(made, "train.eval_rows=100")[0] == 100
    assert measured(made, "train.eval_rows=all")[0] == 1500
    ticks: list[weftlora.train.Tick] = []
    run = weftlora.train(made, progress=ticks.append)
    assert max(tick.total for tick in ticks if tick.phase == "loss") == 2  # batches of 16
    assert run.data["measured"] == 23
    assert Run.load(run.folder) == run


def test_the_measured_rows_are_drawn_and_stay_in_order(recipe: Make, tmp_path: Path) -> None:
    made = recipe(train={"steps": 3, "batch_size": 16})
    many = [{"prompt": f"{n}", "completion": " b"} for n in range(400)]
    made["data"] = {"train": str(tiny.write_rows(tmp_path / "many.jsonl", many)), "validation_fraction": 0.5}
    prepared = prepare(Recipe.read(made))
    drawn, order = prepared.measured_on["prompt"], prepared.data.validation["prompt"]
    assert drawn == sorted(drawn, key=order.index)
    assert drawn != order[: len(drawn)]
    assert drawn == prepare(Recipe.read(made)).measured_on["prompt"]
