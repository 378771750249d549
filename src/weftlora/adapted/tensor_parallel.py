"""A base that several processes compute together, each with a slice of W, and the update that follows its slice.

    column parallel    W, y split along out    u = x Aᵀ on every process;  y_p += h B̃_pᵀ        gradients of u, g added up
    row parallel       W, x split along in     u = Σ_p x_p A_pᵀ, added up;  y += h B̃ᵀ            on every process

What crosses processes is as wide as the rank, [tokens, R], once forward or once backward; nothing of size in or out does. The
adapter's parameters stay whole and the same on all processes, as do an optimiser's moments, so what is decided about slots and
directions, saved and loaded is as in one process; a forward cuts its slice of each letter that has the base's axis
(`weftlora.kernel.AXES`), and the slice's gradient is added up.

The base is one of torch's `parallelize_module` (ColwiseParallel, RowwiseParallel, with their default layouts): its weight is a DTensor
in the forward too. Dropout has to draw the same on all processes of a column parallel base: seed them alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from weftlora.errors import ConfigError
from weftlora.kernel import AXES, Factors, Slots, Work, add_read
from weftlora.kernel.dropout import dropped


@dataclass(frozen=True)
class Slice:
    """Which part of W this process computes with: `size` rows (along out) or columns (along in) from `start` on."""

    along: Literal["in", "out"]
    start: int
    size: int
    group: Any
    processes: int


def slice_of(base: nn.Module) -> Slice | None:
    """The slice of a base that is split in the forward too; None where this process computes all of it.

    Raises:
        ConfigError: it is split in another way than along in or out.
    """
    weight: Any = getattr(base, "weight", None)
    if type(base) is not nn.Linear or not hasattr(weight, "placements"):
        return None
    mesh, placements = weight.device_mesh, weight.placements
    dims = [n for n, placement in enumerate(placements) if not placement.is_replicate()]
    if len(dims) != 1 or not placements[dims[0]].is_shard() or placements[dims[0]].dim not in (0, 1):
        raise ConfigError(
            f"a base whose weight is split as {placements} cannot be adapted: use ColwiseParallel or RowwiseParallel for it, or leave "
            "it out of target_modules."
        )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    axis = placements[dims[0]].dim
    size, start = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    return Slice("out" if axis == 0 else "in", start[axis], size[axis], mesh.get_group(dims[0]), mesh.size(dims[0]))


def add(x: Tensor, y: Tensor, work: Work, cut: Slice) -> Tensor:
    """The base's output y as this process has it, with the update of x.

    Raises:
        ConfigError: x or y are not split as the base's default layouts have them.
    """
    f = _cut_factors(work.factors, cut)
    wide = {"in": x.shape[-1], "out": y.shape[-1]}[cut.along]
    if x.shape[:-1] != y.shape[:-1] or wide != cut.size:
        raise ConfigError(
            f"an input {list(x.shape)} and an output {list(y.shape)} of a base split along {cut.along} into {cut.size} are not "
            "those of ColwiseParallel or RowwiseParallel with their default layouts (sequence parallel inputs are not supported)."
        )
    x_dropped = dropped(x, work.dropout, work.mask) if work.dropout else x
    through = _Copied if cut.along == "out" else _Summed

    def read(matrix: Tensor, through_dropout: bool) -> Tensor:
        seen = F.linear(x_dropped if through_dropout else x, matrix.to(x))
        return cast(Tensor, through.apply(seen, cut.group))

    listener = work.on_mix
    if listener is not None and cut.along == "out":
        tell, share = (
            listener,
            1 / cut.processes,
        )  # every process adds the same to the gradient of ω, which is then added up
        listener = lambda omega: tell(omega.detach() + share * (omega - omega.detach()))  # noqa: E731
    return add_read(y, read, replace(work, factors=f, on_mix=listener))


def _cut_factors(f: Factors, cut: Slice) -> Factors:
    """The letters that a process with this slice computes with."""
    own: dict[str, Any] = {}
    for name, axes in AXES.items():
        value = getattr(f, name)
        if value is None:
            continue
        axes = axes[:1] if value.dim() == 1 else axes
        if cut.along in axes and value.shape[axes.index(cut.along)] != cut.size:
            own[name] = _Cut.apply(value, axes.index(cut.along), cut)
        elif cut.along == "out" and name == "gate":
            own[name] = _Copied.apply(value, cut.group)
    return replace(f, **own, extra=tuple(_cut_slots(slots, cut) for slots in f.extra))


def _cut_slots(slots: Slots, cut: Slice) -> Slots:
    if cut.along == "in":
        return slots._replace(down=slots.down.narrow(1, cut.start, cut.size))
    up = slots.up.narrow(0, cut.start, cut.size)
    return slots._replace(up=up, gate=_Copied.apply(slots.gate, cut.group))


class _Copied(torch.autograd.Function):
    """The same; its gradient, of which every process has a part, added up."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _added_up(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum over processes; its gradient is the same on all."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        return _added_up(t, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Cut(torch.autograd.Function):
    """A slice; the gradient is that of the whole, put together of all processes' slices."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, axis: int, cut: Slice) -> Tensor:
        ctx.shape, ctx.axis, ctx.cut = t.shape, axis, cut
        return t.narrow(axis, cut.start, cut.size).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        found = gradient.new_zeros(ctx.shape)
        found.narrow(ctx.axis, ctx.cut.start, ctx.cut.size).copy_(gradient)
        dist.all_reduce(found, group=ctx.cut.group)
        return found, None, None


def _added_up(t: Tensor, group: Any) -> Tensor:
    summed = t.contiguous().clone()
    dist.all_reduce(summed, group=group)
    return summed
