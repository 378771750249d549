"""What a run will cost beside its steps is said before the first of them: scoring, launches, a search; with seconds and share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from weftlora.runs.recipe import Recipe
from weftlora.train import ahead
from weftlora.train.layer_search import make_search
from weftlora.train.prepare import prepare
from weftlora.train.trainer import attach

SECONDS = r"about \d+ (s|min)"


def said(made: dict[str, Any]) -> list[str]:
    prepared = prepare(Recipe.read(made))
    searched = made["adapter"]["recipe"] == "flexora"
    if not searched:
        rows = prepared.measured_on.select_columns(["input_ids", "labels", "attention_mask"])
        attach(
            prepared.model,
            validation=[rows[n] for n in range(len(rows))] if made["adapter"]["recipe"] == "alora" else None,
            total_steps=made["train"]["steps"],
            tokens_per_step=200.0,
        )
    return ahead.lines(prepared, make_search(prepared, training=made["train"]["steps"]) if searched else None)


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"recipe": "lora", "r": 4}, []),
        (
            {"recipe": "alora", "r": 4, "rows": 2, "max_rounds": 2, "score": "taylor"},
            [rf"2 rounds of scoring rank slots by taylor, {SECONDS}, \d+% of this run"],
        ),
        (
            {"recipe": "lora_dash", "r": 4, "after": 2},
            [rf"the launch of Dash decomposes 14 weights, {SECONDS}, \d+% of this run \(nothing where they are kept"],
        ),
        (
            {"recipe": "flexora", "r": 4, "val_size": 8, "outer_batches": 2, "steps": 4},
            [rf"a search of 4 steps on α, worth \d+ training steps, {SECONDS}, \d+% of this run"],
        ),
    ],
    ids=["lora", "alora", "lora_dash", "flexora"],
)
def test_a_run_says_what_it_will_spend_beside_its_steps(
    recipe: Callable[..., dict[str, Any]], adapter: dict[str, Any], expected: list[str]
) -> None:
    found = said(recipe(adapter=adapter, train={"steps": 20}))
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.match(pattern, line), line


def test_a_launch_of_more_than_a_tenth_of_the_run_says_what_makes_it_less(
    recipe: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(adapter={"recipe": "lora_dash", "r": 4, "after": 2}, train={"steps": 20})
    for took, more in ((1e-9, False), (1e3, True)):
        monkeypatch.setattr(ahead, "_decomposing", lambda took=took: took)
        [line] = said(made)
        assert ("fewer adapter.target_modules" in line) == more
