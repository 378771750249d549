"""α̂ = N softmax(α) and its chain rule, against autograd and plain numbers."""

from __future__ import annotations

import pytest
import torch

from weftlora.errors import ConfigError
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
