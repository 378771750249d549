"""The equation for a batch whose rows name their adapters, with one launch per product for all of them.

    u = x Ã_eᵀ,  h = f_e(u),  y + h B̃_eᵀ        e: the adapter of the row that a token is in; a row of none has factors of zeros

Ã and B̃ of all adapters lie one behind the other, with rows and columns of zeros up to the widest, and their scales in B̃; the kernels
find those of a token in a table (`weftlora.kernel.triton.launches.table_of`). What f is may differ from adapter to adapter, so routed
rows go through theirs adapter by adapter, in rank space, where little is moved.

Without the Triton kernels there is no such product, and whoever calls goes adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from weftlora.kernel.factors import Branch, Work, branch, mixture, softmax, used, without_autocast
from weftlora.kernel.grouped import read_by_table
from weftlora.kernel.switches import current, triton_runs

if TYPE_CHECKING:
    from weftlora.kernel.triton.launches import Table


def add_by_row(y: Tensor, x: Tensor, works: Iterable[Work], of_row: tuple[int, ...]) -> Tensor | None:
    """y [rows, ..., out] + h B̃ᵀ of x [rows, ..., in], every row by its own adapter; y is not written to, and the result has its dtype.

    None where the kernels cannot do it: they are off or torch.compile looks on, an adapter drops elements, has gates per part of the
    batch or is left to the reference.

    Args:
        works: of each adapter that is named; asked for where the kernels are on.
        of_row: for every row the number of its adapter among `works`, or len(works) where it has none.
    """
    if current().reference or torch.compiler.is_compiling() or not triton_runs(x.device, x.dtype):
        return None
    works = list(works)
    if not x.numel() or any(work.plain or work.scored or work.dropout for work in works):
        return None
    each = x.shape[:-1].numel() // len(of_row)
    with without_autocast(x):
        table = _table_of(of_row, each, len(works) + 1, x.device, torch.is_inference_mode_enabled())
        branches = [branch(work.factors, x.device, False) for work in works]
        flat = x.reshape(-1, x.shape[-1])
        u, q = read_by_table(flat, _stacked([b.down for b in branches]), table), None
        if any(b.route is not None for b in branches):
            q = read_by_table(flat, _stacked([b.down[:0] if b.route is None else b.route for b in branches]), table)
        h = _mixed(u, q, branches, works, of_row, x.shape)
        scales = {b.scale for b in branches}
        scale = scales.pop() if len(scales) == 1 else 1.0
        up = _stacked([b.up if b.scale == scale else b.up.float() * b.scale for b in branches])
        return cast(Tensor, _Write.apply(y.reshape(-1, y.shape[-1]), h, up, scale, table)).view(y.shape)


def _mixed(
    u: Tensor,
    q: Tensor | None,
    branches: Sequence[Branch],
    works: Sequence[Work],
    of_row: tuple[int, ...],
    shape: torch.Size,
) -> Tensor:
    """h [t, M] of u [t, R]: as it is, and of rows whose adapter has a router through its mixture."""
    h = F.pad(u, (0, max(b.up.shape[-1] for b in branches) - u.shape[1]))
    by_row = h.view(len(of_row), -1, h.shape[1])
    for number, (b, work) in enumerate(zip(branches, works, strict=True)):
        if not b.heads:
            continue
        rows = torch.tensor([row for row, own in enumerate(of_row) if own == number], device=u.device)
        u_e = u.view(len(of_row), -1, u.shape[1])[rows][..., : b.down.shape[-2]].flatten(0, 1)
        if q is not None and b.route is not None:
            logits = q.view(len(of_row), -1, q.shape[1])[rows][..., : b.heads].flatten(0, 1)
        else:
            logits = F.linear(u_e[:, : b.r], cast(Tensor, b.mix).to(u.dtype))
        omega = softmax(logits)
        if work.on_mix is not None:
            work.on_mix(omega.view(len(rows), *shape[1:-1], b.heads))
        h_e = mixture(u_e, used(omega, b.top), b.r)
        h_e = F.pad(h_e, (0, h.shape[1] - h_e.shape[1]))
        by_row = by_row.index_copy(0, rows, h_e.view(len(rows), -1, h.shape[1]))
    return by_row.reshape(h.shape)


def _stacked(each: Sequence[Tensor]) -> Tensor:
    """The matrices of all adapters and zeros for none, [E + 1, a, b], padded to the largest and in the widest dtype."""
    high, wide = max(m.shape[0] for m in each), max(m.shape[1] for m in each)
    dtype = each[0].dtype
    for m in each:
        dtype = torch.promote_types(dtype, m.dtype)
    padded = [F.pad(m.to(dtype), (0, wide - m.shape[1], 0, high - m.shape[0])) for m in each]
    return torch.stack([*padded, torch.zeros_like(padded[0])])


@lru_cache(maxsize=4)
def _table_of(of_row: tuple[int, ...], each: int, adapters: int, device: torch.device, _inference: bool) -> Table:
    """The table of a batch whose rows have `each` tokens, which layers share. What is made in inference mode stays there."""
    from weftlora.kernel.triton.launches import table_of

    return table_of(torch.tensor(of_row, device=device).repeat_interleave(each), adapters)


class _Write(Function):
    """y + s · h M_eᵀ, a new tensor; apply(y [t, out], h [t, M], M [E, out, M], s, table)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, m: Tensor, scale: float, table: Table) -> Tensor:
        from weftlora.kernel.triton import launches

        ctx.scale, ctx.table = scale, table
        ctx.save_for_backward(h, m)
        return launches.write(y, h, m, scale, None, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        from weftlora.kernel.triton import launches

        h, m = ctx.saved_tensors
        gh, gm = launches.write_backward(g.to(h.dtype), h, m, ctx.scale, ctx.table)
        return g, gh, gm, None, None
