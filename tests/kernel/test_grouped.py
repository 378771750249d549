"""The equation for a batch of sites is that of each site on its own tokens: values, gradients, masks, gates per part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weftlora.kernel import (
    Factors,
    Grouping,
    Order,
    Slots,
    Work,
    add_grouped,
    delta_weights,
    draw,
    grouped_linear,
    reference,
    use_reference,
)
from weftlora.kernel.grouped import of_expert

E, S, IN, OUT, R, N = 5, 23, 12, 8, 3, 2
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def _given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Grouping]:
    expert = torch.sort(torch.randint(0, E - 1, (S,))).values  # the last expert has no token
    ends = torch.bincount(expert, minlength=E).cumsum(0).to(torch.int32)
    return _leaf(S, IN, dtype=dtype), _leaf(S, OUT, dtype=dtype), Grouping(ends, expert)


def _leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def _cases(dtype: torch.dtype) -> dict[str, Factors]:
    def p(*shape: int) -> Tensor:
        return _leaf(*shape, dtype=dtype)

    extra = (Slots(p(E, 2, IN), p(E, OUT, 2), p(E, 2)),)
    return {
        "plain": Factors(p(E, R, IN), p(E, OUT, R), 2.0, gate=p(E, R)),
        "one A": Factors(p(R, IN), p(E, OUT, R), 2.0, gate=p(E, R), v=p(E, OUT)),
        "one pair": Factors(p(R, IN), p(OUT, R), 2.0, gate=p(E, R), v=p(E, OUT), extra=extra),
        "routed": Factors(p(E, R, IN), p(E, OUT, N * R), 2.0, gate=p(E, R), router=p(E, N, IN)),
        "routed by A x": Factors(p(E, R, IN), p(E, OUT, N * R), 2.0, router=p(E, N, R), router_input="Ax", extra=extra),
        "two of three": Factors(p(E, R, IN), p(E, OUT, 3 * R), 2.0, router=p(E, 3, IN), top=2, extra=extra),
    }


def _leaves(f: Factors) -> list[Tensor]:
    own = [t for t in (f.A, f.B, f.gate, f.v, f.router) if t is not None]
    return own + [t for slots in f.extra for t in slots[:3] if t is not None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("case", list(_cases(torch.float64)))
def test_is_the_equation_of_each_expert_on_its_own_tokens(case: str, p: float, dtype: torch.dtype) -> None:
    x, y, grouping = _given(dtype)
    f, bits = _cases(dtype)[case], draw(x, p) if p else None
    found = []
    for plain in (False, True):
        with use_reference(plain):
            out = add_grouped(y.clone(), x, Work(f, p, mask=bits), grouping)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        found.append([out, *torch.autograd.grad((out * weights).sum(), [x, y, *_leaves(f)])])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("case", list(_cases(torch.float64)))
def test_a_node_that_owns_the_base_is_the_base_and_its_update(case: str, p: float) -> None:
    x, _, grouping = _given()
    f, bits = _cases(torch.float64)[case], draw(x, p) if p else None
    weight, bias = torch.randn(E, OUT, IN, dtype=torch.float64), torch.randn(E, OUT, dtype=torch.float64)
    found = []
    for plain in (False, True):
        told: list[Tensor] = []
        with use_reference(plain):
            out = grouped_linear(x, weight, grouping, bias, Work(f, p, mask=bits, on_mix=told.append))
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        loss = (out * weights).sum()
        if told:  # the reference tells every expert's mixture of all tokens
            own = torch.cat([m[s] for m, s in zip(told, grouping.slices(), strict=True)]) if plain else told[0]
            loss = loss + own[:, 0].square().sum()
        found.append([out, *torch.autograd.grad(loss, [x, *_leaves(f)])])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("of_w", [torch.float64, torch.float32])
def test_pairs_go_apart_and_come_together_as_by_plain_indices(of_w: torch.dtype) -> None:
    chosen = torch.stack([torch.randperm(E)[:2] for _ in range(S)])
    expert, order = torch.sort(chosen.flatten(), stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(2 * S)
    ends = torch.bincount(expert, minlength=E).cumsum(0).to(torch.int32)
    pairs = Order(Grouping(ends, expert), order // 2, order, back.view(S, 2))
    x, w = _leaf(S, IN), _leaf(S, 2, dtype=of_w)
    apart = pairs.apart(x)
    found = pairs.together(apart * expert[:, None], w)
    plain = x[order // 2]
    expected = ((plain * expert[:, None]) * w.flatten()[order][:, None])[back].view(S, 2, IN).sum(1)
    assert torch.equal(apart, plain)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), [x, w], retain_graph=True) for y in (found, expected))
    for one, other in zip((found, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[of_w], atol=TOLERANCE[of_w])


def test_the_reference_is_a_loop_over_experts() -> None:
    x, y, grouping = _given()
    f = _cases(torch.float64)["two of three"]
    with use_reference():
        found = add_grouped(y.clone(), x, Work(f), grouping)
    for e, own in enumerate(grouping.slices()):
        torch.testing.assert_close(found[own], y[own] + reference(x[own], Work(of_expert(f, e))))


def test_gates_of_a_part_of_the_batch_reach_its_tokens_alone() -> None:
    x, y, grouping = _given()
    part = torch.arange(S) % 3
    f = _cases(torch.float64)["one pair"]
    [slots] = f.extra
    third = slots._replace(down=2 * slots.down)
    keep, other = torch.rand(E, 3, R, dtype=torch.float64), torch.rand(E, 3, 2, dtype=torch.float64)
    scored = replace(f, keep=keep, extra=(slots._replace(keep=other), third))
    found = add_grouped(y.clone(), x, Work(scored), replace(grouping, part=part))
    for k in range(3):
        beside = slots._replace(gate=slots.gate * other[:, k])
        alone = replace(f, gate=None if f.gate is None else f.gate * keep[:, k], extra=(beside, third))
        expected = add_grouped(y.clone(), x, Work(alone), grouping)
        torch.testing.assert_close(found[part == k], expected[part == k])


@pytest.mark.parametrize("case", ["plain", "one A", "one pair"])
def test_the_update_of_a_weight_is_what_its_tokens_get(case: str) -> None:
    x, _, grouping = _given()
    f = _cases(torch.float64)[case]
    delta = delta_weights(f, E)
    assert delta.shape == (E, OUT, IN)
    assert delta.requires_grad
    zero = torch.zeros(S, OUT, dtype=torch.float64)
    expected = torch.einsum("soi,si->so", delta[grouping.expert], x)
    torch.testing.assert_close(add_grouped(zero, x, Work(f), grouping), expected)


def test_nothing_as_large_as_the_weights_is_kept() -> None:
    """Of the sizes of a graph's saved tensors none is E × out × in."""
    x, y, grouping = _given()
    kept: list[int] = []
    f = _cases(torch.float64)["plain"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        add_grouped(y.clone(), x, Work(f), grouping)
    assert max(kept) < E * OUT * IN
    assert kept
