"""The products of the node where they are Triton's: which way each is computed, and what torch.compile sees of them.

A product that torch's own GEMMs can compute has several ways. Which is the fastest is measured once for every shape (tokens to the
next power of two) when it is first met in a process, and kept. Nothing is measured, and torch's way is taken, where times cannot be
read (while a CUDA graph is recorded) and where torch is asked for deterministic algorithms. Of more than `MOST_SLOTS` rank slots the
partial sums of a kernel would be large, and drawing a mask once for every block of them would be slow: then a kernel makes x̂ or
nothing at all, and GEMMs do the rest. With a router there is one way: the kernel.

    read             x̂ rowsᵀ                         kernel (dropout inside), or a GEMM
    linear           x Wᵀ + b + s h B̃ᵀ               one kernel, in three sizes of blocks; GEMM and GEMM; GEMM and `write`
    write            y + s (h B̃ᵀ), through a mask    kernel
    mix, backward    h of u and ω; gradients of both  kernel: mixture, `top` and the softmax's derivative in one
    write_backward   s g B̃ and s gᵀ h                one kernel that reads g once, or two GEMMs
    rows_backward    guᵀ x̂                            kernel (dropout inside), or a GEMM

Under torch.compile each is an opaque op of torch.library with a fake implementation. Nothing here imports triton until a kernel is
launched.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from weftlora.kernel.triton.launches import Drop

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])
MOST_SLOTS = 64
"""Above it a product of rank slots is a GEMM large enough for torch's own."""
ways_taken: dict[tuple[object, ...], str] = {}
"""What was measured to be the fastest way, by product and shape."""


def read(x: Tensor, rows: Sequence[Tensor], mask: Tensor | None, p: float) -> Tensor:
    """x̂ rowsᵀ [t, R] of x [t, in], in its dtype; x̂ is x, or x through a counted mask."""
    return _call(_read, "triton_read", x, below(rows), mask, p)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, up: Tensor, scale: float) -> Tensor:
    """x Wᵀ + b + scale · h upᵀ [t, out], in x's dtype."""
    return _call(_linear, "triton_linear", x, weight, bias, h, up, scale)


def write(
    base: Tensor, h: Tensor, up: Tensor, scale: float, mask: Tensor | None = None, p: float = 0.0, into: bool = False
) -> Tensor:
    """base + scale · (h upᵀ) [t, out] in base's dtype; with a mask, the product through it.

    A new tensor, or, with `into` and where torch.compile does not look on, base itself.
    """
    if into and not torch.compiler.is_compiling():
        return _write(base, h, up, scale, mask, p, into)
    return _call(_write_anew, "triton_write", base, h, up, scale, mask, p)


def mix(u: Tensor, omega: Tensor, rank: int, top: int | None) -> Tensor:
    """h [t, N·r + E] of u [t, r + E] and ω [t, N], as `weftlora.kernel.factors.mixture` of ω⁺."""
    return _call(_mix, "triton_mix", u, omega, rank, top)


def mix_backward(
    gh: Tensor, gomega: Tensor | None, u: Tensor, omega: Tensor, rank: int, top: int | None
) -> tuple[Tensor, Tensor]:
    """Gradients of u and of the logits, as `weftlora.kernel.factors.mixture_backward`."""
    return cast("tuple[Tensor, Tensor]", _call(_mix_backward, "triton_mix_backward", gh, gomega, u, omega, rank, top))


