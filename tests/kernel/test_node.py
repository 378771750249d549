"""The fast path against the equation: the same values and the same gradients, whatever the site is made of."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weftlora import kernel
from weftlora.errors import MergeError
from weftlora.kernel import Factors, Slots, Work, add_low_rank, delta_weight, reference
from weftlora.kernel.factors import used

IN, OUT, RANK, HEADS = 6, 7, 3, 4  # r + N and N·r are no multiples of 8


def make(
    router: str | None = None,
    gate: bool = False,
    v: bool = False,
    extra: int = 0,
    top: int | None = None,
    *,
    size: tuple[int, int, int, int] = (IN, OUT, RANK, HEADS),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Factors:
    """Random factors of every kind; `extra` = 1 adds Dash-like slots, 2 also frozen −B₀A₀ twin slots."""
    fan_in, out, r, heads = size
    rng = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    slots = [
        Slots(leaf(2, fan_in), leaf(out, 2), leaf(2)),
        Slots(leaf(r, fan_in).detach(), leaf(out, r).detach(), torch.full((r,), -1.7, dtype=dtype)),
    ]
    return Factors(
        A=leaf(r, fan_in),
        B=leaf(out, r if router is None else heads * r),
        scale=1.7,
        gate=leaf(r) if gate else None,
        v=leaf(out) if v else None,
        router=None if router is None else leaf(heads, fan_in if router == "x" else r),
        router_input="Ax" if router == "Ax" else "x",
        extra=tuple(slots[:extra]),
        top=top,
    )


def leaves(f: Factors) -> list[Tensor]:
    tensors = [f.A, f.B, f.gate, f.v, f.router, *(t for slots in f.extra for t in slots)]
    return [t for t in tensors if t is not None and t.requires_grad]


def both(f: Factors, x: Tensor, y: Tensor, seed: int = 5, **options: object) -> Iterator[list[Tensor]]:
    """(output, gradients of x, y and every trained factor) of the fast path, then of the reference."""
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    for path in (add_low_rank, lambda y, x, work: y + reference(x, work)):
        torch.manual_seed(seed)
        result = path(y, x, Work(f, **options))
        yield [result.detach(), *torch.autograd.grad(result, [x, y, *leaves(f)], upstream)]


def assert_equal_paths(f: Factors, x: Tensor, y: Tensor, rtol: float, **options: object) -> None:
    for fast, slow in zip(*both(f, x, y, **options), strict=True):
        assert fast.dtype == slow.dtype
        assert (fast - slow).abs().max() <= rtol * (1 + slow.abs().max())


VARIANTS = [
    pytest.param(
        {"router": router, "gate": gate, "v": v, "extra": extra}, id=f"{router}-gate{gate:d}-v{v:d}-extra{extra}"
    )
    for router, gate, v, extra in itertools.product((None, "x", "Ax"), (False, True), (False, True), (0, 1, 2))
]
SOME = [
    pytest.param({"router": router, "top": 2, "gate": True, "extra": 1}, id=f"{router}-top2") for router in ("x", "Ax")
]
"""Of some heads per token: which ones, rounding may decide in 16 bits."""


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()


# ---------------------------------------------------------------------- the fast path is the reference


@pytest.mark.parametrize("variant", VARIANTS + SOME)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fast_path_is_the_reference_in_fp64(variant: dict, dropout: float):
    assert_equal_paths(make(**variant), tokens(2, 5, IN), tokens(2, 5, OUT, seed=2), 1e-12, dropout=dropout)


@pytest.mark.parametrize("variant", VARIANTS + SOME)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fast_path_is_the_reference_in_fp32(variant: dict, dropout: float):
    f = make(**variant, dtype=torch.float32)
    x, y = tokens(2, 5, IN, dtype=torch.float32), tokens(2, 5, OUT, dtype=torch.float32)
    assert_equal_paths(f, x, y, 1e-5, dropout=dropout)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_stays_within_its_precision_of_the_exact_result(variant: dict):
    small = make(**variant, dtype=torch.bfloat16)
    exact = make(**variant)
    x, y = tokens(9, IN, dtype=torch.bfloat16), tokens(9, OUT, dtype=torch.bfloat16)
    for t, rounded in zip(leaves(exact), leaves(small), strict=True):
        t.data = rounded.detach().double()
    fast, _ = both(small, x, y)
    _, slow = both(exact, x.detach().double().requires_grad_(), y.detach().double().requires_grad_())
    for got, want in zip(fast, slow, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(variant: dict, dropout: float):
    f = make(**variant, size=(4, 3, 2, 3))
    x, y = tokens(2, 4), tokens(2, 3)
    names = [name for name in ("A", "B", "gate", "v", "router") if getattr(f, name) is not None]

    def function(x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(3)  # one fixed dropout mask
        given = dict(zip(names, values, strict=False))
        extra = f.extra
        if extra:
            extra = (Slots(*values[len(names) :]), *extra[1:])
        whole = Factors(scale=f.scale, router_input=f.router_input, extra=extra, **given)
        return add_low_rank(y, x, Work(whole, dropout=dropout))

    inputs = [getattr(f, name) for name in names] + list(f.extra[0] if f.extra else ())
    assert torch.autograd.gradcheck(function, (x, y, *inputs), atol=1e-7, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.values[0]["router"] is not None])
def test_a_mask_per_head_reaches_its_head(variant: dict, monkeypatch: pytest.MonkeyPatch):
    """Head n alone, its B kept and all others 0, is what plain LoRA of its own mask gives, weighted by ω."""
    seen: list[Tensor] = []

    def dropped(x: Tensor, p: float, bits: Tensor | None = None) -> Tensor:
        rng = torch.Generator().manual_seed(4)
        seen.append((torch.rand(x.shape, generator=rng) > p).double() / (1 - p))
        return x * seen[-1]

    monkeypatch.setattr("weftlora.kernel.equation.dropped", dropped)
    f, x = make(**variant), tokens(5, IN)
    weights: list[Tensor] = []
    got = add_low_rank(torch.zeros(5, OUT, dtype=torch.float64), x, Work(f, 0.5, True, weights.append))
    mask_tni = next(mask for mask in seen if mask.dim() == 3)
    want = sum(
        reference(x.detach() * slots_mask, Work(Factors(slots.down, slots.up, gate=slots.gate)))
        for slots in f.extra
        for slots_mask in [seen[0]]
    )
    for n in range(HEADS):
        plain = Factors(f.A, f.B.unflatten(1, (HEADS, RANK))[:, n], f.scale, f.gate, f.v)
        want = want + weights[0][:, n : n + 1] * reference(x.detach() * mask_tni[:, n], Work(plain))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_per_head_dropout_without_dropout_changes_nothing():
    f, x, y = make("x"), tokens(5, IN), tokens(5, OUT)
    assert torch.equal(add_low_rank(y, x, Work(f, per_head_dropout=True)), add_low_rank(y, x, Work(f)))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 5)),
    shape=st.lists(st.integers(0, 4), max_size=3),
    router=st.sampled_from([None, "x", "Ax"]),
    extra=st.integers(0, 2),
)
def test_every_shape(size: tuple[int, int, int, int], shape: list[int], router: str | None, extra: int):
    f = make(router, gate=True, extra=extra, size=size)
    x, y = tokens(*shape, size[0]), tokens(*shape, size[1])
    fast, slow = both(f, x, y)
    assert fast[0].shape == (*shape, size[1])
    for got, want in zip(fast, slow, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("router", [None, "x", "Ax"])
def test_input_and_base_output_need_not_be_contiguous(router: str | None):
    f = make(router, gate=True, v=True, extra=2)
    x = tokens(IN, 5, 2).detach().permute(2, 1, 0).requires_grad_()
    y = tokens(5, 2, OUT).detach().transpose(0, 1).requires_grad_()
    assert not x.is_contiguous()
    assert not y.is_contiguous()
    assert_equal_paths(f, x, y, 1e-12)


def test_the_base_output_is_not_written_to():
    f, x, y = make("x", extra=1), tokens(5, IN).detach(), tokens(5, OUT).detach()
    before = y.clone()
    with torch.no_grad():
        add_low_rank(y, x, Work(f))
    assert torch.equal(y, before)


def test_no_update_adds_exactly_nothing():
    f = make("x")
    with torch.no_grad():
        f.B.zero_()
    y = tokens(5, OUT, dtype=torch.float64)
    assert torch.equal(add_low_rank(y, tokens(5, IN), Work(f)), y)


# ---------------------------------------------------------------------- dtypes and autocast


class SoftmaxTypes(TorchDispatchMode):
    """The dtypes that softmax and its derivative are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_softmax" in str(func):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("router", ["x", "Ax"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_under_autocast_gemms_are_bf16_and_the_router_is_fp32(router: str, dropout: float):
    f = make(router, extra=1, dtype=torch.float32)
    x = tokens(9, IN, dtype=torch.float32)
    weights: list[Tensor] = []
    with torch.autocast("cpu", torch.bfloat16), SoftmaxTypes() as softmax:
        y = F.linear(x, torch.ones(OUT, IN))
        result = add_low_rank(y, x, Work(f, dropout=dropout, on_mix=weights.append))
        gradients = torch.autograd.grad(result.float().sum(), leaves(f))
    assert result.dtype == torch.bfloat16
    assert softmax.seen == [torch.float32]  # its derivative is written out, in the dtype of ω
    assert weights[0].dtype == torch.float32
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(9), rtol=0, atol=1e-6)
    assert all(g.dtype == torch.float32 for g in gradients)
    if not dropout:
        want = y.detach().double() + reference(x.double(), Work(cast(f, torch.float64)))
        assert (result.double() - want).abs().max() < 2e-2 * want.abs().max()


