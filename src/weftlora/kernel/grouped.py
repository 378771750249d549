"""The equation for a batch of sites, each with tokens of its own: the experts of a layer.

    x [S, in]        the tokens of expert 0, then those of expert 1, ...       ends [E]: where those of each end
    u = drop(x) A_eᵀ,  h = f(u),  y += s · h B̃_eᵀ       e: whose token it is; A [E, R, in], B̃ [E, out, M]

What f is has nothing to do with experts, so it is that of `weftlora.kernel.factors`; the two products are grouped ones, one call for
all experts. A factor that all experts share has no axis of experts and is multiplied with all tokens at once. Nothing of size
E × out × in is made or kept, forward or backward; kept are x (once per product that trains what reads it), the bits of
a mask, u and h.

torch's own grouped product is taken where it has one for the dtype and the widths, else a loop over the experts. Where the Triton
kernels run, products with factors are theirs, with a table of which expert each token has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from weftlora.kernel.dropout import draw, is_counted, masked
from weftlora.kernel.equation import reference
from weftlora.kernel.factors import Factors, Slots, Work, branch, mixture, softmax, used, without_autocast
from weftlora.kernel.node import fast_width
from weftlora.kernel.switches import current, triton_runs

if TYPE_CHECKING:
    from weftlora.kernel.triton.launches import Drop, Table


@dataclass(frozen=True)
class Grouping:
    """Whose each of S tokens is, in the order of the experts.

    `part`: of tokens that are K equal parts of a batch, the number of each token's part (`Factors.keep`); None outside of scoring.
    """

    ends: Tensor  # [E] int32
    expert: Tensor  # [S] int64, ascending
    part: Tensor | None = None  # [S] int64

    def slices(self) -> list[slice]:
        """Where each expert's tokens are."""
        ends = self.ends.tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


_NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def _native(t: Tensor, *widths: int) -> bool:
    """Whether torch's grouped product takes this dtype and these widths: rows that begin at multiples of 16 bytes."""
    if not hasattr(F, "grouped_mm") or t.dtype not in _NATIVE or t.device.type not in ("cpu", "cuda"):
        return False
    if t.device.type == "cuda" and torch.cuda.get_device_capability(t.device) < (8, 0):
        return False
    return all(width * t.element_size() % 16 == 0 for width in widths)


def _rows(x: Tensor, m: Tensor, ends: Tensor) -> Tensor:
    """x [S, k] times m_e [E, k, o] of each token's expert, or m [k, o] of all: [S, o]."""
    if m.dim() == 2:
        return x @ m
    if _native(x, x.shape[1], m.shape[2]):
        return F.grouped_mm(x.contiguous(), m, offs=ends)
    out, start = x.new_empty(x.shape[0], m.shape[2]), 0
    for one, end in zip(m, ends.tolist(), strict=True):
        if end > start:
            torch.mm(x[start:end], one, out=out[start:end])
        start = end
    return out


def _outer(g: Tensor, x: Tensor, ends: Tensor, shared: bool) -> Tensor:
    """Σ g ⊗ x over the tokens of each expert, [E, a, b] of g [S, a] and x [S, b]; over all, [a, b], where `shared`."""
    if shared:
        return g.T @ x
    if _native(x, g.shape[1], x.shape[1]):
        return F.grouped_mm(g.contiguous().T, x.contiguous(), offs=ends)
    out, start = x.new_zeros(len(ends), g.shape[1], x.shape[1]), 0
    for one, end in zip(out, ends.tolist(), strict=True):
        if end > start:
            torch.mm(g[start:end].T, x[start:end], out=one)
        start = end
    return out


def _table(x: Tensor, grouping: Grouping) -> Table | None:
    """The table of the Triton kernels, where they compute with x; torch.compile does not see them here."""
    if torch.compiler.is_compiling() or not triton_runs(x.device, x.dtype):
        return None
    from weftlora.kernel.triton.launches import table_of

    return table_of(grouping.expert, len(grouping.ends))


def _through(x: Tensor, bits: Tensor | None, p: float) -> tuple[Tensor, Drop | None]:
    """What a kernel reads of x: x and a mask that it makes itself, or x through a mask that was drawn otherwise."""
    from weftlora.kernel.triton.launches import Drop

    if bits is None or is_counted(bits):
        return x, None if bits is None else Drop(int(bits), p)
    return masked(x, bits, p), None


