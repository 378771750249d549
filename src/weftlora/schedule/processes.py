"""What several processes must do as one: fail, agree on numbers, and hold the same masks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from weftlora.errors import WeftError

T = TypeVar("T")


def world() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world() > 1 else 0


def fail(failure: Exception | None, what: str, device: torch.device) -> None:
    """Raise on all processes if one of them failed: the others would wait for it for ever. All must call it."""
    if world() > 1:
        failures = torch.tensor(int(failure is not None), device=device)
        dist.all_reduce(failures)
        if failure is None and int(failures):
            raise WeftError(f"{what} failed on another process: its own error says why.")
    if failure is not None:
        raise failure


def attempt(measure: Callable[[], T], what: str, device: torch.device) -> T:
    """What this process measures; if it failed on one of them, an error on all. All must call it."""
    failure: Exception | None = None
    try:
        found = measure()
    except Exception as error:
        failure = error
    fail(failure, what, device)
    return found


def from_main(values: Tensor, device: torch.device) -> Tensor:
    """The main process' `values`, on the CPU; shapes may differ before, not in their number of axes."""
    if world() == 1:
        return values
    shape = torch.tensor(values.shape, device=device)
    dist.broadcast(shape, 0)
    there = values.to(device) if rank() == 0 else torch.empty(shape.tolist(), dtype=values.dtype, device=device)
    dist.broadcast(there, 0)
    return there.cpu()


def sum_up(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Add up, in place, over all processes, which then hold the same bytes; one message per dtype."""
    if world() == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.detach().reshape(-1).to(device) for t in same])
        dist.all_reduce(flat)
        for t, value in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(value.view_as(t))


def take_over(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Copy, in place, what the main process has to all others; shapes are the same on all."""
    if world() == 1:
        return
    for t in tensors:
        value = t.detach().to(device).contiguous()
        dist.broadcast(value, 0)
        with torch.no_grad():
            t.copy_(value)


def gathered(value: Tensor, device: torch.device) -> list[Tensor]:
    """The `value` of every process in the order of their ranks, on the CPU; shapes are the same on all."""
    if world() == 1:
        return [value.cpu()]
    there = value.to(device)
    found = [torch.empty_like(there) for _ in range(world())]
    dist.all_gather(found, there)
    return [each.cpu() for each in found]


def check_same(tensors: Iterable[Tensor], what: str, device: torch.device) -> None:
    """Raise `WeftError` on all processes unless `tensors` have the same bytes on all of them."""
    if world() == 1:
        return
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    mine = torch.tensor(int.from_bytes(found.digest()[:7], "big"), device=device)
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if int(lowest) != int(highest):
        raise WeftError(
            f"{what} differ between the processes: start all of them from the same checkpoint, the same base and the same rows."
        )
