"""Tensors of which every process holds a part: read whole, changed whole, gathered on one process.

    FSDP2      a parameter is a DTensor outside the forward of its unit, split along some axis; inside it is a plain tensor
    FSDP1      with use_orig_params=True a parameter is a flat piece, possibly empty, of its unit's flat parameter
    otherwise  every process holds all of it

Nothing here reads what DeepSpeed's ZeRO splits: a schedule refuses it (`is_deepspeeds`).

How a tensor is split is the wrapper's affair and is read from the tensor. A change is made to the whole, and each process keeps its
part of the result, which is exact under any split: a rank slot is a row of A and a column of B, wherever their rows lie.

Whole on every process are only an adapter's own, small tensors. W is whole on one process at a time, and nowhere else (`on_one`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from weftlora.kernel import Factors


def carrier(device: torch.device) -> torch.device:
    """Where messages between processes lie: `device`, if the process group serves it (offloaded parameters are on the CPU)."""
    served = dist.get_backend_config() if dist.is_available() and dist.is_initialized() else ""
    if device.type == "cpu" and "cpu:" not in served and "cuda:" in served:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_shard(t: Tensor | None) -> bool:
    """Whether `t` is split among processes: what it holds is a part, and reading all of it takes all of them."""
    return t is not None and (_is_dtensor(t) or is_piece(t))


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of `module` is split among processes, as it is now."""
    return any(is_shard(p) for p in module.parameters())


def has_own_rows(module: nn.Module) -> bool:
    """Whether a forward of `module`, which takes all processes, computes the rows that each of them gives: all have a part or a copy
    of its parameters. Where a base is split in the forward, parameters are whole, and all processes compute the same rows."""
    split = [p for p in module.parameters() if is_shard(p)]
    return bool(split) and all(_holders(p) == dist.get_world_size() for p in split)


def _holders(t: Tensor) -> int:
    """How many processes hold a part or a copy of `t`."""
    return cast(int, cast(Any, t).device_mesh.size()) if _is_dtensor(t) else dist.get_world_size(_piece_of(t).group)


def _is_dtensor(t: Tensor) -> bool:
    return type(t) is not Tensor and hasattr(t, "full_tensor")


def is_piece(t: Tensor) -> bool:
    """Whether `t` is a parameter that FSDP1 has split."""
    return isinstance(t, nn.Parameter) and hasattr(t, "_fsdp_flattened")


def is_deepspeeds(t: Tensor, optimizer: torch.optim.Optimizer | None = None) -> bool:
    """Whether DeepSpeed's ZeRO has taken `t` over, whose optimiser then holds other tensors; `optimizer`: and whether it is that one.

    In stages 1 and 2 a parameter knows its piece of a tensor that the optimiser holds; stage 3 does not say which optimiser it is.
    """
    piece = getattr(getattr(t, "_hp_mapping", None), "hp_fragment", None)
    if optimizer is None:
        return piece is not None or hasattr(t, "ds_id")
    held = (p for group in optimizer.param_groups for p in group["params"])
    return piece is not None and any(_memory(p) == _memory(piece) for p in held)


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def is_split_as(t: Tensor, parameter: Tensor) -> bool:
    """Whether `t` has a number for each of `parameter`'s, on the process where that is."""
    if _is_dtensor(parameter) and _is_dtensor(t):
        return t.shape == parameter.shape and cast(Any, t).placements == cast(Any, parameter).placements
    return type(t) is Tensor and not _is_dtensor(parameter) and t.shape == parameter.shape


@torch.no_grad()
def full(t: Tensor) -> Tensor:
    """All of `t`, on every process; `t` itself, detached, where it is not split. All processes must call it."""
    return _layout(t).joined(t) if is_shard(t) else t.detach()


@torch.no_grad()
def put(t: Tensor, value: Tensor) -> None:
    """Give `t` these values, of which each process keeps its part."""
    if is_shard(t):
        _local(t).copy_(_layout(t).part(value))
    else:
        t.copy_(value)


def number(t: Tensor) -> float:
    """The one number of a tensor without axes, such as a sum over a tensor that is split. All processes must call it."""
    return float(cast(Any, t).full_tensor() if _is_dtensor(t) else t)


