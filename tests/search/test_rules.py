"""Selection rules, ties, margins and agreement, in plain numbers."""

from __future__ import annotations

import random
from itertools import combinations
from statistics import fmean

import pytest
import torch

from weftlora.errors import ConfigError, RunError
from weftlora.search.rules import chance, choose, jaccard, stability
from weftlora.terms.layers.search import weights

ALPHA = [0.5, -0.25, 0.125, -0.375]


def test_each_rule_on_numbers_that_tell_them_apart():
    drifted = [a - 1.0 for a in ALPHA]
    assert choose(ALPHA, "above_mean").selected == choose(ALPHA, "raw_zero").selected == (0, 2)
    assert choose(drifted, "above_mean").selected == (0, 2)
    assert choose(drifted, "raw_zero", min_layers=1).filled == (0,)
    assert choose(ALPHA, "top_k", top_k=3).selected == (0, 1, 2)


def test_above_mean_does_not_see_a_constant_added_to_alpha():
    draw = random.Random(0)
    for _ in range(50):
        alpha = [draw.gauss(0, 1) for _ in range(12)]
        moved = [a + 17.0 for a in alpha]
        assert choose(alpha, "above_mean").selected == choose(moved, "above_mean").selected


def test_alpha_hat_above_one_is_stricter_than_above_the_mean():
    draw, stricter = random.Random(0), 0
    for _ in range(100):
        alpha = [draw.gauss(0, 1) for _ in range(8)]
        by_hat, by_mean = (set(choose(alpha, rule).selected) for rule in ("alpha_hat_gt_1", "above_mean"))
        assert by_hat == set((weights(torch.tensor(alpha, dtype=torch.float64)) > 1).nonzero().flatten().tolist())
        assert by_hat <= by_mean
        stricter += by_hat < by_mean
    assert stricter > 10


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_equal_alphas_select_nothing_and_min_layers_takes_the_lowest_indices(value: float):
    for rule in ("above_mean", "alpha_hat_gt_1"):
        found = choose([value] * 6, rule, min_layers=2)
        assert found.selected == found.filled == (0, 1)


def test_what_happens_where_fewer_qualify_than_min_layers_is_the_users_choice():
    assert choose(ALPHA, "above_mean", min_layers=3).filled == (1,)
    assert choose(ALPHA, "above_mean", min_layers=2, when_fewer="error").selected == (0, 2)
    with pytest.raises(
        RunError, match=r"'above_mean' selects 2 of 4 groups, fewer than min_layers=3.*when_fewer='fill'"
    ):
        choose(ALPHA, "above_mean", min_layers=3, when_fewer="error")
    with pytest.raises(RunError, match="selects 0 of 6"):
        choose([0.1] * 6, "above_mean", when_fewer="error")


def test_ties_go_to_the_lower_index():
    assert choose([1.0, 2.0, 2.0, 2.0], "top_k", top_k=2).selected == (1, 2)


def test_the_margin_is_the_smallest_distance_and_near_ties_are_flagged():
    found = choose([1.0, 0.01, -1.01], "above_mean", step=0.05)
    assert found.margin == pytest.approx(0.01)
    assert found.near == (1,)
    assert choose([1.0, 0.01, -1.01], "above_mean", step=0.005).near == ()
    top = choose([3.0, 2.0, 1.0], "top_k", top_k=1)
    assert top.distance == (0.5, -0.5, -1.5)


@pytest.mark.parametrize("fields", [{"top_k": 5}, {"min_layers": 5}])
def test_more_than_there_are_is_refused(fields: dict):
    with pytest.raises(ConfigError, match="of 4 groups"):
        choose(ALPHA, "above_mean", **fields)


def test_an_alpha_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="diverged"):
        choose([0.0, float("nan")], "above_mean")


def test_chance_is_the_mean_jaccard_over_all_pairs_of_subsets():
    for a, b, n in ((3, 3, 6), (2, 4, 6), (5, 5, 6), (1, 6, 6)):
        pairs = [(set(x), set(y)) for x in combinations(range(n), a) for y in combinations(range(n), b)]
        assert chance(a, b, n) == pytest.approx(fmean(jaccard(x, y) for x, y in pairs))
    assert chance(12, 12, 32) == pytest.approx(0.24, abs=0.005)  # the spec's reference point


def test_stability_is_the_mean_over_pairs_beside_its_chance():
    found = stability([(0, 1), (0, 1), (0, 2)], 4)
    assert found.jaccard == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found.chance == pytest.approx(chance(2, 2, 4))
    assert found.frequency == (1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0)
    with pytest.raises(ConfigError, match="at least two"):
        stability([(0,)], 4)
