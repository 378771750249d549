"""Small products in the shapes that GEMMs are fast in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
