"""How the kernels are launched: outputs, blocks, grids. Importing this imports triton.

Blocks follow from shapes alone. Where there are too few programs for a GPU the sum is cut into parts, side by side in fp32 and added
afterwards, which keeps results the same every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from weftlora.kernel.philox import ROUNDS, WORD, threshold
from weftlora.kernel.switches import INTERPRETED
from weftlora.kernel.triton import kernels

PROGRAMS = 264
"""How many programs are wanted at least: two for each of the 132 processors of an H100 or H200."""
_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Drop(NamedTuple):
    """A counted mask: its seed and the probability that an element is dropped."""

    seed: int
    p: float


class Table(NamedTuple):
    """Which adapter each of t tokens has, in the form that kernels take. Made by `table_of`.

    `order` [t]: the tokens, those of adapter 0 first. `tiles` [count, 3] int64: adapter and ends in `order` of runs of at most `chunk`
    tokens; some are empty. `runs` [E, 3]: of each adapter all of its tokens.
    """

    order: Tensor
    tiles: Tensor
    runs: Tensor
    chunk: int


def table_of(adapter: Tensor, adapters: int, chunk: int = 64) -> Table:
    """The table of a batch whose token t has the adapter number adapter[t]. No number goes from the device to the host."""
    order = adapter.argsort(stable=True)
    counts = torch.zeros(adapters, dtype=torch.int64, device=adapter.device)
    counts.scatter_add_(0, adapter.long(), torch.ones_like(adapter, dtype=torch.int64))
    ends = counts.cumsum(0)
    tiles_until = ((counts + chunk - 1) // chunk).cumsum(0)
    tile = torch.arange(-(-adapter.numel() // chunk) + adapters, device=adapter.device)  # no fewer than there are
    owner = torch.searchsorted(tiles_until, tile, right=True).clamp_(max=adapters - 1)
    before = torch.where(owner > 0, tiles_until[(owner - 1).clamp_(min=0)], 0)
    first = ends[owner] - counts[owner] + (tile - before) * chunk
    last = torch.minimum(first + chunk, ends[owner])
    each = torch.arange(adapters, device=adapter.device)
    return Table(order, torch.stack([owner, first, last], 1), torch.stack([each, ends - counts, ends], 1), chunk)


def masked_by_count(x: Tensor, seed: int, p: float) -> Tensor:
    """x [..., in] with the elements 0 that the mask drops; a new tensor."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        grid = triton.cdiv(flat.shape[0], 32), triton.cdiv(flat.shape[1], 128)
        how = {"ROUNDS": ROUNDS, "BT": 32, "BI": 128}
        _launch(kernels.masked_kernel, grid, flat, out, *flat.shape, *flat.stride(), *_drop(Drop(seed, p)), **how)
    return out.view(x.shape)


def read(x: Tensor, rows: Tensor, drop: Drop | None = None, table: Table | None = None) -> Tensor:
    """x̂ rowsᵀ [t, R] in x's dtype, of x [t, in] and rows [R, in], or [E, R, in] with a table."""
    (tokens, width), slots = x.shape, rows.shape[-2]
    if not tokens * width * slots:
        return x.new_zeros(tokens, slots)
    bt, br, bi = (64 if table is None else table.chunk), _block(slots, 64), 64
    high, blocks = _programs(tokens, bt, table), triton.cdiv(slots, br)
    share = _share(width, high * blocks, least=128, unit=bi)
    parts = triton.cdiv(width, share)
    out = _parts(parts, (tokens, slots), x.dtype, x)
    _launch(
        kernels.read_kernel, (high, blocks, parts), x, rows, out, *_table(table, x), tokens, width, slots,
        *x.stride(), _adapter_stride(rows, table), *rows.stride()[-2:], out.stride(0), bt, share, *_drop(drop),
        **_common(x, table, drop), BT=bt, BR=br, BI=bi,
    )  # fmt: skip
    return _added(out, x.dtype)


def write(
    base: Tensor,
    h: Tensor,
    up: Tensor,
    scale: float,
    drop: Drop | None = None,
    table: Table | None = None,
    into: bool = False,
) -> Tensor:
    """base + scale · h upᵀ [t, out] in base's dtype, of h [t, R] and up [out, R], or [E, out, R] with a table.

    Args:
        drop: what of the product is dropped before it is added.
        into: write into `base` where its rows have no gaps, instead of a new tensor.
    """
    (tokens, width), slots = base.shape, up.shape[-1]
    out = (
        base if into and base.stride() == (width, 1) else torch.empty_like(base, memory_format=torch.contiguous_format)
    )
    if not tokens * width:
        return out
    bt, bo = (64 if table is None else table.chunk), _block(width, 128)
    _launch(
        kernels.write_kernel, (_programs(tokens, bt, table), triton.cdiv(width, bo)), base, h, up, out,
        *_table(table, base), tokens, width, slots, float(scale), *base.stride(), *h.stride(), _adapter_stride(up, table),
        *up.stride()[-2:], out.stride(0), bt, *_drop(drop),
        **_common(h, table, drop), BT=bt, BO=bo, BR=_block(slots, 64),
    )  # fmt: skip
    return out


