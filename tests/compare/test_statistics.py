"""Rows of a comparison, from fabricated runs with planted scores."""

from __future__ import annotations

import math

import pytest
from fabricated import lost, method, runs

from weftlora.compare.record import Method
from weftlora.compare.statistics import rows
from weftlora.errors import RunError

BASE = [1.0, 2.0, 3.0, 4.0, 5.0]
BETTER = [0.9, 1.88, 2.89, 3.91, 4.87]


def compared(outcomes, *names, higher=False, metric="loss"):
    return {row.name: row for row in rows([method(n) for n in ("lora", *names)], outcomes, metric, higher, "lora")}


def test_differences_are_paired_by_seed():
    """Scores differ by 4 between seeds and by 0.1 between methods: only pairs can show it."""
    found = compared(runs("lora", BASE) + list(reversed(runs("other", BETTER))), "other")
    assert found["other"].gap.mean == pytest.approx(-0.11)
    assert found["other"].wins == 5
    assert found["other"].verdict.kind == "better"
    assert found["other"].score.mean == pytest.approx(2.89)
    assert found["lora"].verdict.kind == "baseline"
    assert found["lora"].gap is None


def test_only_seeds_that_are_complete_in_both_are_compared():
    other = [*runs("other", BETTER)[:3], lost("other", 3), lost("other", 4, "failed")]
    found = compared([lost("lora", 0, "missing"), *runs("lora", BASE)[1:], *other], "other")["other"]
    assert found.gap.n == 2
    assert found.score.n == 3
    assert found.gap.mean == pytest.approx(-0.115)
    assert "(2 of 5 seeds are complete in both)" in found.verdict.sentence


def test_a_method_without_a_complete_run_has_a_row_that_says_so():
    found = compared([*runs("lora", BASE), lost("other", 0)], "other")["other"]
    assert (found.score, found.gap, found.wins, found.verdict.kind) == (None, None, 0, "single")
    assert "no seed is complete" in found.verdict.sentence


def test_a_baseline_without_a_complete_run_says_so():
    made = rows([method("lora"), method("other")], [lost("lora", 0), *runs("other", [0.5])], "loss", False, "lora")
    assert made[0].verdict.sentence == "what the others are compared with, and no seed of it is complete"


def test_one_seed_gets_no_verdict():
    found = compared(runs("lora", BASE[:1]) + runs("other", BETTER[:1]), "other")["other"]
    assert found.verdict.kind == "single"
    assert found.gap.low is None


def test_the_frozen_base_is_shown_and_not_compared():
    base = Method("frozen", {"recipe": "none"})
    outcomes = [*runs("lora", BASE), *runs("frozen", [9.0])]
    row = rows([method("lora"), base], outcomes, "loss", False, "lora")[1]
    assert (row.score.mean, row.gap, row.verdict.kind) == (9.0, None, "single")


def test_higher_can_be_better():
    lower = compared(runs("lora", BASE, "bleu") + runs("other", BETTER, "bleu"), "other", higher=True, metric="bleu")
    assert (lower["other"].verdict.kind, lower["other"].wins) == ("worse", 0)


def test_the_step_ratio_is_paired_and_absent_where_a_machine_has_no_figure():
    timed = compared(runs("lora", BASE, cpu=0.5) + runs("other", BETTER, cpu=0.6), "other")["other"]
    assert timed.step_ratio.mean == pytest.approx(1.2)
    assert compared(runs("lora", BASE) + runs("other", BETTER, cpu=0.6), "other")["other"].step_ratio is None


def test_a_complete_run_without_the_metric_is_refused_by_name():
    with pytest.raises(RunError, match=r"runs/other/seed-0 has no bleu, only loss"):
        compared(runs("lora", BASE, "bleu") + runs("other", BETTER), "other", metric="bleu")


def test_a_score_that_is_no_number_and_a_run_twice_are_refused():
    with pytest.raises(RunError, match="diverged"):
        compared([*runs("lora", BASE), *runs("other", [math.nan])], "other")
    with pytest.raises(RunError, match="two runs of seed 0"):
        compared(runs("lora", BASE) + runs("lora", BASE))