@contextmanager
def edited(t: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """All of `t`, to be changed in place inside the block. All processes must enter it together and do the same.

    `like` is the parameter that `t` says something of, such as a moment, and is split as.
    """
    of = t if like is None else like
    if not is_shard(of):
        yield t.detach()
        return
    layout = _layout(of)
    with torch.no_grad():
        value = layout.joined(t)
        yield value
        _local(t).copy_(layout.part(value))


def outermost(model: nn.Module) -> nn.Module:
    """What has to be called to run `model`: the FSDP1 unit around it, which gathers what no unit inside does; else itself."""
    if not any(is_piece(p) for p in model.parameters()):
        return model
    held = _units.get(model)
    if held is None or (unit := held()) is None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        units = [each for each in gc.get_objects() if isinstance(each, FullyShardedDataParallel)]
        unit = next((each for each in units if each.module is model), model)
        _units[model] = weakref.ref(unit)
    return unit


_units: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


@contextmanager
def whole(module: nn.Module) -> Iterator[dict[int, nn.Parameter]]:
    """Every parameter of `module` whole inside the block, what it was changed to in its shards after it.

    All processes must enter it together. Gives, by the id of each stand-in, the parameter that it stands in for.
    """
    held: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None and is_shard(p):
                held.append((owner, name, p, nn.Parameter(full(p), requires_grad=p.requires_grad)))
    try:
        for owner, name, _, stand_in in held:
            owner._parameters[name] = stand_in
        yield {id(stand_in): p for _, _, p, stand_in in held}
    finally:
        for owner, name, p, stand_in in held:
            owner._parameters[name] = p
            put(p, stand_in.detach())


def _local(t: Tensor) -> Tensor:
    """The part of `t` that this process holds, as it is stored."""
    return cast(Tensor, cast(Any, t).to_local()) if _is_dtensor(t) else t.detach()


# ---------------------------------------------------------------------- how a tensor is split


Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Of one process: the size of its part and where that begins, along each axis."""


class Layout(Protocol):
    """How the whole of a tensor and the part of this process belong together."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        ...

    @property
    def axes(self) -> tuple[int, ...]:
        """The shape that places are in: that of the tensor, or its number of elements where it is split flat."""
        ...

    @property
    def place(self) -> Place:
        """The part of this process."""
        ...

    def joined(self, t: Tensor) -> Tensor:
        """All of a tensor that is split like this; a collective."""
        ...

    def part(self, value: Tensor) -> Tensor:
        """What this process holds of `value`."""
        ...


def _layout(t: Tensor) -> Layout:
    return _Blocks(cast(Any, t)) if _is_dtensor(t) else _piece_of(t)


class _Blocks:
    """A DTensor, whatever its placements."""

    def __init__(self, t: Any) -> None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        self.shape = self.axes = tuple(t.shape)
        size, at = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
        self.place = tuple(size), tuple(at)

    def joined(self, t: Tensor) -> Tensor:
        """See `Layout`."""
        return cast(Tensor, cast(Any, t.detach()).full_tensor()).clone()  # of a replicated one it is the part itself

    def part(self, value: Tensor) -> Tensor:
        """See `Layout`."""
        return _cut(value, self.place)


@dataclass(frozen=True)
class _Flat:
    """A piece of a tensor's elements, as FSDP1 holds one of every parameter."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    place: Place
    group: Any

    def joined(self, t: Tensor) -> Tensor:
        """See `Layout`."""
        device = carrier(t.device)
        starts = [torch.empty(2, dtype=torch.long, device=device) for _ in range(dist.get_world_size(self.group))]
        (length,), (start,) = self.place
        dist.all_gather(starts, torch.tensor([length, start], device=device), group=self.group)
        places = [tuple(each.tolist()) for each in starts]
        longest = max(length for length, _ in places)
        mine = torch.zeros(longest, dtype=t.dtype, device=device)
        mine[:length] = t.detach().to(device)
        every = [torch.empty_like(mine) for _ in places]
        dist.all_gather(every, mine, group=self.group)
        found = torch.empty(self.axes, dtype=t.dtype, device=t.device)
        for part, (size, at) in zip(every, places, strict=True):
            found[at : at + size] = part[:size].to(found)
        return found.view(self.shape)

    def part(self, value: Tensor) -> Tensor:
        """See `Layout`."""
        return _cut(value.reshape(-1), self.place)


_pieces: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _piece_of(p: Tensor) -> _Flat:
    """How FSDP1 has split `p`; its records are kept by units, which nobody hands out, so they are looked for among the living."""
    if p not in _pieces:
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        for handle in (each for each in gc.get_objects() if type(each) is FlatParamHandle):
            flat = handle.flat_param
            for its, shape, info in zip(flat._params or (), flat._shapes, flat._shard_param_infos, strict=False):
                size, at = (info.numel_in_shard, info.intra_param_start_idx) if info.in_shard else (0, 0)
                place = (int(size or 0),), (int(at or 0),)
                _pieces[its] = _Flat(tuple(shape), (shape.numel(),), place, handle.process_group)
    return cast(_Flat, _pieces[p])


def _cut(value: Tensor, place: Place) -> Tensor:
    for axis, (size, at) in enumerate(zip(*place, strict=True)):
        value = value.narrow(axis, at if size else 0, size)
    return value


# ---------------------------------------------------------------------- in a forward


class _Gathered(torch.autograd.Function):
    """A shard as a whole, in a forward; its gradient is averaged over the processes, as the wrapper averages its own."""

    @staticmethod
    def forward(ctx: Any, t: Any) -> Tensor:
        ctx.mesh, ctx.placements = t.device_mesh, t.placements
        return cast(Tensor, t.full_tensor())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        each = gradient.contiguous() / ctx.mesh.size()
        summed = DTensor.from_local(each, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return summed.redistribute(placements=ctx.placements)


class _GatheredPiece(torch.autograd.Function):
    """The same of a piece. FSDP1 writes the gradients of its units at the end of a backward; this part of one is added after that."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.t = t
        return _piece_of(t).joined(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        piece, t = _piece_of(ctx.t), ctx.t
        there = gradient.to(carrier(gradient.device), torch.promote_types(gradient.dtype, torch.float32)).contiguous()
        dist.all_reduce(there, group=piece.group)
        mine = piece.part(there / dist.get_world_size(piece.group)).to(t)

        def add() -> None:
            if mine.numel():
                t.grad = mine.clone() if t.grad is None else t.grad.add_(mine)

        torch.autograd.Variable._execution_engine.queue_callback(add)


def gathered(f: Factors) -> Factors:
    """These letters with none of them a shard, differentiable: a site that reads another unit's tensors has them whole.

    Inside its own unit a site's tensors are whole anyway, and this costs nothing.
    """
    parts = {name: getattr(f, name) for name in ("A", "B", "gate", "v", "router")}
    split = {
        name: (_Gathered if _is_dtensor(t) else _GatheredPiece).apply(t)
        for name, t in parts.items()
        if t is not None and is_shard(t)
    }
    return replace(f, **split) if split else f


# ---------------------------------------------------------------------- on one process


@torch.no_grad()
def on_one(t: Tensor, process: int) -> Tensor | None:
    """All of the split tensor `t` on that process, None on the others, which send their part. All must call it."""
    layout, local = _layout(t), _local(t).contiguous()
    world, here, device = dist.get_world_size(), dist.get_rank(), carrier(local.device)
    mine = torch.tensor([*layout.place[0], *layout.place[1]], dtype=torch.long, device=device)
    every = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(every, mine)
    n = len(layout.axes)
    places = [(tuple(each[:n].tolist()), tuple(each[n:].tolist())) for each in every]
    givers = _givers(places, process)
    if here != process:
        if givers.get(places[here]) == here:
            dist.send(local.to(device), process)
        return None
    found = torch.empty(layout.axes, dtype=local.dtype, device=local.device)
    for place, giver in givers.items():
        part = local
        if giver != here:
            part = torch.empty(place[0], dtype=local.dtype, device=device)
            dist.recv(part, giver)
        _cut(found, place).copy_(part)
    return found.view(layout.shape)


def _givers(places: Sequence[Place], process: int) -> dict[Place, int]:
    """Who gives each part that has elements: the one that asks, if it has it, else the first that does."""
    givers: dict[Place, int] = {}
    for rank, place in [(process, places[process]), *enumerate(places)]:
        if 0 not in place[0]:
            givers.setdefault(place, rank)
    return givers
