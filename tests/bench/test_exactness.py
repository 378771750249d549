"""The exactness that every speed stands beside."""

import dataclasses
import math

import pytest
import torch

import weftlora.kernel
from weftlora.bench import Case, step
from weftlora.bench.cases import Batch, agreement, build, frozen_base, relative_error
from weftlora.bench.rounds import QUICK
from weftlora.kernel import Factors
from weftlora.kernel.factors import Branch, branch

ONE = {"quick": True, "dtypes": ["fp32"], "dropouts": [0.05], "kinds": ["tied_lora"]}


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast path whose update is 0.1 % too large; the reference stays right."""

    def wrong(f: Factors, *rest: object) -> Branch:
        return branch(dataclasses.replace(f, scale=1.001 * f.scale), *rest)

    monkeypatch.setattr("weftlora.kernel.fast_path.branch", wrong)


def test_the_fast_path_is_exact_with_dropout():
    result = step(**ONE)
    [case] = result.cases[1:]
    assert case.exact
    assert case.agreement.error < 1e-5
    assert case.agreement.smallest_gradient > 0
    assert result.exact


@pytest.mark.usefixtures("wrong_kernel")
def test_a_wrong_kernel_is_not_exact():
    result = step(**ONE)
    assert result.cases[1].exact is False
    assert 5e-4 < result.cases[1].agreement.error < 5e-3
    assert result.exact is False
    assert result.cases[0].exact is None  # the floor has nothing to compare


def test_a_zero_gradient_is_not_exact(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weftlora.bench.cases.leave_the_start", lambda model: None)  # B stays 0, so A's gradient is 0
    assert step(**ONE).cases[1].exact is False


def test_what_has_no_weft_site_is_not_compared():
    torch.manual_seed(0)
    base, batch = frozen_base(QUICK, "fp32"), Batch.draw(QUICK, "fp32")
    assert agreement(build(Case("peft:lora", 8), base, {}), batch, 0) is None


def test_comparing_leaves_no_gradient_and_no_random_state_behind():
    torch.manual_seed(0)
    model, batch = build(Case("hydralora", 8, 0.05), frozen_base(QUICK, "fp32"), {}), Batch.draw(QUICK, "fp32")
    state = torch.get_rng_state()
    agreement(model, batch, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch.embeddings.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert not weftlora.kernel.current().reference


def test_a_gradient_that_is_not_finite_is_infinitely_wrong():
    g = torch.ones(3)
    assert relative_error(g, g) == 0
    assert relative_error(1.5 * g, g) == pytest.approx(0.5)
    assert relative_error(g * math.nan, g) == math.inf
    assert relative_error(g, 0 * g) == math.inf