def test_the_gates_are_applied_in_fp32_and_rounded_once():
    """With B the identity the result is ω ⊗ u itself: its error is one rounding to bf16, not that of ω and of the product."""
    torch.manual_seed(0)
    fan_in, r, heads = 16, 4, 3
    A, router = torch.randn(r, fan_in).bfloat16(), torch.randn(heads, fan_in).bfloat16()
    f = Factors(A, torch.eye(heads * r).bfloat16(), router=router)
    x = torch.randn(500, fan_in).bfloat16()
    u_and_logits = F.linear(x, torch.cat([A, router])).double()
    omega = torch.softmax(u_and_logits[:, r:], -1)
    want = (omega[:, :, None] * u_and_logits[:, None, :r]).flatten(1)
    got = add_low_rank(torch.zeros(500, heads * r).bfloat16(), x, Work(f)).double()
    assert ((got - want).abs() <= 2**-8 * 1.01 * want.abs()).all()


@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("y_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_result_has_the_dtype_of_the_base_output(x_type: torch.dtype, y_type: torch.dtype, autocast: bool):
    """A base layer may leave the autocast dtype (an fp32 head under autocast), or return another dtype than x's."""
    f, x, y = make("x", extra=1, dtype=torch.float32), tokens(4, IN, dtype=x_type), tokens(4, OUT, dtype=y_type)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fast = add_low_rank(y, x, Work(f))
        with kernel.use_reference():
            slow = add_low_rank(y, x, Work(f))
    assert fast.dtype == slow.dtype == y_type
    assert (fast - slow).abs().max() <= 3e-2 * slow.abs().max()


def test_fp16_logits_as_large_as_fp16_can_hold_give_no_nan():
    f = make("x", dtype=torch.float16, size=(1, OUT, RANK, 3))
    f.router.data = torch.tensor([[6e4], [-6e4], [0.0]], dtype=torch.float16)
    x = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float16, requires_grad=True)
    weights: list[Tensor] = []
    result = add_low_rank(torch.zeros(3, OUT, dtype=torch.float16), x, Work(f, on_mix=weights.append))
    gradients = torch.autograd.grad(result.float().sum(), [x, *leaves(f)])
    torch.testing.assert_close(weights[0], torch.tensor([[1.0, 0, 0], [0, 1, 0], [1 / 3] * 3]))
    assert all(torch.isfinite(t).all() for t in (result, *gradients))