FUSED = {"128x128": (128, 128, 64, 8, 3), "128x256": (128, 256, 64, 8, 3), "64x128": (64, 128, 64, 4, 4)}
"""Blocks of `linear`: tokens, out, in; warps and stages."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, up: Tensor, scale: float, blocks: str = "64x128"
) -> Tensor:
    """x Wᵀ + b + scale · h upᵀ [t, out] in x's dtype, summed in one place."""
    (tokens, inner), width, slots = x.shape, weight.shape[0], up.shape[-1]
    out = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    bt, bo, bi, warps, stages = FUSED[blocks]
    if x.dtype == torch.float32:
        bi //= 2
    grid = (triton.cdiv(tokens, bt) * triton.cdiv(width, bo),)
    more = {} if INTERPRETED else {"num_warps": warps, "num_stages": stages}
    _launch(
        kernels.linear_kernel, grid, x, weight, x if bias is None else bias, h, up, out, tokens, width, inner, slots,
        float(scale), *x.stride(), *weight.stride(), 1 if bias is None else bias.stride(0),
        *h.stride(), *up.stride(), BIAS=bias is not None, **_dot(x),
        BT=bt, BO=bo, BI=bi, BR=_block(slots, 64), GROUP=8, **more,
    )  # fmt: skip
    return out


def mix(u: Tensor, omega: Tensor, rank: int, top: int | None) -> Tensor:
    """h [t, N·r + E] in u's dtype, of u [t, r + E] and ω [t, N] in fp32."""
    (tokens, wide), heads = u.shape, omega.shape[1]
    extra = wide - rank
    h = torch.empty(tokens, heads * rank + extra, dtype=u.dtype, device=u.device)
    if tokens:
        grid = triton.cdiv(tokens, 32), heads + bool(extra)
        _launch(
            kernels.mix_kernel, grid, u, omega, h, tokens, rank, heads, extra, top or heads, *u.stride(),
            *omega.stride(), h.stride(0), TOP=top is not None, BT=32, BN=_power(heads), BR=_block(rank, 64),
        )  # fmt: skip
    return h


def mix_backward(
    gh: Tensor, gomega: Tensor | None, u: Tensor, omega: Tensor, rank: int, top: int | None
) -> tuple[Tensor, Tensor]:
    """Gradients of u and of the logits [t, N], both in u's dtype; gomega [t, N] is what came to ω from elsewhere."""
    (tokens, wide), heads = u.shape, omega.shape[1]
    gu, glogits = torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(tokens, heads)
    if tokens:
        told = omega if gomega is None else gomega
        _launch(
            kernels.mix_backward_kernel, (triton.cdiv(tokens, 32),), gh, told, u, omega, gu, glogits, tokens, rank,
            heads, wide - rank, top or heads, *gh.stride(), *told.stride(), *u.stride(), *omega.stride(), gu.stride(0),
            TOP=top is not None, TOLD=gomega is not None, BT=32, BN=_power(heads), BR=_block(rank, 64),
        )  # fmt: skip
    return gu, glogits


