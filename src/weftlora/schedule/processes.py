"""What several processes must do as one: fail, agree on numbers, and hold the same masks.

Everything here is called by all of them. Where one has failed, all fail with what it said, before anybody waits for it. In a lockstep,
where what is measured is itself made of collectives (a forward of a sharded model), nobody can be told by a collective: the one that
fails leaves word in the store of the process group and ends, which ends what the others wait for, and these find the word.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from weftlora.adapter.shards import carrier
from weftlora.errors import ApartError, WeftError

T = TypeVar("T")


def world() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world() > 1 else 0


@contextlib.contextmanager
def with_others(what: str) -> Iterator[None]:
    """Around what waits for other processes.

    Raises:
        ApartError: one of them has gone.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, WeftError) or not ends_a_wait(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ApartError(f"{what}: another process has ended, and its own log says why ({said}).") from error


def fail(failure: Exception | None, what: str, device: torch.device) -> None:
    """Raise on all processes if one of them failed: the others would wait for it for ever. All must call it."""
    if world() > 1:
        first = torch.tensor(world() if failure is None else rank(), device=carrier(device))
        dist.all_reduce(first, dist.ReduceOp.MIN)
        if (who := int(first)) < world():
            ours = isinstance(failure, WeftError)  # what is not ours ends the process that it happened on
            told = _said_by(who, f"{int(ours)}{str(failure) or type(failure).__name__}", device)
            if failure is None:
                kind = WeftError if told[0] == "1" else ApartError
                raise kind(f"{what} failed on process {who}: {told[1:]}")
    if failure is not None:
        raise failure


def _said_by(who: int, mine: str, device: torch.device) -> str:
    """What process `who` says, on all of them."""
    text = torch.frombuffer(bytearray(mine.encode()[:2000]), dtype=torch.uint8) if rank() == who else None
    size = torch.tensor(0 if text is None else len(text), device=carrier(device))
    dist.broadcast(size, who)
    sent = torch.empty(int(size), dtype=torch.uint8) if text is None else text
    sent = sent.to(carrier(device))
    dist.broadcast(sent, who)
    return bytes(sent.tolist()).decode(errors="replace")


def attempt(measure: Callable[[], T], what: str, device: torch.device, *, lockstep: bool = False) -> T:
    """What this process measures; if it failed on one of them, an error on all. All must call it.

    `lockstep`: the measuring waits for the other processes itself.

    Raises:
        ApartError: it failed in a lockstep.
    """
    if lockstep and world() > 1:
        return _in_lockstep(measure, what)
    failure: Exception | None = None
    try:
        found = measure()
    except Exception as error:
        failure = error
    fail(failure, what, device)
    return found


def _in_lockstep(measure: Callable[[], T], what: str) -> T:
    try:
        return measure()
    except Exception as error:
        if not ends_a_wait(error):
            with contextlib.suppress(Exception):  # the store is gone with the process that kept it
                _store().set(_WORD, f"{rank()}: {str(error)[:2000]}")
            raise ApartError(f"{what} failed on process {rank()}: {error}") from error
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        left = ""
        with contextlib.suppress(Exception):
            left = _store().get(_WORD).decode(errors="replace") if _store().check([_WORD]) else ""
        raise ApartError(
            f"{what} failed on process {left}" if left else f"{what} failed: another process has ended ({said})"
        ) from error


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


_WORD = "weftlora/failed"
"""The key under which a process that fails in a lockstep leaves word."""


def ends_a_wait(error: BaseException) -> bool:
    """Whether `error` is what a collective gives where another process has gone."""
    marks = ("by peer", "Application timeout", "Timed out", "timed out", "pair closure", "Broken pipe", "remote worker")
    return isinstance(error, dist.DistBackendError) or any(mark in str(error) for mark in marks)


def any_of(mine: bool, device: torch.device) -> bool:
    """Whether it is so on any process. All must call it."""
    if world() == 1:
        return mine
    count = torch.tensor(int(mine), device=carrier(device))
    dist.all_reduce(count)
    return bool(count)


def all_names(mine: Sequence[str]) -> list[str]:
    """The names that any process has, in one order. All must call it."""
    if world() == 1:
        return sorted(mine)
    every: list[Sequence[str]] = [()] * world()
    dist.all_gather_object(every, list(mine))
    return sorted({name for each in every for name in each})


def from_main(values: Tensor, device: torch.device) -> Tensor:
    """The main process' `values`, on the CPU; shapes may differ before, not in their number of axes."""
    if world() == 1:
        return values
    device = carrier(device)
    shape = torch.tensor(values.shape, device=device)
    dist.broadcast(shape, 0)
    there = values.to(device) if rank() == 0 else torch.empty(shape.tolist(), dtype=values.dtype, device=device)
    dist.broadcast(there, 0)
    return there.cpu()


def sum_up(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Add up, in place, over all processes, which then hold the same bytes; one message per dtype."""
    if world() == 1:
        return
    device = carrier(device)
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
    device = carrier(device)
    for t in tensors:
        value = t.detach().to(device).contiguous()
        dist.broadcast(value, 0)
        with torch.no_grad():
            t.copy_(value)


def gathered(value: Tensor, device: torch.device) -> list[Tensor]:
    """The `value` of every process in the order of their ranks, on the CPU; shapes are the same on all."""
    if world() == 1:
        return [value.cpu()]
    device = carrier(device)
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
    mine = torch.tensor(int.from_bytes(found.digest()[:7], "big"), device=carrier(device))
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    if int(lowest) != int(highest):
        raise WeftError(
            f"{what} differ between the processes: start all of them from the same checkpoint, the same base and the same rows."
        )
