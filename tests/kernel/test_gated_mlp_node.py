"""The gated MLP as one node: the values, the gradients and the masks of its three linears one by one."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from weftlora.kernel import Factors, Slots, Work, gated_mlp, linears

IN, INNER, RANK, HEADS = 6, 10, 3, 2
ACT = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda e: F.gelu(e, approximate="tanh")}


def factors(fan_in: int, out: int, router: str | None, extra: int, dtype: torch.dtype) -> Factors:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

    return Factors(
        leaf(RANK, fan_in),
        leaf(out, RANK * (HEADS if router else 1)),
        1.7,
        leaf(RANK),
        router=None if router is None else leaf(HEADS, fan_in if router == "x" else RANK),
        router_input="Ax" if router == "Ax" else "x",
        extra=(Slots(leaf(2, fan_in), leaf(out, 2), leaf(2)),) * extra,
    )


def leaves(f: Factors) -> list[Tensor]:
    return [
        t for t in (f.A, f.B, f.gate, f.router, *(t for s in f.extra for t in (s.down, s.up, s.gate))) if t is not None
    ]


def make(router: str | None, extra: int, p: float, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    shapes = [(IN, INNER), (IN, INNER), (INNER, IN)]
    each = [factors(*shape, router, extra, dtype) for shape in shapes]
    members = [
        (torch.randn(out, fan_in, dtype=dtype), torch.randn(out, dtype=dtype), Work(f, p))
        for (fan_in, out), f in zip(shapes, each, strict=True)
    ]
    x = torch.randn(2, 5, IN, dtype=torch.float64).to(dtype).requires_grad_()
    return x, members, [x, *(t for f in each for t in leaves(f))]


def one_by_one(x: Tensor, act, members) -> Tensor:
    e, a = (linears(x, [member])[0] for member in members[:2])
    return linears(act(e) * a, members[2:])[0]


@pytest.mark.parametrize(("router", "extra", "p"), itertools.product((None, "x", "Ax"), (0, 1), (0.0, 0.3)))
@pytest.mark.parametrize("activation", ACT)
def test_it_is_its_linears_one_by_one(activation: str, router: str | None, extra: int, p: float):
    x, members, wanted = make(router, extra, p)
    torch.manual_seed(1)
    whole = gated_mlp(x, activation, *members)
    torch.manual_seed(1)
    apart = one_by_one(x, ACT[activation], members)
    torch.testing.assert_close(whole, apart, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(whole)
    for got, want in zip(torch.autograd.grad(whole, wanted, g), torch.autograd.grad(apart, wanted, g), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("router", "extra", "p"), itertools.product((None, "x", "Ax"), (0, 1), (0.0, 0.3)))
def test_gradcheck(router: str | None, extra: int, p: float):
    x, members, wanted = make(router, extra, p)

    def run(*_: Tensor) -> Tensor:
        torch.manual_seed(1)
        return gated_mlp(x, "silu", *members)

    assert torch.autograd.gradcheck(run, tuple(wanted), atol=1e-6, rtol=1e-5, fast_mode=True)


def test_a_second_backward_raises_instead_of_being_wrong():
    x, members, _ = make(None, 0, 0.0)
    [g] = torch.autograd.grad(gated_mlp(x, "silu", *members).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_gate_and_up_may_share_a_mask():
    x, members, _ = make(None, 0, 0.5)
    from weftlora.kernel import draw

    mask = draw(x, 0.5)
    shared = [(w, b, Work(work.factors, 0.5, mask=mask)) for w, b, work in members[:2]]
    torch.manual_seed(2)
    whole = gated_mlp(x, "silu", *shared, members[2])
    torch.manual_seed(2)
    torch.testing.assert_close(whole, one_by_one(x, F.silu, [*shared, members[2]]))


def test_the_routers_of_all_three_are_heard_with_their_graph():
    x, members, _ = make("x", 0, 0.0)
    heard: list[Tensor] = []
    told = [(w, b, Work(work.factors, on_mix=heard.append)) for w, b, work in members]
    y = gated_mlp(x, "silu", *told)
    assert [tuple(omega.shape) for omega in heard] == [(2, 5, HEADS)] * 3
    for omega, (_, _, work) in zip(heard, told, strict=True):
        [g] = torch.autograd.grad(omega[..., 0].sum(), work.factors.router, retain_graph=True)
        assert g.abs().max() > 0
    assert y.shape == x.shape


def test_saved_are_its_input_and_the_two_outputs():
    x, members, _ = make(None, 0, 0.0)
    given = {t.untyped_storage().data_ptr() for w, b, work in members for t in (x, w, b, *leaves(work.factors))}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = gated_mlp(x, "silu", *members)
    wide = [t for key, t in saved.items() if key not in given and t.shape[0] == 10 and t.shape[-1] == INNER]
    assert len(wide) == 2  # neither act(e) nor the product, the input of down
    assert x.untyped_storage().data_ptr() in saved
    assert y.requires_grad
