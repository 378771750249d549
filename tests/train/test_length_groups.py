"""Rows of like length share a batch where random batches would be padded much; and the time left that a run tells."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

import weftlora
from weftlora.runs.recipe import Recipe
from weftlora.train.prepare import padding
from weftlora.train.trainer import Recorder


def rows(*lengths: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})


def test_padding_is_the_share_of_random_batches() -> None:
    assert padding(rows(*[200] * 40), 8) == 0
    mixed = padding(rows(*[20, 200] * 20), 2)  # a mixed pair in half of the batches: 180 of 400, of a mean of 310
    assert mixed == pytest.approx(0.5 * 180 / (0.5 * 400 + 0.25 * 400 + 0.25 * 40), abs=0.05)
    assert padding(rows(*[20, 100] * 20), 2) == 0, "short rows are not worth it"
    assert padding(rows(*[20, 200] * 20), 1) == 0
    assert padding(rows(20, 200), 2) == 0, "one batch has them all"


@pytest.mark.slow
def test_a_run_groups_where_it_pays_and_says_so(recipe: Any, tmp_path: Path) -> None:
    long, short = "ab " * 60, "ab"
    lines = [{"prompt": text, "completion": " c"} for text in [long, short] * 12]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    given = recipe(data={"train": str(tmp_path / "mixed.jsonl"), "validation_fraction": 0}, train={"steps": 2})
    ticks: list[weftlora.train.Tick] = []
    run = weftlora.train(given, progress=ticks.append)
    assert run.recipe["train"]["group_by_length"] is True
    [start, *_] = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert any("rows of like length together" in said for said in start["defaults"])
    assert [tick.seconds_left is None for tick in ticks] == [True, False], "the first step of a process is not timed"
    assert ticks[-1].seconds_left == 0, "nothing is measured, and no step is left"


def test_a_run_of_before_the_choice_goes_on_at_random() -> None:
    given = {"model": "demo", "data": "demo", "adapter": "lora", "out": "x"}
    assert Recipe.read(given).settled({"train": {}}).train.group_by_length is False
    assert Recipe.read(given).settled({"train": {"group_by_length": True}}).train.group_by_length is True


def test_the_time_left_counts_the_losses_that_are_still_measured() -> None:
    """Ten steps of 2 s are left; at 100 tokens a second, 500 are measured after step 30 and at the end: 2.5 s each, a forward pass."""
    recorder = object.__new__(Recorder)
    recorder.measured_tokens = 500
    sums = dict.fromkeys(("train_seconds", "cpu_seconds"), 0.0) | {
        "device": "cpu", "steps": 10, "seconds": 20.0, "tokens": 2000, "peak_bytes": None,
    }  # fmt: skip
    from weftlora.train.costs import KEY

    state = SimpleNamespace(global_step=20, max_steps=30, stateful_callbacks={KEY: sums})
    args = SimpleNamespace(eval_strategy="steps", eval_steps=10)
    assert recorder._seconds_left(args, state) == pytest.approx(10 * 2 + 2 * 2.5)
    args.eval_strategy = "no"
    assert recorder._seconds_left(args, state) == pytest.approx(10 * 2 + 2.5)
    recorder.measured_tokens = 0
    assert recorder._seconds_left(args, state) == pytest.approx(10 * 2)
    sums["steps"] = 0
    assert recorder._seconds_left(args, state) is None
