"""A gated MLP as one node: y = down(act(gate x) ⊙ up x), each of the three linears with its low-rank update.

    forward     e, a = gate x, up x (one node's work, one input);  y = down(act(e) ⊙ a)
    backward    act(e) ⊙ a is formed again;  gₐ = g_h ⊙ act(e),  g_e = act'(e) ⊙ (g_h ⊙ a)

Saved are x, e and a beside what `weftlora.kernel.node` saves of the small things: not act(e), not their product, not the input
of `down`. That is less than autograd keeps for the frozen MLP alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from weftlora.kernel.factors import without_autocast
from weftlora.kernel.node import Parts, Plan, backward, flat, latents_of, read, shaped, split, spread, up

FIELDS = len(Parts._fields)


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its derivative: `slope(g, e)` is g ⊙ act'(e)."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda e: F.gelu(e, approximate="tanh"),
        lambda g, e: cast(Tensor, torch.ops.aten.gelu_backward(g, e, approximate="tanh")),
    ),
}
"""SwiGLU's, and GeGLU's two."""


def run_gated(
    x: Tensor,
    activation: str,
    inner: Plan,
    outer: Plan,
    masks: tuple[Sequence[Tensor], Sequence[Tensor]],
    tensors: Sequence[Parts],
) -> tuple[Tensor, list[Tensor]]:
    """down(act(gate x) ⊙ up x) [..., out], and ω [..., N] of the members that are told.

    Args:
        x: [..., in].
        activation: a key of `ACTIVATIONS`.
        inner: the plan of gate and up, which read x.
        outer: the plan of down.
        masks: those of `inner` and those of `outer`.
        tensors: of gate, up and down.
    """
    with without_autocast(x):
        y, *told = GatedMlp.apply(activation, inner, outer, x, *masks[0], *masks[1], *flat(tensors))
    return y, [omega.view(*x.shape[:-1], omega.shape[1]) for omega in told]


class GatedMlp(Function):
    """See the module; apply(activation, inner, outer, x, *masks, *tensors of gate, up, down) → (y, *told ω)."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, inner: Plan, outer: Plan, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        first, second, each = _sorted(inner, outer, tensors)
        x_ti = x.reshape(-1, x.shape[-1])
        seen = read(x_ti, inner, each[:2], first)
        members = (*inner.members, *outer.members)
        e, a = (up(inner, *of[:2], x_ti, of[2]) for of in zip(inner.members, each[:2], seen, strict=True))
        hidden = ACTIVATIONS[activation].value(e).mul_(a)
        seen += read(hidden, outer, each[2:], second)
        y = up(outer, members[2], each[2], hidden, seen[2])
        ctx.plans = activation, inner, outer
        ctx.save_for_backward(x, e, a, *tensors, *flat(seen))
        ctx.set_materialize_grads(False)
        return (shaped(y, x), *(cast(Tensor, of.omega) for m, of in zip(members, seen, strict=True) if m.told))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *told: Tensor | None) -> tuple[Tensor | None, ...]:
        activation, inner, outer = ctx.plans
        x, e, a, *rest = ctx.saved_tensors
        count = inner.masks + outer.masks + 3 * FIELDS
        first, second, each = _sorted(inner, outer, rest[:count])
        latents = latents_of(rest[count:])
        gomegas = spread((*inner.members, *outer.members), told)
        act = ACTIVATIONS[activation]
        with without_autocast(x):
            f = act.value(e)
            hidden = f * a
            g_hidden, of_down = backward(hidden, outer, each[2:], second, latents[2:], [g], gomegas[2:], True)
            g_e = g_a = None
            if g_hidden is not None:
                g_a = f.mul_(g_hidden)
                g_e = act.slope(g_hidden.mul_(a), e)
            gx, of_first = backward(
                x, inner, each[:2], first, latents[:2], [g_e, g_a], gomegas[:2], ctx.needs_input_grad[3]
            )
        return (None, None, None, gx, *[None] * (inner.masks + outer.masks), *flat([*of_first, *of_down]))


def _sorted(
    inner: Plan, outer: Plan, tensors: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Parts]]:
    """The masks of both plans and the members' tensors."""
    both = inner.masks + outer.masks
    masks = cast("Sequence[Tensor]", tensors[:both])
    return masks[: inner.masks], masks[inner.masks :], split(tensors[both:])