def cast(f: Factors, dtype: torch.dtype) -> Factors:
    def to(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype)

    extra = tuple(Slots(*(to(t) for t in slots)) for slots in f.extra)
    return Factors(to(f.A), to(f.B), f.scale, to(f.gate), to(f.v), to(f.router), f.router_input, extra)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_factors_serve_a_bf16_model(variant: dict):
    f = make(**variant, dtype=torch.float32)
    x, y = tokens(9, IN, dtype=torch.bfloat16), tokens(9, OUT, dtype=torch.bfloat16)
    fast, slow = both(f, x, y)
    want = y.detach().double() + reference(x.detach().double(), Work(cast(f, torch.float64)))
    assert fast[0].dtype == torch.bfloat16
    assert (fast[0].double() - want).abs().max() <= 2e-2 * want.abs().max()
    for got, other in zip(fast[3:], slow[3:], strict=True):
        assert got.dtype == torch.float32
        assert (got - other).abs().max() <= 4e-2 * other.abs().max()


# ---------------------------------------------------------------------- what the router reports


@pytest.mark.parametrize("path", [add_low_rank, lambda y, x, work: reference(x, work)], ids=["fast", "reference"])
def test_on_mix_sees_the_softmax_with_its_graph(path):
    f, x = make("x"), tokens(2, 5, IN)
    weights: list[Tensor] = []
    path(tokens(2, 5, OUT), x, Work(f, dropout=0.5, on_mix=weights.append))
    torch.testing.assert_close(weights[0], torch.softmax(x @ f.router.T, -1), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(weights[0][..., 0].sum(), f.router)[0].abs().max() > 0


def test_the_heads_in_use_are_those_of_each_token():
    """[..., N] with any axes before; where all are in use, ω itself, of which a backward has the one softmax alone."""
    omega = torch.softmax(tokens(2, 5, HEADS).detach(), -1)
    least = omega.min(-1, keepdim=True).values
    kept = torch.where(omega > least, omega, 0.0)
    for shape in (omega.shape, (10, HEADS)):
        torch.testing.assert_close(used(omega.view(shape), HEADS - 1), (kept / kept.sum(-1, keepdim=True)).view(shape))
    assert used(omega, HEADS) is omega


# ---------------------------------------------------------------------- ΔW


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.values[0]["router"] is None])
def test_delta_weight_is_the_forward_of_the_identity(variant: dict):
    f = make(**variant)
    update = add_low_rank(torch.zeros(IN, OUT, dtype=torch.float64), torch.eye(IN, dtype=torch.float64), Work(f))
    torch.testing.assert_close(delta_weight(f), update.T, rtol=1e-12, atol=1e-12)