def write_backward(g: Tensor, h: Tensor, up: Tensor, scale: float, table: Table | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of h [t, R], in h's dtype, and of up, in its own, given that of the output, g [t, out]."""
    (tokens, width), slots = g.shape, up.shape[-1]
    if not tokens * width * slots:
        return h.new_zeros(tokens, slots), torch.zeros_like(up)
    bt, br = 64, _block(slots, 64)
    bo = _block(width, 256 if g.element_size() == 2 and br <= 32 else 128)  # the wider, the fewer parts of gh
    blocks, across = triton.cdiv(width, bo), triton.cdiv(slots, br)
    chunk = _share(tokens, blocks * across, least=2 * bt, unit=bt)
    runs = triton.cdiv(tokens, chunk) if table is None else len(table.runs)
    gh = _parts(blocks, (tokens, slots), h.dtype, h)
    gup = _parts(runs, (width, slots), up.dtype, up)
    _launch(
        kernels.write_backward_kernel, (blocks, runs, across), g, h, up, gh, gup, *_runs(table, g), tokens, width,
        slots, float(scale), *g.stride(), *h.stride(), _adapter_stride(up, table), *up.stride()[-2:], gh.stride(0),
        gup.stride(0), chunk, **_common(h, table), BT=bt, BO=bo, BR=br,
    )  # fmt: skip
    return _added(gh, h.dtype), gup.to(up.dtype) if table is not None else _added(gup, up.dtype)


def rows_backward(
    gu: Tensor, x: Tensor, dtype: torch.dtype, drop: Drop | None = None, table: Table | None = None
) -> Tensor:
    """Gradient of the rows [R, in], or [E, R, in] with a table, in `dtype`: guᵀ x̂ of gu [t, R] and x [t, in]."""
    (tokens, width), slots = x.shape, gu.shape[1]
    adapters = () if table is None else (len(table.runs),)
    if not tokens * width * slots:
        return torch.zeros(*adapters, slots, width, dtype=dtype, device=x.device)
    bt, br, bi = 64, _block(slots, 64), _block(width, 128)
    blocks, across = triton.cdiv(width, bi), triton.cdiv(slots, br)
    chunk = _share(tokens, blocks * across, least=2 * bt, unit=bt)
    runs = triton.cdiv(tokens, chunk) if table is None else len(table.runs)
    grows = _parts(runs, (slots, width), dtype, x)
    _launch(
        kernels.rows_backward_kernel, (blocks, runs, across), gu, x, grows, *_runs(table, x), tokens, width, slots,
        *gu.stride(), *x.stride(), grows.stride(0), chunk, *_drop(drop), **_common(x, table, drop), BT=bt, BR=br, BI=bi,
    )  # fmt: skip
    return grows.to(dtype) if table is not None else _added(grows, dtype)


# ---------------------------------------------------------------------- what launches share


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **how: Any) -> None:
    """On the device of the first argument, which need not be the current one. Where a block and its next ones have no room side by
    side in shared memory (of smaller GPUs, in fp32), one after the other."""
    with torch.cuda.device_of(args[0]):
        try:
            kernel[grid](*args, **how)
        except OutOfResources:
            kernel[grid](*args, **how | {"num_stages": 1})


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def _block(n: int, most: int) -> int:
    """A block along an axis of n: a power of two, as few as 16, which is what a matrix product takes."""
    return max(16, min(_power(n), most))


def _programs(tokens: int, chunk: int, table: Table | None) -> int:
    return triton.cdiv(tokens, chunk) if table is None else len(table.tiles)


def _share(length: int, programs: int, least: int, unit: int) -> int:
    """How much of an axis one program adds up, a multiple of `unit`, so that there are enough of them."""
    parts = max(1, min(-(-PROGRAMS // programs), length // least))
    return -(-length // parts // unit) * unit if length % parts == 0 else (length // parts // unit + 1) * unit


def _parts(parts: int, shape: tuple[int, int], dtype: torch.dtype, x: Tensor) -> Tensor:
    """Room for that many parts of a sum: in the dtype of the result where there is one."""
    return torch.empty(parts, *shape, dtype=dtype if parts == 1 else torch.float32, device=x.device)


def _added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)


def _table(table: Table | None, x: Tensor) -> tuple[Tensor, Tensor]:
    return (x, x) if table is None else (table.tiles, table.order)


def _runs(table: Table | None, x: Tensor) -> tuple[Tensor, Tensor]:
    return (x, x) if table is None else (table.runs, table.order)


def _adapter_stride(factor: Tensor, table: Table | None) -> int:
    """From one adapter's factor to the next; 0 where all tokens have the same."""
    return factor.stride(0) if table is not None and factor.dim() == 3 else 0


def _drop(drop: Drop | None) -> tuple[int, int, int]:
    """The two halves of the key and the threshold, as numbers that are int32 to Triton whatever they are."""
    if drop is None:
        return 0, 0, 0
    return _signed(drop.seed % WORD), _signed(drop.seed // WORD), _signed(threshold(drop.p))


def _signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word


def _dot(x: Tensor) -> dict[str, Any]:
    """What products are computed in. The interpreter's product of bfloat16 is wrong without a word, so there it is fp32."""
    exact = x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return {"DOT": tl.float32 if INTERPRETED else _DOT[x.dtype], "PRECISION": "ieee" if exact else "tf32"}


def _common(x: Tensor, table: Table | None, drop: Drop | bool | None = False) -> dict[str, Any]:
    """The constants of a kernel with a table; `drop` where it knows of dropout."""
    more = {} if drop is False else {"DROPOUT": drop is not None, "ROUNDS": ROUNDS}
    return {"TABLE": table is not None, **_dot(x), **more}
