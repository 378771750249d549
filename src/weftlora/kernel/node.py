"""The one autograd node: linears that read one input, each with its low-rank update, forward and backward by hand.

    forward     u = x̂ Ãᵀ (one GEMM for all members that read x through the same mask)
                y = x Wᵀ + b;  y += s · f(u) B̃ᵀ
    backward    gh = s · g B̃,  gB̃ = s · (hᵀ g)ᵀ,  gu = f'(gh),  gÃ = guᵀ x̂,  gx = Σ g W + gu Ã (⊙ mask)

Saved are x once, the masks' bits and u; nothing of size tokens × out, no dropped copy of x, no cast one. Small factors
are cast to x's dtype inside, W only under autocast. Where another module computes x Wᵀ + b, its output takes the place of W.

A plan holds what of the linears is no tensor. Autograd takes and saves their tensors in one flat row: `flat` makes it, `split` and
`latents_of` read it. Small products are brought into the shapes that GEMMs are fast in.

Where a plan says `triton`, the products are those of `weftlora.kernel.triton`, and nothing is padded or cast before: dropout, the
mixture of heads and casts happen inside them.

The backward is no formula of differentiable steps: a second one raises (`once_differentiable`). What needs it uses
`weftlora.kernel.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from weftlora.kernel.dropout import is_counted, masked
from weftlora.kernel.factors import mixture, mixture_backward, softmax, used, without_autocast
from weftlora.kernel.triton import products


class Member(NamedTuple):
    """What of one linear is no tensor. `mask`: which mask its slots read x through, -1 for x itself."""

    scale: float  # 1/(1 − p) of its mask included
    heads: int
    r: int
    mask: int
    told: bool  # whether ω is handed out
    top: int | None = None  # how many heads every token uses; None is all


class Parts(NamedTuple):
    """The tensors of one linear: either `weight` [out, in] and `bias`, or `base` [..., out], the output it is added to."""

    weight: Tensor | None
    bias: Tensor | None
    base: Tensor | None
    down: Tensor
    up: Tensor
    route: Tensor | None
    mix: Tensor | None


class Plan(NamedTuple):
    """A node's members and masks; p is the masks' probability. `triton`: whose its products are, in the backward as in the forward."""

    members: tuple[Member, ...]
    masks: int
    p: float
    triton: bool = False


class Latents(NamedTuple):
    """What one member reads: u [t, R'] (padded) and, routed, ω [t, N] and, where the router reads through mix, q."""

    u: Tensor
    q: Tensor | None
    omega: Tensor | None


def split(tensors: Sequence[Tensor | None]) -> list[Parts]:
    """The flat tensors of a node, member by member."""
    n = len(Parts._fields)
    return [Parts(*tensors[i : i + n]) for i in range(0, len(tensors), n)]  # type: ignore[arg-type]


def flat(each: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """All tensors, one member after the other."""
    return [t for own in each for t in own]


def latents_of(tensors: Sequence[Tensor]) -> list[Latents]:
    """The flat latents of a node, member by member."""
    n = len(Latents._fields)
    return [Latents(*tensors[i : i + n]) for i in range(0, len(tensors), n)]


def spread(members: Sequence[Member], told: Sequence[Tensor | None]) -> list[Tensor | None]:
    """ω's gradients by member, None for those whose ω was not handed out."""
    given = iter(told)
    return [next(given) if m.told else None for m in members]


def scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b, without a pass of its own for the scale."""
    return a @ b if scale == 1.0 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def fast_width(n: int, t: Tensor) -> int:
    """Columns to compute with where n are needed: this CPU's GEMMs are slower with fewer than 16 columns, and in 16-bit
    dtypes with other numbers than multiples of 16 (measured: docs/lab-log.md)."""
    if t.device.type != "cpu" or t.dtype == torch.float64:
        return n
    unit = 8 if t.dtype == torch.float32 and n > 16 else 16
    return -(-n // unit) * unit


def padded_rows(t: Tensor, x: Tensor) -> Tensor:
    """t [R, in] with zero rows up to a fast width, in its own dtype."""
    missing = fast_width(t.shape[0], x) - t.shape[0]
    return F.pad(t, (0, 0, 0, missing)) if missing else t


def padded_columns(t: Tensor, width: int, x: Tensor) -> Tensor:
    """t [out, M] with zero columns up to `width`, in x's dtype."""
    t = t.to(x.dtype)
    return F.pad(t, (0, width - t.shape[1])) if t.shape[1] < width else t


def stacked(rows: Sequence[Tensor], x: Tensor) -> Tensor:
    """The rows below one another in x's dtype, with zero rows up to a fast width."""
    whole = rows[0].to(x.dtype) if len(rows) == 1 else torch.cat([t.to(x.dtype) for t in rows])
    return padded_rows(whole, x)


def side_by_side(columns: Sequence[Tensor], width: int) -> Tensor:
    """The gradients [t, k] beside one another, with zero columns up to `width`."""
    whole = columns[0] if len(columns) == 1 else torch.cat(list(columns), 1)
    return F.pad(whole, (0, width - whole.shape[1])) if whole.shape[1] < width else whole


def taken_apart(whole: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """The blocks of these sizes along `dim`, without the padding behind them."""
    return whole.split_with_sizes([*sizes, whole.shape[dim] - sum(sizes)], dim)[:-1]


class Reading(NamedTuple):
    """One input of the rows: its mask (-1: x itself), what was read of it, as a gradient [t, R], and the rows [R, in]."""

    source: int
    gu: Tensor
    rows: Tensor


def run(x: Tensor, plan: Plan, masks: Sequence[Tensor], tensors: Sequence[Parts]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs [..., out] of all members, and ω [..., N] of those that are told."""
    with without_autocast(x):
        found = LowRankLinears.apply(plan, x, *masks, *(t for each in tensors for t in each))
    n = len(plan.members)
    return list(found[:n]), [omega.view(*x.shape[:-1], omega.shape[1]) for omega in found[n:]]


class LowRankLinears(Function):
    """See the module; apply(plan, x, *masks, *tensors of each member) → (*outputs, *told ω)."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        masks, each = cast("tuple[Tensor, ...]", tensors[: plan.masks]), split(tensors[plan.masks :])
        x_ti = x.reshape(-1, x.shape[-1])
        latents = read(x_ti, plan, each, masks)
        outputs = [
            shaped(up(plan, m, own, x_ti, seen), x) for m, own, seen in zip(plan.members, each, latents, strict=True)
        ]
        told = [cast(Tensor, seen.omega) for m, seen in zip(plan.members, latents, strict=True) if m.told]
        ctx.plan = plan
        kept = [own._replace(base=None) for own in each]
        ctx.save_for_backward(x, *masks, *flat(kept), *flat(latents))
        ctx.set_materialize_grads(False)
        return (*outputs, *told)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x, *rest = ctx.saved_tensors
        n = len(plan.members)
        masks, rest = rest[: plan.masks], rest[plan.masks :]
        each, seen = split(rest[: n * len(Parts._fields)]), rest[n * len(Parts._fields) :]
        latents = latents_of(seen)
        with without_autocast(x):
            gx, found = backward(
                x, plan, each, masks, latents, grads[:n], spread(plan.members, grads[n:]), ctx.needs_input_grad[1]
            )
        return (None, gx, *[None] * plan.masks, *flat(found))


# ---------------------------------------------------------------------- forward


def read(x: Tensor, plan: Plan, each: Sequence[Parts], masks: Sequence[Tensor]) -> list[Latents]:
    """What every member's slots and router read of x [t, in]: one GEMM per distinct input."""
    rows, sources = _rows(plan, each, x)
    found: list[Tensor] = [x] * len(rows)
    for source in sorted(set(sources)):
        own = [i for i, s in enumerate(sources) if s == source]
        if plan.triton:
            x_s, mask = _source(x, source, masks, plan.p)
            u = products.read(x_s, [rows[i] for i in own], mask, plan.p)
        else:
            x_s = x if source < 0 else masked(x, masks[source], plan.p)
            u = F.linear(x_s, stacked([rows[i] for i in own], x))
        for i, part in zip(own, taken_apart(u, [rows[i].shape[0] for i in own], 1), strict=True):
            found[i] = part
    return _latents(plan, each, found)


def _source(x: Tensor, source: int, masks: Sequence[Tensor], p: float) -> tuple[Tensor, Tensor | None]:
    """What a kernel reads: x and a mask that it makes itself, or, of a mask that was drawn otherwise, x through it and none."""
    if source < 0:
        return x, None
    return (x, masks[source]) if is_counted(masks[source]) else (masked(x, masks[source], p), None)


def _rows(plan: Plan, each: Sequence[Parts], x: Tensor) -> tuple[list[Tensor], list[int]]:
    """Rows [k, in] that read x, and for each block the mask it reads through."""
    rows: list[Tensor] = []
    sources: list[int] = []
    for m, own in zip(plan.members, each, strict=True):
        rows.append(own.down if m.heads or plan.triton else padded_rows(own.down, x))
        sources.append(m.mask)
        if own.route is not None:
            rows.append(own.route)
            sources.append(-1)
    return rows, sources


def _latents(plan: Plan, each: Sequence[Parts], found: Sequence[Tensor]) -> list[Latents]:
    given = iter(found)
    latents = []
    for m, own in zip(plan.members, each, strict=True):
        u = next(given)
        q = next(given) if own.route is not None else u[:, : m.r]
        if not m.heads:
            latents.append(Latents(u, None, None))
        elif own.mix is None:
            latents.append(Latents(u, None, softmax(q)))
        else:
            latents.append(Latents(u, q, softmax(F.linear(q, own.mix.to(q.dtype)))))
    return latents


def gated(plan: Plan, m: Member, seen: Latents) -> Tensor:
    """h of one member, as many columns as GEMMs are fast in."""
    if seen.omega is None:
        return seen.u
    if plan.triton:
        return products.mix(seen.u, seen.omega, m.r, m.top)
    h = mixture(seen.u, used(seen.omega, m.top), m.r)
    return F.pad(h, (0, fast_width(h.shape[1], h) - h.shape[1]))


def up(plan: Plan, m: Member, own: Parts, x: Tensor, seen: Latents) -> Tensor:
    """x Wᵀ + b + s h B̃ᵀ [t, out] of x [t, in]; the sum is formed in place unless another module's output is added to."""
    h = gated(plan, m, seen)
    if own.base is not None:
        y = own.base.reshape(-1, own.base.shape[-1])
        if plan.triton and y.dtype == h.dtype:
            return products.write(y, h, own.up, m.scale)
        columns = padded_columns(own.up, h.shape[1], x).T
        return torch.addmm(y, h.to(y.dtype), columns.to(y.dtype), alpha=m.scale)
    weight = cast(Tensor, own.weight).to(x.dtype)
    bias = None if own.bias is None else own.bias.to(x.dtype)
    if plan.triton:
        return products.linear(x, weight, bias, h, own.up, m.scale)
    return F.linear(x, weight, bias).addmm_(h, padded_columns(own.up, h.shape[1], x).T, alpha=m.scale)


def shaped(y: Tensor, like: Tensor) -> Tensor:
    """y [t, out] with the leading axes of `like`; no view in autograd's eyes, so that a model may write into it."""
    return cast(Tensor, torch.ops.aten._unsafe_view(y, [*like.shape[:-1], y.shape[-1]]))


# ---------------------------------------------------------------------- backward


def backward(
    x: Tensor,
    plan: Plan,
    each: Sequence[Parts],
    masks: Sequence[Tensor],
    latents: Sequence[Latents],
    grads: Sequence[Tensor | None],
    gomegas: Sequence[Tensor | None],
    needs_x: bool,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x [..., in] and of every member's `Parts`, given those of the outputs and of ω.

    What is narrow comes first, while the outputs' gradients are in the cache: after the GEMMs with W they are not.
    """
    found: list[list[Tensor | None]] = []
    through: list[Tensor | None] = []
    for m, own, seen, g, gomega in zip(plan.members, each, latents, grads, gomegas, strict=True):
        g_to = None if g is None else g.reshape(-1, g.shape[-1])
        gu, gq, gmix, gup = member_backward(plan, m, own, seen, g_to, gomega, x)
        found.append([None, None, g if own.weight is None else None, None, gup, None, gmix])
        through += [gu] if own.route is None else [gu, gq]
    reads, grows = read_backward(x.reshape(-1, x.shape[-1]), plan, each, masks, through)
    given = iter(grows)
    for own, gradients in zip(each, found, strict=True):
        gradients[3] = _cut(next(given), own.down)
        if own.route is not None:
            gradients[5] = _cut(next(given), own.route)
    gx = input_backward(x, plan, each, masks, grads, reads) if needs_x else None
    return gx, found


def member_backward(
    plan: Plan, m: Member, own: Parts, seen: Latents, g: Tensor | None, gomega: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of u, q, mix and up of one member, given that of its output, g [t, out], and of ω."""
    if g is None and gomega is None:
        return None, None, None, None
    gh = gup = None
    if g is not None:
        h = gated(plan, m, seen)
        g = g.to(x.dtype)
        if plan.triton:
            gh, gup = products.write_backward(g, h, own.up, m.scale)
        else:
            gh = scaled(g, padded_columns(own.up, h.shape[1], x), m.scale)
            gup = scaled(h.T, g, m.scale)[: own.up.shape[1]].T.to(own.up.dtype)  # hᵀ g: gᵀ h takes longer
    if seen.omega is None:
        return gh, None, None, gup
    through = products.mix_backward if plan.triton and gh is not None else mixture_backward
    gu, glogits = through(gh, gomega, seen.u, seen.omega, m.r, m.top)  # type: ignore[arg-type]
    if own.mix is None or seen.q is None:
        return gu, glogits, None, gup
    gq = glogits @ own.mix.to(glogits.dtype)
    if own.route is None:
        gu[:, : m.r] += gq
    return gu, gq, (glogits.T @ seen.q).to(own.mix.dtype), gup


def read_backward(
    x: Tensor,
    plan: Plan,
    each: Sequence[Parts],
    masks: Sequence[Tensor],
    through: Sequence[Tensor | None],
) -> tuple[list[Reading], list[Tensor | None]]:
    """What was read of x [t, in], per distinct input, and the gradients of the rows, given those of what they read."""
    rows, sources = _rows(plan, each, x)
    reads: list[Reading] = []
    found: list[Tensor | None] = [None] * len(rows)
    for source in sorted(set(sources)):
        own = [i for i, s in enumerate(sources) if s == source and through[i] is not None]
        if not own:
            continue
        given = [cast(Tensor, through[i]) for i in own]
        if plan.triton:
            matrix = products.below([rows[i] for i in own])
            gu = side_by_side(given, matrix.shape[0])
            x_s, mask = _source(x, source, masks, plan.p)
            grows = products.rows_backward(gu, x_s, matrix.dtype, mask, plan.p)
        else:
            matrix = stacked([rows[i] for i in own], x)
            gu = side_by_side(given, matrix.shape[0])
            x_s = x if source < 0 else masked(x, masks[source], plan.p)
            grows = gu.T @ x_s
        for i, part in zip(own, taken_apart(grows, [rows[i].shape[0] for i in own], 0), strict=True):
            found[i] = part
        reads.append(Reading(source, gu, matrix))
    return reads, found


def input_backward(
    x: Tensor,
    plan: Plan,
    each: Sequence[Parts],
    masks: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    reads: Sequence[Reading],
) -> Tensor | None:
    """The gradient of x [..., in]: through every W, and through the rows that read it."""
    if plan.triton:
        return _input_by_kernels(x, plan, each, masks, grads, reads)
    gx: Tensor | None = None
    for own, g in zip(each, grads, strict=True):
        if g is not None and own.weight is not None:
            g_to, weight = g.reshape(-1, g.shape[-1]), own.weight.to(x.dtype)
            gx = g_to @ weight if gx is None else gx.addmm_(g_to, weight)
    for source, gu, matrix in reads:
        if source >= 0:
            share = masked(gu @ matrix, masks[source], plan.p)
            gx = share if gx is None else gx.add_(share)
        else:
            gx = gu @ matrix if gx is None else gx.addmm_(gu, matrix)
    return None if gx is None else gx.view(x.shape)


def _input_by_kernels(
    x: Tensor,
    plan: Plan,
    each: Sequence[Parts],
    masks: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    reads: Sequence[Reading],
) -> Tensor | None:
    """`input_backward` with the last product through a W in one with what was read of x itself."""
    gx: Tensor | None = None
    bases = [
        (g.reshape(-1, g.shape[-1]), own.weight.to(x.dtype))
        for own, g in zip(each, grads, strict=True)
        if g is not None and own.weight is not None
    ]
    rest = list(reads)
    if len(bases) == 1:
        [(g, weight)] = bases
        direct = [of for of in rest if of.source < 0]
        if direct:
            gx = products.linear(g, weight.T, None, direct[0].gu, direct[0].rows.T, 1.0)
            rest.remove(direct[0])
        else:
            gx = g @ weight
    else:
        for g, weight in bases:
            gx = g @ weight if gx is None else gx.addmm_(g, weight)
    for source, gu, matrix in rest:
        mask = None if source < 0 else masks[source]
        if mask is not None and not is_counted(mask):
            share = masked(gu @ matrix.to(gu.dtype), mask, plan.p)
            gx = share if gx is None else gx.add_(share)
        else:
            gx = x.new_zeros(x.shape).reshape(-1, x.shape[-1]) if gx is None else gx
            gx = products.write(gx, gu, matrix.T, 1.0, mask, plan.p, into=True)
    return None if gx is None else gx.view(x.shape)


def _cut(gradient: Tensor | None, own: Tensor) -> Tensor | None:
    """A gradient of padded rows as that of the rows themselves."""
    return None if gradient is None else gradient[: own.shape[0]].to(own.dtype)
