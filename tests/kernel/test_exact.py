"""The node under everything that training does to it: dtypes, dropout, checkpointing, a second backward, 50 steps."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from weftlora.kernel import Factors, Slots, Work, add_low_rank, linears, use_reference
from weftlora.kernel.equation import reference

IN, OUT, RANK, HEADS, TOKENS = 24, 40, 8, 3, 64
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}
VARIANTS = {
    "plain": {},
    "tied": {"gate": True, "v": True},
    "masked": {"gate": True},
    "hydra": {"router": "x"},
    "hydra_Ax": {"router": "Ax"},
    "dash": {"extra": 1},
    "init": {"extra": 2},
    "hydra_dash": {"router": "x", "extra": 1},
}


def make(
    router: str | None = None, gate: bool = False, v: bool = False, extra: int = 0, dtype=torch.float64
) -> Factors:
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    return Factors(
        A=leaf(RANK, IN),
        B=leaf(OUT, RANK * (HEADS if router else 1)),
        scale=2.0,
        gate=leaf(RANK) if gate else None,
        v=leaf(OUT) if v else None,
        router=None if router is None else leaf(HEADS, IN if router == "x" else RANK),
        router_input="Ax" if router == "Ax" else "x",
        extra=(Slots(leaf(4, IN), leaf(OUT, 4), leaf(4)),) * extra,
    )


def leaves(f: Factors) -> list[Tensor]:
    tensors = [f.A, f.B, f.gate, f.v, f.router, *(t for s in f.extra for t in (s.down, s.up, s.gate))]
    return list({id(t): t for t in tensors if t is not None}.values())


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, TOKENS // 2, IN, dtype=torch.float64).to(dtype).requires_grad_()
    return x, (torch.randn(OUT, IN, dtype=torch.float64) / 5).to(dtype), torch.randn(OUT, dtype=torch.float64).to(dtype)


def equation(x: Tensor, weight: Tensor, bias: Tensor, work: Work) -> Tensor:
    return nn.functional.linear(x, weight, bias) + reference(x, work)


def node(x: Tensor, weight: Tensor, bias: Tensor, work: Work) -> Tensor:
    return linears(x, [(weight, bias, work)])[0]


def plain(run, *args):
    return run(*args)


def reentrant(run, *args):
    return checkpoint(run, *args, use_reentrant=True)


def non_reentrant(run, *args):
    return checkpoint(run, *args, use_reentrant=False)


def gradients(path, call, f: Factors, given: tuple[Tensor, Tensor, Tensor], dropout: float) -> list[Tensor]:
    x, weight, bias = given
    torch.manual_seed(3)
    y = call(lambda x: path(x, weight, bias, Work(f, dropout)), x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    for t in (x, *leaves(f)):
        t.grad = None
    y.backward(upstream)
    return [y.detach(), *(t.grad.clone() for t in (x, *leaves(f)))]


@pytest.mark.parametrize("call", [plain, reentrant, non_reentrant])
@pytest.mark.parametrize(("dtype", "dropout"), itertools.product(LIMIT, (0.0, 0.05)))
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_the_equation(variant: str, dtype: torch.dtype, dropout: float, call):
    """Relative in norm: 1e-5 in fp32, 2e-2 in bf16, checkpointed or not. In 16 bits against the equation in fp64, computed
    from the same rounded numbers under the same masks."""
    f, given = make(**VARIANTS[variant], dtype=dtype), inputs(dtype)
    got = gradients(node, call, f, given, dropout)
    wide = torch.float64 if dtype.itemsize == 2 else dtype
    exact = make(**VARIANTS[variant], dtype=wide)
    for mine, theirs in zip(leaves(exact), leaves(f), strict=True):
        mine.data = theirs.detach().to(wide)
    x, weight, bias = (t.detach().to(wide) for t in given)
    want = gradients(equation, plain, exact, (x.requires_grad_(), weight, bias), dropout)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() <= LIMIT[dtype] * theirs.norm()
        assert theirs.norm() > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_under_autocast_fp32_masters_have_fp32_gradients_of_the_equation(
    variant: str, dtype: torch.dtype, dropout: float
):
    f, (x, weight, bias) = make(**VARIANTS[variant], dtype=torch.float32), inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        got = gradients(node, plain, f, (x.detach().to(dtype).requires_grad_(), weight, bias), dropout)
    assert got[0].dtype == dtype
    exact = make(**VARIANTS[variant], dtype=torch.float64)
    rounded = [t.detach().to(dtype).double() for t in (x, weight, bias)]
    want = gradients(equation, plain, exact, (rounded[0].requires_grad_(), *rounded[1:]), dropout)
    for mine, theirs in zip(got[2:], want[2:], strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() <= 3e-2 * theirs.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_backward_raises_instead_of_being_wrong(variant: str):
    f, (x, weight, bias) = make(**VARIANTS[variant]), inputs(torch.float64)
    [g] = torch.autograd.grad(node(x, weight, bias, Work(f)).square().sum(), f.A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with use_reference():  # what needs it takes the equation
        y = add_low_rank(nn.functional.linear(x, weight, bias), x, Work(f))
        [g] = torch.autograd.grad(y.square().sum(), f.A, create_graph=True)
        g.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fifty_steps_have_the_loss_curve_of_the_equation(variant: str):
    curves = []
    for path in (node, equation):
        f, (x, weight, bias) = make(**VARIANTS[variant], dtype=torch.float32), inputs(torch.float32)
        target = torch.randn(2, TOKENS // 2, OUT, generator=torch.Generator().manual_seed(5))
        optimizer = torch.optim.AdamW(leaves(f), lr=3e-3)
        torch.manual_seed(6)
        curve = []
        for _ in range(50):
            loss = (path(x.detach(), weight, bias, Work(f, 0.05)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    assert ((curves[0] - curves[1]).abs() <= 1e-4 * curves[1]).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(variant: str, mode):
    f, (x, weight, bias) = make(**VARIANTS[variant], dtype=torch.float32), inputs(torch.float32)
    with mode():
        quiet = node(x, weight, bias, Work(f))
    assert torch.equal(quiet, node(x, weight, bias, Work(f)))


def test_an_input_without_gradient_gets_none_and_factors_theirs():
    f, (x, weight, bias) = make(), inputs(torch.float64)
    node(x.detach(), weight, bias, Work(f)).sum().backward()
    assert x.grad is None
    assert f.A.grad.norm() > 0


@pytest.mark.parametrize("kind", ["one mask", "own masks"])
def test_a_group_with_dropout_is_its_members_with_the_same_masks(kind: str):
    from weftlora.kernel import draw

    x, weight, bias = inputs(torch.float64)
    each = [make(), make(router="x"), make(extra=1)]
    torch.manual_seed(7)
    masks = [draw(x, 0.3)] * 3 if kind == "one mask" else [draw(x, 0.3) for _ in range(3)]
    members = [(weight, bias, Work(f, 0.3, mask=mask)) for f, mask in zip(each, masks, strict=True)]
    wanted = [x, *(t for f in each for t in leaves(f))]
    together = sum(y.sin().sum() for y in linears(x, members))
    apart = sum(equation(x, *member).sin().sum() for member in members)
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    got, want = torch.autograd.grad(together, wanted), torch.autograd.grad(apart, wanted)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_member_whose_output_is_not_used_has_no_gradient_and_disturbs_none():
    x, weight, bias = inputs(torch.float64)
    used, unused = make(), make(router="x")
    y, _ = linears(x, [(weight, bias, Work(used)), (weight, bias, Work(unused))])
    gx, ga, gb = torch.autograd.grad(y.sum(), [x, used.A, unused.A], allow_unused=True)
    alone = torch.autograd.grad(equation(x, weight, bias, Work(used)).sum(), [x, used.A])
    assert gb is None
    torch.testing.assert_close((gx, ga), alone, rtol=1e-12, atol=1e-12)
