"""α̂ = N softmax(α) and its chain rule, against autograd and plain numbers; rules of selection, ties and margins."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from weftlora.errors import ConfigError, RunError
from weftlora.terms.layers import Chosen, Weighed
from weftlora.terms.layers.only import Only
from weftlora.terms.layers.search import Search, alpha_gradient, weights


def test_equal_alphas_are_exactly_one_for_every_number_of_blocks():
    for n in range(1, 129):
        for value in (0.0, 0.1, -3.7):
            assert torch.equal(
                weights(torch.full((n,), value, dtype=torch.float64)), torch.ones(n, dtype=torch.float64)
            )


def test_in_fp32_a_plain_softmax_would_not_be_one():
    """Why the order of the operations is a claim and not a detail."""
    assert any((n * torch.softmax(torch.zeros(n), 0) != 1).any() for n in range(1, 129))


def test_the_weights_sum_to_n_and_ignore_a_common_constant():
    alpha = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(weights(alpha).sum(), torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(weights(alpha + 5), weights(alpha))


def test_one_very_large_alpha_takes_all_without_overflow():
    alpha_hat = weights(torch.tensor([0.0, 2000.0, 1.0]))
    assert alpha_hat.tolist() == [0.0, 3.0, 0.0]
    assert alpha_gradient(torch.tensor([0.0, 5.0, 0.0]), alpha_hat).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("power", [1, 3])
def test_the_chain_rule_is_autograds_and_sums_to_zero(power: int):
    alpha = torch.randn(6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(6, dtype=torch.float64)
    gate = weights(alpha) ** power
    loss = (gate * direction).sin().sum()
    [expected] = torch.autograd.grad(loss, alpha, retain_graph=True)
    [by_gate] = torch.autograd.grad(loss, gate)
    found = alpha_gradient((by_gate * gate).detach(), weights(alpha.detach()), power)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert abs(float(found.sum())) < 1e-13 * float(found.abs().sum())


@pytest.mark.parametrize(
    "fields",
    [
        {"inner_steps": 0},
        {"outer_batches": True},
        {"alpha_lr": 0},
        {"inner_lr": -1e-3},
        {"alpha_hat_max": 1.0},
        {"alpha_hat_max": float("inf")},
        {"alpha_lr": float("nan")},
        {"select": "above_maen"},
        {"top_k": 3},
        {"select": "top_k"},
        {"hypergrad": "exact"},
        {"unroll_steps": 1},
        {"unroll_steps": 3, "inner_steps": 2, "hypergrad": "unrolled_fd"},
        {"preset": "released", "hypergrad": "unrolled_fd"},
        {"preset": "released", "finetune": "continue"},
        {"granularity": "layer"},
        {"when_fewer": "raise"},
        {"when_fewer": "error", "select": "top_k", "top_k": 1, "min_layers": 2},
    ],
    ids=str,
)
def test_a_search_that_means_nothing_is_refused(fields: dict):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Search(**fields)


def test_the_released_preset_is_the_released_codes_arithmetic():
    released = Search(preset="released")
    assert (released.power, released.select) == (3, "raw_zero")
    assert (Search().power, Search().select) == (1, "above_mean")


def test_only_sorts_its_blocks_and_drops_repeats():
    assert Only([3, 0, 3, "b", "a"]).blocks == (0, 3, "a", "b")
    assert Only(range(2)) == Only((1, 0))


@pytest.mark.parametrize("blocks", [[], "3", 3, [-1], [True], [1.0], [""], None])
def test_only_refuses_what_names_no_block(blocks: object):
    with pytest.raises(ConfigError, match="Only"):
        Only(blocks)


# ---------------------------------------------------------------------- rules


ALPHA = [0.5, -0.25, 0.125, -0.375]


def choose(alpha: list[float], select: Any = "above_mean", step: float = 0.0, **fields: Any) -> Chosen:
    return Search(select=select, **fields).choose(Weighed(tuple(alpha), (0.0,) * len(alpha), step))


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
    assert choose([3.0, 2.0, 1.0], "top_k", top_k=3).distance == (2.0, 1.0, 0.0)  # all: the lowest is the threshold


@pytest.mark.parametrize("fields", [{"select": "top_k", "top_k": 5}, {"min_layers": 5}])
def test_more_than_there_are_is_refused(fields: dict):
    with pytest.raises(ConfigError, match="of 4 groups"):
        Search(**fields).check_groups(4)
    with pytest.raises(ConfigError, match="of 4 groups"):
        choose(ALPHA, **fields)


def test_a_search_made_to_select_a_number_selects_that_unless_it_was_told_another_rule():
    assert (Search().selects, Search().selecting(3).selects) == (None, 3)
    assert Search(top_k=2, select="top_k").selecting(1) == Search(top_k=1, select="top_k")
    with pytest.raises(ConfigError, match="only after the search"):
        Search(select="raw_zero").selecting(2)


def test_an_alpha_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="diverged"):
        choose([0.0, float("nan")], "above_mean")


def test_with_every_group_taken_the_threshold_is_the_smallest_alpha():
    found = Search(select="top_k", top_k=3).choose(Weighed((0.5, -0.25, 0.125), (1.0, 1.0, 1.0)))
    assert (found.selected, found.distance) == ((0, 1, 2), (0.75, 0.0, 0.375))