def test_delta_weight_of_bf16_factors_is_exact_in_fp32_even_under_autocast():
    f = make(gate=True, v=True, extra=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        delta = delta_weight(f)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), delta_weight(cast(f, torch.float64)), rtol=1e-5, atol=1e-5)


def test_a_routed_update_has_no_weight():
    with pytest.raises(MergeError, match="token"):
        delta_weight(make("x"))


# ---------------------------------------------------------------------- the switch to the reference


def test_use_reference_is_undone_even_after_an_error(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    slow = kernel.reference
    monkeypatch.setattr("weftlora.kernel.fast_path.reference", lambda *a, **o: (calls.append(1), slow(*a, **o))[1])
    f, x, y = make("x"), tokens(5, IN), tokens(5, OUT)

    def fail() -> None:
        with kernel.use_reference():
            add_low_rank(y, x, Work(f))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert len(calls) == 1
    add_low_rank(y, x, Work(f))
    assert len(calls) == 1


def test_use_reference_can_be_nested(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    slow = kernel.reference
    monkeypatch.setattr("weftlora.kernel.fast_path.reference", lambda *a, **o: (calls.append(1), slow(*a, **o))[1])
    f, x, y = make("x"), tokens(5, IN), tokens(5, OUT)
    with kernel.use_reference():
        with kernel.use_reference(False):
            add_low_rank(y, x, Work(f))
        assert not calls
        add_low_rank(y, x, Work(f))
    assert len(calls) == 1


LOGITS = """
import torch
from weftlora import HydraLoraConfig
from weftlora.kernel import fast_path
from peft import get_peft_model
calls, slow = [], fast_path.reference
fast_path.reference = lambda *a, **o: (calls.append(1), slow(*a, **o))[1]
torch.manual_seed(0)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)),
                       HydraLoraConfig(r=2, heads=3, target_modules=["0", "2"]))
for p in model.parameters():
    torch.nn.init.normal_(p)
print(len(calls), *model(torch.ones(2, 4)).flatten().tolist(), len(calls))
"""


def test_the_environment_switches_every_site_to_the_reference():
    scope: dict = {}
    out = subprocess.run(
        [sys.executable, "-c", LOGITS], env={**os.environ, "WEFT_REFERENCE": "1"}, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    before, *logits, after = out.stdout.split()
    assert (before, after) == ("0", "2")  # both sites went through it
    before_calls = kernel.fast_path.reference
    try:
        exec(LOGITS.replace("print(", "result = ("), scope)
    finally:
        kernel.fast_path.reference = before_calls
    here = scope["result"]
    assert (here[0], here[-1]) == (0, 0)
    torch.testing.assert_close(torch.tensor([float(s) for s in logits]), torch.tensor(here[1:-1]), rtol=1e-5, atol=1e-6)
