"""Linears that read one input, as one node under an unmodified model, and the hand-over between their forwards.

The first of q, k, v of an attention, or of gate and up of an MLP, that is called computes all of them; the others find their result
when they are called with the very same tensor and nothing that it depends on has changed. Nothing is kept after the last.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from weftlora.adapted.hooks import all_watched
from weftlora.adapted.sharing import QKV_FAMILIES, same_input
from weftlora.kernel import Linear, draw, linears

GATE_UP: tuple[tuple[str, str], ...] = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
MISSES = 2  # results nobody came for, after which a group is given up

logger = logging.getLogger(__name__)


class Member(Protocol):
    """What a group asks of an adapted linear; see `weftlora.adapted.layer`, which is built on groups."""

    module_name: str
    training: bool
    group: InputGroup | None

    def get_base_layer(self) -> nn.Module: ...

    def only_adapter(self) -> str | None: ...

    def why_not(self) -> str | None: ...

    def job(self, name: str, x: Tensor, read: Tensor) -> Linear | None: ...


def input_groups(parent: str, children: Mapping[str, Member]) -> Iterator[InputGroup]:
    """Groups of the adapted children, by their last names, of the module called `parent`."""
    for names in _groups(parent, list(children)):
        for members in _of_one_width([children[last] for last in names]):
            yield InputGroup(members)


class InputGroup:
    """Adapted linears of one parent that read one input. Belongs to no module tree; its members hold it."""

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        self.misses = 0
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "misses": self.misses}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def forget(self) -> None:
        """Drop what was computed for members that have not been called, and with it the graph that it holds."""
        self._waiting = Waiting(None, {})
        self._masks: dict[tuple[str, float], tuple[Seen, Tensor]] = {}
        self._called: set[Member] = set()

    @property
    def waits(self) -> bool:
        """Whether results are kept for members that have not been called yet."""
        return bool(self._waiting.results)

    def called(self, layer: Member) -> None:
        """Note a forward of `layer`; its second one begins another pass, with masks of its own, also where x is the same."""
        if layer in self._called:
            self._masks, self._called = {}, set()
        self._called.add(layer)

    def fetch(self, layer: Member, x: Tensor) -> Tensor | None:
        """The output of `layer` on x if another member has computed it, and nothing that it depends on has changed since."""
        waiting = self._waiting  # read once: another thread may put its own there at any time
        found = waiting.results.pop(layer, None) if _is(x, waiting.seen) else None
        return found.output if found is not None and found.stamp == _stamp(layer, found.factors) else None

    def output(self, layer: Member, x: Tensor, read: Tensor) -> Tensor | None:
        """The output of `layer` on x if the group can compute it, else None. `read` is x as the bases take it."""
        if layer not in self.members:  # a copy that nn.DataParallel made; its group is still that of the original
            return None
        self._note_miss()
        if self.misses >= MISSES or all_watched():
            return None
        adapters = only_adapters(self.members)
        if adapters is None:
            return None
        jobs: list[Linear] = []
        for member, adapter in zip(self.members, adapters, strict=True):
            job = member.job(adapter, x, read)
            if job is None or (jobs and job[2].dropout != jobs[0][2].dropout):
                return None
            jobs.append(job)
        outputs = dict(zip(self.members, linears(read, jobs), strict=True))
        own = outputs.pop(layer)
        factors = {member: (job[2].factors.A, job[2].factors.B) for member, job in zip(self.members, jobs, strict=True)}
        self._waiting = Waiting(_seen(x), {m: Result(y, factors[m], _stamp(m, factors[m])) for m, y in outputs.items()})
        return own

    def mask(self, x: Tensor, read: Tensor, adapter_name: str, p: float) -> Tensor:
        """The one mask that this adapter's sites on all members read x through."""
        seen, bits = self._masks.get((adapter_name, p), (None, None))
        if bits is None or not _is(x, seen):
            bits = draw(read, p)
            self._masks[adapter_name, p] = _seen(x), bits
        return bits

    def _note_miss(self) -> None:
        """Drop what was not fetched; a model that does so again and again does not read one input here."""
        if self.waits and torch._C._current_graph_task_id() == -1:
            self.misses += 1
            if self.misses == MISSES:
                names = ", ".join(member.module_name for member in self.members)
                logger.info("%s do not read one input, so each is computed by itself.", names)
        self._waiting = Waiting(None, {})


Seen = tuple["weakref.ref[Tensor]", int, bool] | None


class Result(NamedTuple):
    """What one member would give, computed from these factors, and what it depends on beside the input; see `_stamp`."""

    output: Tensor
    factors: tuple[Tensor, ...]
    stamp: tuple[object, ...]


class Waiting(NamedTuple):
    """Results for the members that have not been called yet, of the one input that was seen."""

    seen: Seen
    results: dict[Member, Result]


def _stamp(layer: Member, factors: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What a member's output on a given input depends on: values of its factors, its adapter, its mode, autocast."""
    versions = [0 if t.is_inference() else t._version for t in factors]
    device = factors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (layer.only_adapter(), layer.training, autocast, *versions)


def _seen(x: Tensor) -> Seen:
    return weakref.ref(x), 0 if x.is_inference() else x._version, torch.is_grad_enabled()


def _is(x: Tensor, seen: Seen) -> bool:
    """Whether x is the very tensor that was seen, unchanged since, and gradients are wanted now as then."""
    if seen is None or seen[0]() is not x or seen[2] != torch.is_grad_enabled():
        return False
    return x.is_inference() or x._version == seen[1]


def _of_one_width(layers: Sequence[Member]) -> list[list[Member]]:
    """The layers by their numbers of input features, two or more each: what differs in it reads another tensor."""
    widths = [getattr(layer.get_base_layer(), "in_features", None) for layer in layers]
    found = [[layer for layer, w in zip(layers, widths, strict=True) if w == width] for width in dict.fromkeys(widths)]
    return [members for members in found if len(members) > 1]


def _groups(parent: str, lasts: list[str]) -> list[list[str]]:
    """Names of children of `parent` that read one input, in the order of the families, two or more each."""
    found = []
    for family in QKV_FAMILIES:
        for roles in {same_input(parent, last) for last in family if last in lasts}:
            found.append([last for last in family if last in lasts and last in (roles or ())])
    found += [[last for last in pair if last in lasts] for pair in GATE_UP]
    return [names for names in found if len(names) > 1]


def only_adapters(layers: Sequence[Member]) -> list[str] | None:
    """The one adapter of each of these linears in a forward; None if one has not exactly one, or no node can own it."""
    found = []
    for layer in layers:
        adapter = layer.only_adapter()
        if adapter is None or layer.why_not() is not None:
            return None
        found.append(adapter)
    return found
