"""The sentence that is said of paired differences."""

from __future__ import annotations

import re

import pytest

from weftlora.compare.statistics import interval, verdict

LOWER = [-0.031, -0.026, -0.040, -0.022, -0.035]


def said(gaps, metric="loss", higher=False, planned=None):
    return verdict(gaps, metric, higher, "lora", planned)


def test_lower_is_better_for_a_loss_and_worse_for_an_accuracy():
    assert said(LOWER).kind == "better"
    assert said(LOWER, "accuracy", True).kind == "worse"
    assert said([-gap for gap in LOWER]).kind == "worse"


def test_the_sentence_has_size_unit_and_interval_without_signs():
    match = re.fullmatch(r"better by (\S+) nats \[(\S+), (\S+)\]", said(LOWER).sentence)
    mean, low, high = map(float, match.groups())
    assert 0 < low < mean < high
    assert mean == pytest.approx(0.031, abs=5e-4)


def test_shares_are_said_in_points():
    assert said([-gap for gap in LOWER], "accuracy", True).sentence.startswith("better by 3.1 points of accuracy [2.")


def test_an_end_near_0_is_not_shown_as_0():
    ends_at = interval(LOWER).high
    found = said([gap - ends_at - 1e-5 for gap in LOWER])
    assert re.fullmatch(r"better by 0.00\d+ nats \[0.00001, 0.0\d+\]", found.sentence)


def test_an_open_difference_says_how_many_seeds_would_settle_it():
    found = said([-0.05, 0.02, -0.03, 0.01, -0.01])
    assert found.kind == "undecided"
    assert found.seeds_needed == int(re.search(r"about (\d+) seeds", found.sentence).group(1)) > 5
    assert found.sentence.startswith("not distinguishable from lora at n=5; ")


def test_no_difference_is_not_promised_an_end():
    found = said([0.01, -0.01, 0.0])
    assert (found.kind, found.seeds_needed) == ("undecided", None)
    assert "no number of seeds below 1000 would" in found.sentence
    assert "all 2 differences are 0" in said([0.0, 0.0]).sentence


def test_one_seed_and_none_have_no_verdict():
    assert said([0.5]).sentence == "one seed: no verdict"
    assert said([0.5], planned=5).sentence == "one seed: no verdict (1 of 5 seeds are complete in both)"
    assert said([], planned=5).kind == "single"


def test_two_equal_differences_decide_nothing():
    found = said([0.25, 0.25])
    assert (found.kind, found.seeds_needed) == ("undecided", None)
    assert found.sentence.endswith("at n=2; two equal differences have no spread to judge them by")


def test_lost_seeds_are_said():
    assert said(LOWER, planned=7).sentence.endswith("(5 of 7 seeds are complete in both)")
    assert "complete" not in said(LOWER, planned=5).sentence


def test_equal_differences_are_said_to_be_equal():
    assert said([-0.5] * 3).sentence == "better by 0.5 nats [0.5, 0.5], the same in all 3 seeds"