class _Read(Function):
    """x̂ M_eᵀ [S, rows] of x [S, in], M [E, rows, in] or [rows, in]; apply(x, M, ends, bits of a mask or None, p, table or None)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, m: Tensor, ends: Tensor, bits: Tensor | None, p: float, table: Table | None
    ) -> Tensor:
        ctx.p, ctx.table = p, table
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, m, ends, bits)
        if table is not None:
            from weftlora.kernel.triton import launches

            x, drop = _through(x, bits, p)
            return launches.read(x, m, drop, table if m.dim() == 3 else None)
        x = x if bits is None else masked(x, bits, p)
        return _rows(x, m.to(x.dtype).transpose(-2, -1), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, m, ends, bits = ctx.saved_tensors
        if ctx.table is not None:
            return (*_read_backward(ctx, g), None, None, None, None)
        gx = gm = None
        if ctx.needs_input_grad[0]:
            gx = _rows(g, m.to(g.dtype), ends)
            gx = gx if bits is None else masked(gx, bits, ctx.p)
        if ctx.needs_input_grad[1]:
            x = x if bits is None else masked(x, bits, ctx.p)
            gm = _outer(g, x, ends, m.dim() == 2).to(m.dtype)
        return gx, gm, None, None, None, None


def _read_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and M of `_Read`, by the kernels."""
    from weftlora.kernel.triton import launches

    x, m, _, bits = ctx.saved_tensors
    table = ctx.table if m.dim() == 3 else None
    gx = gm = None
    if ctx.needs_input_grad[0]:
        gx = g.new_zeros(g.shape[0], m.shape[-1])
        _, drop = _through(gx, bits, ctx.p)
        gx = launches.write(gx, g, m.transpose(-2, -1), 1.0, drop, table, into=True)
        gx = gx if bits is None or drop is not None else masked(gx, bits, ctx.p)
    if ctx.needs_input_grad[1]:
        x, drop = _through(x, bits, ctx.p)
        gm = launches.rows_backward(g, x, m.dtype, drop, table)
    return gx, gm


class _Write(Function):
    """y + s · h M_eᵀ, into y [S, out] itself; apply(y, h [S, M], M [E, out, M] or [out, M], ends, s, table or None)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, m: Tensor, ends: Tensor, scale: float, table: Table | None) -> Tensor:
        ctx.scale, ctx.dtype, ctx.table = scale, m.dtype, table
        ctx.mark_dirty(y)
        if table is not None:
            from weftlora.kernel.triton import launches

            ctx.save_for_backward(h, m, ends)
            written = launches.write(y, h, m, scale, None, table if m.dim() == 3 else None, into=True)
            return y if written is y else y.copy_(written)
        m_t = (
            m.to(h.dtype).transpose(-2, -1).contiguous()
        )  # so both products that read it are fast (measured: docs/lab-log.md)
        ctx.save_for_backward(h, m_t, ends)
        return y.add_(_rows(h, m_t, ends), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, m_t, ends = ctx.saved_tensors
        gh = gm = None
        g_h = g.to(h.dtype)
        if ctx.table is not None:
            from weftlora.kernel.triton import launches

            gh, gm = launches.write_backward(g_h, h, m_t, ctx.scale, ctx.table if m_t.dim() == 3 else None)
            return g, gh, gm, None, None, None
        if ctx.needs_input_grad[1]:
            gh = _rows(g_h, m_t.transpose(-2, -1), ends).mul_(ctx.scale)
        if ctx.needs_input_grad[2]:
            gm = _outer(h, g_h, ends, m_t.dim() == 2).mul_(ctx.scale).transpose(-2, -1).to(ctx.dtype)
        return g, gh, gm, None, None, None


def grouped_linear(x: Tensor, weight: Tensor, grouping: Grouping, bias: Tensor | None = None) -> Tensor:
    """x W_eᵀ + b_e of each token's expert: a fresh [S, out] of x [S, in], W [E, out, in] (a transposed view will do), b [E, out]."""
    y = cast(Tensor, _Read.apply(x, weight, grouping.ends, None, 0.0, None))
    return y if bias is None else y.add_(bias.to(y.dtype)[grouping.expert])


def read_by_table(x: Tensor, m: Tensor, table: Table) -> Tensor:
    """x M_eᵀ [t, rows] of x [t, in] and M [E, rows, in] by the Triton kernels, with the derivatives; the table may be in any order."""
    return cast(Tensor, _Read.apply(x, m, table.runs, None, 0.0, table))


