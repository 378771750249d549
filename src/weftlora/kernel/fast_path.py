"""The ways into the autograd node.

A site's update goes onto the output of another module, or is computed with the linears themselves. `weftlora.kernel.switches` says
which ways are open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from weftlora.kernel.dropout import draw, dropped
from weftlora.kernel.equation import reference
from weftlora.kernel.factors import Work, branch, by_part, joined, like, mixture, softmax, used, without_autocast
from weftlora.kernel.gated_mlp_node import run_gated
from weftlora.kernel.node import Member, Parts, Plan, run
from weftlora.kernel.switches import current, triton_runs


def add_low_rank(y: Tensor, x: Tensor, work: Work) -> Tensor:
    """y + h B̃ᵀ: the base output y [..., out] plus the low-rank update of x [..., in]; y is not written to.

    Under autocast the GEMMs run in x's dtype and the router's softmax in fp32. The result has y's dtype.
    """
    if current().reference or work.plain:
        return y + reference(x, work).to(y.dtype)
    if work.scored:
        return _scored(y, x, work)
    plan, masks, tensors = _planned(x, [(None, y, work)])
    [result], omegas = run(x, plan, masks, tensors)
    _tell([work], omegas)
    return result


Linear = tuple[Tensor, Tensor | None, Work]
"""A member of a node: W [out, in], its bias, and what its site asks for."""


def linears(x: Tensor, members: Sequence[Linear]) -> list[Tensor]:
    """x Wᵀ + b + h B̃ᵀ of every member that reads x [..., in], as one node; dropout is the same for all.

    Values are those of the members one by one, with the same masks, which are drawn in the members' order. Members whose works
    hold the very same mask read x through it together.
    """
    plan, masks, tensors = _planned(x, members)
    outputs, omegas = run(x, plan, masks, tensors)
    _tell([work for _, _, work in members], omegas)
    return outputs


def gated_mlp(x: Tensor, activation: str, gate: Linear, up: Linear, down: Linear) -> Tensor:
    """down(act(gate x) ⊙ up x) of x [..., in] with all three updates, as one node.

    Args:
        activation: "silu", "gelu" or "gelu_tanh".
    """
    inner, first, tensors = _planned(x, [gate, up])
    outer, second, last = _planned(x, [down], width=down[0].shape[1])
    y, omegas = run_gated(x, activation, inner, outer, (first, second), [*tensors, *last])
    _tell([gate[2], up[2], down[2]], omegas)
    return y


def _planned(
    x: Tensor, members: Sequence[tuple[Tensor | None, Tensor | None, Work]], width: int | None = None
) -> tuple[Plan, list[Tensor], list[Parts]]:
    """What a node over these members takes; a member without W adds to an output, which stands in b's place.

    Args:
        width: of the input that the members read, where it is not x.
    """
    p = members[0][2].dropout
    found: list[Member] = []
    masks: list[Tensor] = []
    tensors: list[Parts] = []
    for weight, other, work in members:
        b = branch(work.factors, x.device, p > 0)
        if p and not (masks and work.mask is masks[-1]):
            masks.append(draw(x, p, width) if work.mask is None else work.mask)
        told = work.on_mix is not None and b.heads > 0
        found.append(Member(b.scale / (1 - p), b.heads, b.r, len(masks) - 1, told, b.top))
        tensors.append(
            Parts(
                weight,
                None if weight is None else other,
                other if weight is None else None,
                b.down,
                b.up,
                b.route,
                b.mix,
            )
        )
    return Plan(tuple(found), len(masks), p, triton_runs(x.device, x.dtype)), masks, tensors


def _tell(works: Sequence[Work], omegas: Sequence[Tensor]) -> None:
    """Hand ω of the routed members to those who listen, in order."""
    listeners = [work.on_mix for work in works if work.on_mix is not None and work.factors.router is not None]
    for tell, omega in zip(listeners, omegas, strict=True):
        tell(omega)


Read = Callable[[Tensor, bool], Tensor]
"""M [rows, in] → x Mᵀ [..., rows] in the dtype of y; with True, of x through dropout."""


def _scored(y: Tensor, x: Tensor, work: Work) -> Tensor:
    """`add_low_rank` with gates per part of the batch (`Factors.keep`), left to autograd: scores may ask for their gradient."""
    x_dropped = dropped(x, work.dropout, work.mask) if work.dropout else x

    def read(matrix: Tensor, through_dropout: bool) -> Tensor:
        return F.linear(x_dropped if through_dropout else x, like(matrix, x))

    return add_read(y, read, work)


def add_read(y: Tensor, read: Read, work: Work, groups: int = 1) -> Tensor:
    """y + h B̃ᵀ where only `read` knows how x is multiplied with a matrix, left to autograd.

    Of an embedding x is the one-hot row of a token, of a convolution the patch at every position (`weftlora.adapted.reading`).
    One dropout mask serves all heads.

    Args:
        groups: of how many parts of x that are read one by one, so that `read` gives [..., groups, rows], each part of y takes the
            one of its own.
    """
    f = work.factors
    u = read(joined([f.A, *(s.down for s in f.extra)], 0), True)
    lead, u = u.shape[:-1], u.flatten(0, -2)
    keeps = [f.keep, *(s.keep for s in f.extra)]
    seen = [
        by_part(t, keep) for t, keep in zip(u.split([len(f.A), *(len(s.down) for s in f.extra)], 1), keeps, strict=True)
    ]
    b = branch(f, u.device, work.dropout > 0)
    h = torch.cat(seen, 1) if f.extra else seen[0]
    if f.router is not None:
        if f.router_input == "x":
            logits = read(f.router, False).flatten(0, -2)
        else:
            plain = seen[0] if not work.dropout else by_part(read(f.A, False).flatten(0, -2), f.keep)
            logits = F.linear(plain, like(f.router, plain))
        omega = softmax(logits)
        if work.on_mix is not None:
            work.on_mix(omega.view(*lead, omega.shape[1]))
        h = mixture(h, used(omega, b.top), b.r)
    with without_autocast(y):
        up, h = like(b.up, y), h.to(y.dtype)
        if groups == 1:
            return torch.addmm(y.reshape(-1, y.shape[-1]), h, up.T, alpha=b.scale).view(y.shape)
        own, up = y.reshape(-1, groups, y.shape[-1] // groups).transpose(0, 1), up.unflatten(0, (groups, -1))
        h = h.view(own.shape[1], groups, -1).transpose(0, 1)
        return torch.baddbmm(own, h, up.mT, alpha=b.scale).transpose(0, 1).reshape(y.shape)