def write_backward(g: Tensor, h: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of h, in its dtype, and of up, in its own, given that of the output, g [t, out]."""
    return cast("tuple[Tensor, Tensor]", _call(_write_backward, "triton_write_backward", g, h, up, scale))


def rows_backward(gu: Tensor, x: Tensor, dtype: torch.dtype, mask: Tensor | None, p: float) -> Tensor:
    """Gradient of the rows [R, in] in `dtype`, of gu [t, R] and x [t, in]."""
    return _call(_rows_backward, "triton_rows_backward", gu, x, dtype, mask, p)


def _call(function: Callable[..., Any], op: str, *given: object) -> Any:
    return getattr(torch.ops.weftlora, op)(*given) if torch.compiler.is_compiling() else function(*given)


def below(rows: Sequence[Tensor]) -> Tensor:
    """The rows below one another, in the widest of their dtypes: kernels cast them as they read."""
    if len(rows) == 1:
        return rows[0]
    dtype = rows[0].dtype
    for t in rows:
        dtype = torch.promote_types(dtype, t.dtype)
    return torch.cat([t.to(dtype) for t in rows])


# ---------------------------------------------------------------------- ways


def fastest(name: str, x: Tensor, shape: tuple[object, ...], ways: dict[str, Callable[[], Result]]) -> Result:
    """What the fastest of the ways gives; they are in the order of preference where nothing can be measured, torch's own first.

    In the interpreter, whose times mean nothing, the last way is taken: a kernel.
    """
    if x.device.type != "cuda":
        return ways[list(ways)[-1]]()
    key = (name, x.device.index, x.dtype, 1 << max(x.shape[0] - 1, 0).bit_length(), *shape)
    way = ways_taken.get(key)
    if way is None:
        if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
            return next(iter(ways.values()))()
        way = ways_taken[key] = _measured(ways)
    return ways[way]()


def _measured(ways: dict[str, Callable[[], Result]]) -> str:
    """The way of the least median of five runs, after two that compile and warm up."""
    times: dict[str, float] = {}
    for name, way in ways.items():
        way(), way()
        taken = []
        for _ in range(5):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            way()
            ended.record()
            ended.synchronize()
            taken.append(began.elapsed_time(ended))
        times[name] = statistics.median(taken)
    return min(times, key=times.__getitem__)


def _through(mask: Tensor | None, p: float) -> Drop | None:
    from weftlora.kernel.triton.launches import Drop

    return None if mask is None else Drop(int(mask), p)


def _many(slots: int, x: Tensor) -> bool:
    return slots > MOST_SLOTS and x.device.type == "cuda"


def _read(x: Tensor, rows: Tensor, mask: Tensor | None, p: float) -> Tensor:
    from weftlora.kernel.triton import launches

    drop = _through(mask, p)
    if drop is not None:
        if not _many(rows.shape[0], x):
            return launches.read(x, rows, drop)
        x = launches.masked_by_count(x, *drop)
    ways = {"gemm": lambda: F.linear(x, rows.to(x.dtype)), "kernel": lambda: launches.read(x, rows)}
    return fastest("read", x, (x.shape[1], rows.shape[0]), ways)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, up: Tensor, scale: float) -> Tensor:
    from weftlora.kernel.triton import launches

    def base() -> Tensor:
        return F.linear(x, weight, bias)

    ways: dict[str, Callable[[], Tensor]] = {
        "gemms": lambda: base().addmm_(h, up.to(x.dtype).T, alpha=scale),
        "gemm, kernel": lambda: launches.write(base(), h, up, scale, into=True),
    }
    for blocks in launches.FUSED:
        ways[blocks] = lambda blocks=blocks: launches.linear(x, weight, bias, h, up, scale, blocks)  # type: ignore[misc]
    return fastest("linear", x, (*weight.shape, weight.stride(1) == 1, up.shape[1], bias is None), ways)


def _write(base: Tensor, h: Tensor, up: Tensor, scale: float, mask: Tensor | None, p: float, into: bool) -> Tensor:
    from weftlora.kernel.triton import launches

    return launches.write(base, h, up, scale, _through(mask, p), into=into)


def _write_anew(base: Tensor, h: Tensor, up: Tensor, scale: float, mask: Tensor | None, p: float) -> Tensor:
    return _write(base, h, up, scale, mask, p, False)


def _mix(u: Tensor, omega: Tensor, rank: int, top: int | None) -> Tensor:
    from weftlora.kernel.triton import launches

    return launches.mix(u, omega, rank, top)


def _mix_backward(
    gh: Tensor, gomega: Tensor | None, u: Tensor, omega: Tensor, rank: int, top: int | None
) -> tuple[Tensor, Tensor]:
    from weftlora.kernel.triton import launches

    return launches.mix_backward(gh, gomega, u, omega, rank, top)


def _write_backward(g: Tensor, h: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from weftlora.kernel.triton import launches

    def gemms() -> tuple[Tensor, Tensor]:
        gh = torch.addmm(h.new_empty(1), g, up.to(g.dtype), beta=0, alpha=scale)
        return gh, torch.addmm(g.new_empty(1), g.T, h, beta=0, alpha=scale).to(up.dtype)

    ways = {"gemms": gemms, "kernel": lambda: launches.write_backward(g, h, up, scale)}
    if _many(up.shape[1], g):
        return gemms()
    return fastest("write_backward", g, tuple(up.shape), ways)


def _rows_backward(gu: Tensor, x: Tensor, dtype: torch.dtype, mask: Tensor | None, p: float) -> Tensor:
    from weftlora.kernel.triton import launches

    drop = _through(mask, p)
    if drop is not None:
        if not _many(gu.shape[1], x):
            return launches.rows_backward(gu, x, dtype, drop)
        x = launches.masked_by_count(x, *drop)
    ways = {"gemm": lambda: (gu.T @ x).to(dtype), "kernel": lambda: launches.rows_backward(gu, x, dtype)}
    return fastest("rows_backward", x, (x.shape[1], gu.shape[1]), ways)


# ---------------------------------------------------------------------- what torch.compile sees


def _opaque(function: Callable[..., Any], op: str, fake: Callable[..., Any]) -> None:
    torch.library.custom_op(f"weftlora::{op}", function, mutates_args=()).register_fake(fake)


def _dense(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


_opaque(_read, "triton_read", lambda x, rows, mask, p: x.new_empty(x.shape[0], rows.shape[0]))
_opaque(_linear, "triton_linear", lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]))
_opaque(_write_anew, "triton_write", lambda base, *_: _dense(base))
_opaque(
    _mix,
    "triton_mix",
    lambda u, omega, rank, top: u.new_empty(u.shape[0], omega.shape[1] * rank + u.shape[1] - rank),
)
_opaque(
    _mix_backward,
    "triton_mix_backward",
    lambda gh, gomega, u, omega, rank, top: (_dense(u), u.new_empty(omega.shape)),
)
_opaque(_write_backward, "triton_write_backward", lambda g, h, up, scale: (_dense(h), _dense(up)))
_opaque(
    _rows_backward,
    "triton_rows_backward",
    lambda gu, x, dtype, mask, p: x.new_empty(gu.shape[1], x.shape[1], dtype=dtype),
)