def _padded(m: Tensor, x: Tensor, dim: int) -> Tensor:
    """M with zeros along its axis of slots up to a width that grouped products take, 16 bytes, and in 16 bits are fast in."""
    unit = 16 // x.element_size()
    narrow = x.dtype in (torch.float32, torch.float64) or x.device.type != "cpu"
    width = -(-m.shape[dim] // unit) * unit if narrow else fast_width(m.shape[dim], x)
    missing = width - m.shape[dim]
    return m if not missing else F.pad(m, (0, missing) if dim == -1 else (0, 0, 0, missing))


def add_grouped(y: Tensor, x: Tensor, work: Work, grouping: Grouping) -> Tensor:
    """y + h B̃_eᵀ: the base's output y [S, out] plus the update of x [S, in] by the site of each token's expert; y is written to.

    The factors of `work` have an axis of experts first, but for what all of them share.
    """
    if current().reference or work.plain:
        return _by_expert(y, x, work, grouping)
    p, ends = work.dropout, grouping.ends
    f = work.factors
    b = branch(f, x.device, p > 0)
    bits = None if not p else draw(x, p) if work.mask is None else work.mask
    table = _table(x, grouping)
    down = _padded(b.down, x, -2)
    u = cast(Tensor, _Read.apply(x, down, ends, bits, p, table))
    if work.scored:
        u = _kept(u, f, grouping, b.down.shape[-2])
    h = u
    if b.heads:
        if b.route is not None:
            rows = b.route.shape[-2]
            q = cast(Tensor, _Read.apply(x, _padded(b.route, x, -2), ends, None, 0.0, table))[:, :rows]
        else:
            q = u[:, : b.r]
        if b.mix is not None:
            heads = b.mix.shape[-2]
            mix = _padded(_padded(b.mix, x, -2), x, -1)
            q = cast(Tensor, _Read.apply(F.pad(q, (0, mix.shape[-1] - q.shape[1])), mix, ends, None, 0.0, table))[
                :, :heads
            ]
        omega = softmax(q)
        if work.on_mix is not None:
            work.on_mix(omega)
        h = mixture(u[:, : b.down.shape[-2]], used(omega, b.top), b.r)
    up = _padded(b.up, x, -1)
    h = F.pad(h, (0, up.shape[-1] - h.shape[1])) if h.shape[1] != up.shape[-1] else h
    return cast(Tensor, _Write.apply(y, h.to(y.dtype), up, ends, b.scale / (1 - p), table))


def _kept(u: Tensor, f: Factors, grouping: Grouping, width: int) -> Tensor:
    """u with every slot scaled as the part of the batch that its token is in has it (`Factors.keep`, here [E, K, slots])."""
    keeps, at = [f.keep, *(slots.keep for slots in f.extra)], 0
    sizes = [f.A.shape[-2], *(slots.down.shape[-2] for slots in f.extra)]
    scaled = []
    for keep, size in zip(keeps, sizes, strict=True):
        part, at = u[:, at : at + size], at + size
        if keep is not None:
            assert grouping.part is not None
            part = part * keep.to(u)[grouping.expert, grouping.part]
        scaled.append(part)
    return torch.cat([*scaled, u[:, width:]], 1)


def _by_expert(y: Tensor, x: Tensor, work: Work, grouping: Grouping) -> Tensor:
    """The same by the equation as it is written, for every token with the factors of each expert, of which its own is taken."""
    bits = work.mask if work.mask is not None or not work.dropout or work.plain else draw(x, work.dropout)
    own = [
        reference(x, replace(work, factors=of_expert(work.factors, e, grouping.part), mask=bits))[tokens]
        for e, tokens in enumerate(grouping.slices())
    ]
    return y + torch.cat(own).to(y.dtype)


def of_expert(f: Factors, e: int, part: Tensor | None = None) -> Factors:
    """The factors of one expert, without the axis of experts; `part` as in `Grouping`: gates are then those of each token."""

    def one(t: Tensor | None, own: int) -> Tensor | None:
        return t if t is None or t.dim() == own else t[e]

    def kept(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[e] if part is None else t[e][part]

    extra = tuple(
        Slots(cast(Tensor, one(s.down, 2)), cast(Tensor, one(s.up, 2)), cast(Tensor, one(s.gate, 1)), kept(s.keep))
        for s in f.extra
    )
    return replace(
        f,
        A=cast(Tensor, one(f.A, 2)),
        B=cast(Tensor, one(f.B, 2)),
        gate=one(f.gate, 1),
        v=one(f.v, 1),
        router=one(f.router, 2),
        extra=extra,
        keep=kept(f.keep),
    )


def delta_weights(f: Factors, experts: int) -> Tensor:
    """ΔW [E, out, in] of an unrouted batch in fp32 (fp64 if the factors are), with autograd's derivatives."""
    b = branch(f, f.A.device, False)
    dtype = torch.promote_types(f.A.dtype, torch.float32)
    with without_autocast(b.up):
        delta = (b.up.to(dtype) * b.scale) @ b.down.to(dtype)
    return delta if delta.dim() == 3 else delta.expand(experts, *delta.shape)
