"""What scoring costs is counted, not timed; "auto" follows the counts, once, and everything that tells of it tells the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocating import HELD_OUT, adam, bare, controller, events, random_factors, scorer, train
from dashing import sites
from peft import PeftModel

import weftlora
from families import FAMILIES
from weftlora.progress import Tick
from weftlora.schedule.rank_slots import CERTAIN, certify, scores
from weftlora.schedule.scoring_cost import BOUND, Counts
from weftlora.terms.ranks.reallocate import WAYS

SEVEN_B = Counts(1792, 7, 32, 8, 32, 4, 512.0, 5000, 16 * 512.0)


def test_counts_are_forward_passes_of_the_rows() -> None:
    """Exact: two brackets per slot, each over half of the blocks on average; a pass with backward is two forward."""
    assert SEVEN_B.passes("exact") == pytest.approx(1792 * 33 / 32 + 2)
    assert SEVEN_B.passes("shortlist") == pytest.approx(28 * 33 / 32 + 2 + 4)
    assert SEVEN_B.passes("taylor") == 4
    assert SEVEN_B.share("exact") == pytest.approx(8 * (1792 * 33 / 32 + 2) * 32 / (2 * 5000 * 16))


@pytest.mark.parametrize(
    ("counts", "way"),
    [
        (replace(SEVEN_B, steps=30000), "shortlist"),
        (replace(SEVEN_B, steps=300000), "exact"),
        (SEVEN_B, "shortlist"),
        (replace(SEVEN_B, steps=500), "taylor"),
        (replace(SEVEN_B, row_tokens=None), "taylor"),
        (replace(SEVEN_B, step_tokens=None), "taylor"),
        (replace(SEVEN_B, steps=None, slots=2), "taylor"),
    ],
)
def test_auto_is_the_dearest_way_within_a_tenth(counts: Counts, way: str) -> None:
    assert counts.way() == way
    share = counts.share(way)
    if way != "taylor":
        assert share is not None
        assert share <= BOUND
        dearer = WAYS[: WAYS.index(way)]
        assert all(counts.share(each) > BOUND for each in dearer)


@pytest.mark.parametrize("slots", [100, 300, 1000, 3000, 10000])
def test_scoring_costs_at_most_a_tenth_from_100_to_10000_slots(slots: int) -> None:
    """A run of 500 steps of 32 rows, with the paper's 8 rounds of 32 rows."""
    counts = Counts(slots, 7, 32, 8, 32, 4, 256.0, 500, 32 * 256.0)
    share = counts.share(counts.way())
    assert share is not None
    assert share <= BOUND


def attached(tokens: float | None, **fields: Any) -> PeftModel:
    model = bare(score="auto", **fields)
    weftlora.attach(model, validation=HELD_OUT, total_steps=8, tokens_per_step=tokens)
    return model


@pytest.mark.parametrize(("tokens", "way"), [(1e7, "exact"), (400.0, "shortlist"), (1.0, "taylor"), (None, "taylor")])
def test_the_way_is_decided_at_attach_and_told_everywhere(tokens: float | None, way: str, tmp_path: Path) -> None:
    model = attached(tokens, max_rounds=1, move=1)
    if tokens is not None:
        assert controller(model).choice.score == f"{way} (auto)"
        assert model.peft_config["default"].ranks.score == f"{way} (auto)"
    train(model, 4)
    [event] = events(model)
    assert event["score"] == f"{way} (auto)"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["ranks"]["score"] == f"{way} (auto)"
    again = PeftModel.from_pretrained(FAMILIES["llama"].build(), str(tmp_path), is_trainable=True)
    assert controller(again).choice.way == way
    assert ("certificate" in event) == (way == "shortlist")


