"""How much a budget holds, what a search's recipe may say, and one sentence for each that cannot work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weftlora.auto.candidates import rank
from weftlora.auto.plan import SIZES, Profile, cost, fitting, in_words, rungs, too_small
from weftlora.auto.recipe import AutoRecipe, seconds
from weftlora.errors import ConfigError

PROFILE = Profile(
    fixed=2.0, step=0.1, factors={"lora": 1.0, "good": 1.5, "bad": 1.0}, scoring=1.0, export=4.0, seconds=30.0
)


def test_a_larger_budget_takes_a_larger_search_and_its_cost_is_the_sum_of_its_runs():
    names = ["lora", "good"]
    assert rungs(90) == [30, 90]
    by_hand = 5 * 11 + (5 + 7.5) + (1 + 1) * (11 + 16.5) / 2 + 2 * 3 * ((11 + 16.5) / 2 + 1)
    assert cost(SIZES[-1], names, 90, PROFILE, 1) == pytest.approx(by_hand)
    first_side_by_side = (by_hand - 2 * 11) / 2 + 2 * 11  # of five rates three, and everything after them
    assert cost(SIZES[-1], names, 90, PROFILE, 2) == pytest.approx(first_side_by_side)
    fits = [fitting(budget, names, 90, PROFILE, 1) for budget in (by_hand - 1, by_hand, 10**5)]
    assert fits == [None, SIZES[-1], SIZES[0]]
    costs = [cost(size, [*names, "bad"] * 3, 90, PROFILE, 1) for size in SIZES]
    assert costs == sorted(costs, reverse=True)


def test_too_small_a_budget_says_what_would_do():
    names = ["lora", "good", "bad"]
    error = too_small(120.0, 30.0, names, 90, PROFILE, 1)
    assert "a run of 90 steps takes 11.0 s here" in str(error)
    assert "the budget of 2m is too small for a verdict" in str(error)
    given = seconds(str(error).split("give budget=")[1].split(",")[0].removesuffix("."))
    assert fitting(0.9 * (given - 30 - PROFILE.ending), names, 90, PROFILE, 1) is not None
    steps = int(str(error).split("train.steps=")[1].removesuffix("."))
    assert fitting(0.9 * (120 - 30 - PROFILE.ending), names, steps, PROFILE, 1) is not None
    assert fitting(0.9 * (120 - 30 - PROFILE.ending), names, steps + 1, PROFILE, 1) is None


@pytest.mark.parametrize(("tokens", "rows", "r"), [(16_000, 9, 8), (16_001, 9, 16), (0, 20_000, 16), (10**9, 9, 256)])
def test_the_rank_is_the_smallest_whose_parameters_hold_the_answers(tokens: int, rows: int, r: int):
    scales: Any = SimpleNamespace(trained=lambda section: 1000 * section["r"])  # 2 bits each
    data: Any = SimpleNamespace(counts={"train": SimpleNamespace(answer_tokens=tokens, rows=rows)})
    assert rank(scales, data) == r  # a row of classes holds one token


# ---------------------------------------------------------------------- the recipe


def test_a_search_is_written_in_overrides_and_keeps_test_rows_of_one_file():
    read = AutoRecipe.read("data.train=rows.jsonl", "model=path/to/model", "budget=1h30m", "serve=vllm")
    assert (read.data.train, read.model.path, read.seconds, read.serve) == ("rows.jsonl", "path/to/model", 5400, "vllm")
    assert read.data.test_fraction == 0.1
    assert not read.has_length
    demo = AutoRecipe.read({"data": "demo", "budget": "90s"})
    assert (demo.train.steps, demo.train.lr, demo.data.max_length) == (150, None, 64)
    given = AutoRecipe.read("data={train: a.jsonl, test: b.jsonl}", "budget=2h")
    assert given.data.test_fraction is None
    assert [in_words(seconds(text)) for text in ("0.5h", "90m", "61s")] == ["30m", "1h30m", "1m1s"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["budget=0h"], "budget=0h leaves no time to train in"),
        (["budget=7"], "budget=7 is not a time: give hours, minutes or seconds"),
        (["budget=soon"], "budget='soon' is not a time"),
        ([], "the search has no 'budget': say how long it may take"),
        (["budget=2h", "serve=tgi"], "serve='tgi' is not valid"),
        (["budget=2h", "metric=bertscore"], "metric='bertscore' is not valid"),
        (["budget=2h", "train.lr=1e-3"], "train.lr=0.001 is given, and the rate is what is searched first"),
        (["budget=2h", "train.seed=3"], "train.seed=3 is given, and the search has seeds of its own"),
        (["budget=2h", "seeds=3"], "the search has no key 'seeds'"),
    ],
)
def test_what_cannot_work_is_one_sentence(overrides: list[str], sentence: str):
    with pytest.raises(ConfigError) as error:
        AutoRecipe.read("data=demo", *overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_said():
    with pytest.raises(ConfigError, match=r"there is no file 'nothing\.yaml' of a search"):
        AutoRecipe.read("nothing.yaml")