def test_a_resumed_run_keeps_its_way_where_other_counts_would_decide_another() -> None:
    model = attached(1e7)
    train(model, 2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    other = attached(1.0)
    assert controller(other).choice.way == "taylor"
    other.load_state_dict(state)
    train(other, 4, start=2)
    assert [e["score"] for e in events(other)] == ["exact (auto)"]
    assert other.peft_config["default"].ranks.score == "exact (auto)"


def test_no_clock_decides(monkeypatch) -> None:
    """The same counts on a machine a thousand times slower."""
    ways = []
    for speed in (1, 1000):
        monkeypatch.setattr("time.perf_counter", lambda speed=speed: speed * 1.0)
        ways.append(controller(attached(400.0, move=1, max_rounds=1)).choice.score)
    assert ways[0] == ways[1]


# ---------------------------------------------------------------------- the shortlist's certificate


def test_a_certificate_is_the_distance_of_the_first_left_out_in_errors_of_the_estimate() -> None:
    exact, estimate = [0.0, 1.0, 2.0, 3.0], [0.1, 0.9, 2.1, 2.9]  # errors ±0.1, mean 0
    found = certify(exact, estimate, [5.0, 9.0], 2)
    assert found.error == pytest.approx(0.1)
    assert found.distance == pytest.approx((5.0 - 1.0) / 0.1)
    assert found.holds
    shifted = certify(exact, [e + 7 for e in estimate], [12.0], 2)  # a constant moves no rank
    assert shifted.distance == pytest.approx(found.distance)
    assert not certify(exact, estimate, [1.0 + 0.1 * CERTAIN - 0.01], 2).holds
    assert certify(exact, estimate, [], 2).distance is None


@pytest.mark.parametrize("certain", [0.0, math.inf])
def test_where_the_shortlist_is_not_certain_auto_takes_its_estimate_and_never_exact(
    certain: float, monkeypatch
) -> None:
    monkeypatch.setattr("weftlora.schedule.rank_slots.CERTAIN", certain)
    model = bare(score="shortlist (auto)", first=1, max_rounds=1, move=2, shortlist_factor=3)
    weftlora.attach(model, validation=HELD_OUT)
    random_factors(model)
    asked: list[int] = []
    real = scorer(model).exact
    scorer(model).exact = lambda slots, *a, **k: (asked.append(len(slots)), real(slots, *a, **k))[1]
    ids = controller(model).scoring.live()
    guess = scores(scorer(model).estimate(ids, "0/1"), "both")
    train(model, 1, adam(model, lr=1e-12))
    [event] = events(model)
    assert asked == [6]  # of 28
    assert event["certificate"]["holds"] == (certain == 0.0)
    names = list(sites(model))
    lowest = [[names[ids[n][0]], ids[n][1]] for n in sorted(range(len(ids)), key=lambda n: guess[n])[:2]]
    taken = [each[:2] for each in event["pruned"]]
    if certain:
        assert taken == lowest
        assert event["scored"] == 28
    else:
        assert event["scored"] == 6


def test_an_estimate_asked_for_of_a_model_that_gives_none_fails_at_the_first_step_not_in_a_round() -> None:
    model = bare(score="taylor", first=5)
    weftlora.attach(model, validation=HELD_OUT)
    base, real = model.get_base_model(), type(model.get_base_model()).forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        given = real(base, *args, **kwargs)
        given.loss = None if given.loss is None else given.loss**2
        return given

    base.forward = squared
    with pytest.raises(weftlora.ConfigError, match="use score='exact'"):
        train(model, 1)


# ---------------------------------------------------------------------- the bar


@pytest.mark.parametrize("score", ["exact", "taylor"])
def test_a_round_tells_how_far_it_is(score: str) -> None:
    ticks: list[Tick] = []
    model = bare(score=score, first=1, max_rounds=1)
    weftlora.attach(model, validation=HELD_OUT, on_progress=ticks.append)
    random_factors(model)
    train(model, 1)
    assert {tick.phase for tick in ticks} == {"scoring ranks"}
    assert [tick.done for tick in ticks] == sorted(tick.done for tick in ticks)
    assert ticks[-1].done == ticks[-1].total
    assert len(ticks) >= 2


def test_tokens_of_rows_are_counted_over_some_of_them() -> None:
    model = attached(1.0)
    assert controller(model).row_tokens == len(HELD_OUT[0]["input_ids"])
    weftlora.attach(model, validation=[{"pixel_values": torch.ones(1), "labels": torch.ones(1)}] * 8)
    assert controller(model).row_tokens is None


def test_as_many_rows_as_a_round_scores_on_are_enough_and_one_fewer_is_said() -> None:
    import warnings

    for rows, warned in ((len(HELD_OUT), False), (len(HELD_OUT) + 1, True)):
        model = bare(score="taylor", first=1, max_rounds=1, rows=rows)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            weftlora.attach(model, validation=HELD_OUT)
        assert any("were given" in str(one.message) for one in said) == warned
