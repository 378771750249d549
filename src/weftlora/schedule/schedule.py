"""The schedule of one adapter: its sites, its controllers, its events, and its step count, which nobody can forget to take.

A step is counted by torch's global hook after `optimizer.step`, if the optimiser that took it holds the schedule's anchor
parameter, looked up by identity at that moment, because hosts replace parameters. Skipped steps do not count: without fused kernels
a GradScaler does not call `step` at all; with them it does and leaves a non-zero `found_inf` on the optimiser. Nor does a step count
that finds no gradient, or by which torch.distributed.checkpoint makes an optimiser's state: it changes nothing. Forward calls,
evaluation, accumulation and recomputation take no optimiser step and so cannot count. An optimiser that steps within another's step
(ZeroRedundancyOptimizer, Lookahead) holds the same parameters: the outer step is the one that counts, because only after it are the
weights what the next forward sees.

The schedule hangs on the adapter's first site, because nothing else survives every way a host puts adapters into a model. The step
count is that site's buffer `steps`, so it is saved and loaded with the adapter.
"""

from __future__ import annotations

import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from weftlora.adapter.buffers import Remembered
from weftlora.adapter.shards import is_deepspeeds, is_piece, is_sharded
from weftlora.adapter.site import Site
from weftlora.errors import ConfigError
from weftlora.schedule import processes
from weftlora.terms.events import Controller, Event, Length


class Counted(Protocol):
    """What listens to optimiser steps."""

    def counts(self, optimizer: Optimizer) -> bool:
        """Whether the steps of `optimizer` are its own."""
        ...

    def after_step(self, optimizer: Optimizer) -> None:
        """Called once after every real step of that optimiser."""
        ...


class Watcher(Protocol):
    """What looks at an optimiser once."""

    def first_step(self, optimizer: Optimizer) -> None:
        """Called before the first step of every optimiser that the process makes."""
        ...


# In the order of their making, which is the same on all processes: what they do may need all of them at once.
_listeners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_hooks: list[Any] = []
_watchers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_first: list[Any] = []


def listen(listener: Counted) -> None:
    """Count steps for `listener` for as long as it lives."""
    if not _hooks:  # never traced: a compiled step would be compiled again for every count
        _hooks.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before_step)))
        _hooks.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_step)))
    _listeners[next(_numbers)] = listener


def watch(watcher: Watcher) -> None:
    """Show `watcher`, for as long as it lives, every optimiser that begins its first step."""
    if not _first:
        _first.append(register_optimizer_step_pre_hook(_before_first))
    _watchers[next(_numbers)] = watcher


def _before_first(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _seen:  # a step that is traced is left alone: nothing to compile
        return
    _seen.add(optimizer)
    for watcher in list(_watchers.values()):
        watcher.first_step(optimizer)


def holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether `parameter` itself, not an equal one, is in a group of `optimizer`."""
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def owners(parameter: nn.Parameter) -> list[Optimizer]:
    """The living optimisers, among those that have begun a step, that hold `parameter`."""
    return [optimizer for optimizer in _optimizers if holds(optimizer, parameter)]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _optimizers.add(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    skipped = getattr(optimizer, "found_inf", None)
    if (skipped is not None and float(skipped) != 0) or _is_empty(optimizer) or _only_makes_state(optimizer):
        return
    others = [other for other in _optimizers if other is not optimizer]
    for listener in list(_listeners.values()):
        if listener.counts(optimizer) and not any(listener.counts(other) and _is_running(other) for other in others):
            listener.after_step(optimizer)


def _is_empty(optimizer: Optimizer) -> bool:
    """Whether no parameter of `optimizer` has a gradient; where a process may hold no trained part of a model, on any process."""
    empty = all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    if any(is_piece(p) for group in optimizer.param_groups for p in group["params"]):
        return not processes.any_of(not empty, optimizer.param_groups[0]["params"][0].device)
    return empty


def _only_makes_state(optimizer: Optimizer) -> bool:
    """Whether the step is one without gradients and rate, by which torch.distributed.checkpoint makes what it loads into."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "_init_optim_state":  # asked before the rates, which may be on a GPU
            return not any(float(group.get("lr", 1)) for group in optimizer.param_groups)
    return False


def _is_running(optimizer: Optimizer) -> bool:
    """Whether a method of `optimizer` is being executed."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_locals.get("self") is optimizer:
            return True
    return False


logger = logging.getLogger(__name__)


@dataclass
class Member:
    """One site of the adapter: the name of its module, how to read W [out, in], and which W that is.

    `source`: "in memory" (as the model computes with it), "dequantised" (as well, from fewer bits) or "original" (from the
    files of the checkpoint that the base in memory was made from).
    `held`: the site that the model holds: the site itself, or the batch whose expert `expert` it is.

    `is_split`: whether every process holds a part of W, so that reading it takes all of them; `weight_on` then gives it to one.
    """

    name: str
    held: Site
    weight: Callable[[], Tensor]
    source: str = "in memory"
    expert: int | None = None
    is_split: Callable[[], bool] = lambda: False
    weight_on: Callable[[int], Tensor | None] = lambda process: None

    @property
    def site(self) -> Site:
        """The site; of an expert a view (`Site.expert`), made anew, on which nothing can be set."""
        return self.held if self.expert is None else self.held.expert(self.expert)

    @property
    def meter(self) -> Callable[[Tensor], None] | None:
        """Who listens to it; see `listen`."""
        return self.held.gate_meter if self.expert is None else self.held.expert_meters.get(self.expert)

    def listen(self, meter: Callable[[Tensor], None] | None) -> None:
        """Let `meter` hear the weights that the site's router gives its heads; None ends that."""
        if self.expert is None:
            self.held.gate_meter = meter
        else:
            self.held.hear_expert(self.expert, meter)


@dataclass(eq=False)
class Schedule:
    """Drives the controllers of one adapter by the optimiser steps of the optimiser that trains it."""

    adapter_name: str
    members: list[Member]
    controllers: list[Controller]
    length: Length = field(default_factory=Length)
    events: list[Event] = field(default_factory=list)
    on_event: Callable[[Event], None] | None = None
    described: str = ""
    """The adapter's config, as text: what all processes must have the same of."""
    _agreed: bool = field(default=False, init=False, repr=False)
    _anchor: nn.Parameter | None = field(default=None, init=False)
    _known: Remembered[int] = field(default_factory=lambda: Remembered(int), init=False, repr=False)

    def __post_init__(self) -> None:
        self.first.register_counter("steps", torch.zeros((), dtype=torch.long))
        self.first.register_load_state_dict_post_hook(_prepare_after_load)
        listen(self)
        # A count may still be loaded without anybody being told: transformers' load_adapter assigns tensors by itself.
        unknown = next(self._trained(), None) is not None
        for controller in self.controllers:
            controller.before_step(None if unknown else 0, self.length)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        listen(self)  # a copy of the model counts for itself

    @property
    def first(self) -> Site:
        """The site that holds the count."""
        return self.members[0].held

    @property
    def steps(self) -> int:
        """Optimiser steps taken so far."""
        return self._known.read(self._count)

    @property
    def _on_meta(self) -> bool:
        return any(buffer.is_meta for buffer in self.first.buffers())

    @property
    def _count(self) -> Tensor:
        return cast(Tensor, self.first.steps)

    def counts(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` holds the anchor: the adapter's first trained parameter in the first optimiser that steps.

        It is chosen anew when it is no longer the adapter's, no longer trained, or no longer in any living optimiser.

        Raises:
            ConfigError: none ever will, as DeepSpeed's ZeRO steps on tensors of its own, and something is to happen.
        """
        anchor = self._anchor
        if anchor is None or not any(p is anchor for p in self._trained()) or not owners(anchor):
            self._anchor = anchor = next((p for p in self._trained() if holds(optimizer, p)), None)
            if anchor is None:
                self.check_counted(optimizer)
        return anchor is not None and holds(optimizer, anchor)

    def check_counted(self, optimizer: Optimizer | None = None) -> None:
        """Refuse DeepSpeed's ZeRO, whose steps are on tensors of its own, where one is waited for. Raises ConfigError."""
        if (waiting := self.pending()) and any(is_deepspeeds(p, optimizer) for p in self._trained()):
            raise ConfigError(
                f"adapter {self.adapter_name!r} waits for {waiting[0].what}, and DeepSpeed's ZeRO steps on tensors of its own, so "
                "that no step would be counted: use FSDP2, or a method to which nothing happens in training."
            )

    def _trained(self) -> Iterator[nn.Parameter]:
        held = {id(member.held): member.held for member in self.members}  # a batch once, however many experts it is of
        return (p for site in held.values() for p in site.parameters() if p.requires_grad)

    def pending(self) -> list[Controller]:
        """The controllers that still have something to do; all of them while the adapter has no values yet."""
        return [controller for controller in self.controllers if self._on_meta or not controller.done()]

    def missing(self, *, over: bool = False) -> str | None:
        """What the adapter is still without, as a sentence; None before training and in a run known to go on.

        `over` says that it will not go on, whatever length it was to have.
        """
        total = self.length.total_steps
        if not self.steps or (not over and total is not None and self.steps < total):
            return None
        waiting = [f"{c.what} (due {_when(c.due(self.length))})" for c in self.pending()]
        if not waiting:
            return None
        return (
            f"adapter {self.adapter_name!r} has trained {self.steps} steps and is still without {' and '.join(waiting)}, so it is "
            "not yet what its config names: train longer, or choose an earlier step."
        )

    def check(self, length: Length, *, may_grow: bool = False) -> None:
        """Raise `ConfigError` if something can never happen in a run of this length; `may_grow`: what it lacks may still come."""
        for controller in self.pending():
            if not (may_grow and controller.due(length) is None):
                controller.check(length)

    def prepare(self) -> None:
        """Let controllers get ready for the next step; also after loading, when the count may have changed."""
        if not self._on_meta:
            for controller in self.controllers:
                controller.before_step(self.steps, self.length)

    def after_step(self, optimizer: Optimizer) -> None:
        """One more step was taken; see `weftlora.schedule.schedule`."""
        with torch.no_grad(), processes.with_others(f"adapter {self.adapter_name!r} after a step"):
            steps = self.steps + 1
            self._known.keep(self._count.fill_(steps), steps)
            if not self._agreed:
                self._agree()
            plans = []
            for controller in self.pending():
                if controller.due(self.length) is None:
                    controller.check(self.length)
                plans.append(controller.plan(self.steps, self.length, optimizer))
            for apply in plans:  # only when all have measured and decided: each sees the adapter that was trained
                if apply is not None:
                    self._record({"adapter": self.adapter_name, "step": self.steps, **apply()})
            self.prepare()

    def _agree(self) -> None:
        """Refuse processes that would not do the same at the same steps, before anything happens that needs all of them."""
        split = next((m.name for m in self.members if m.expert is not None and is_sharded(m.held)), None)
        if split is not None and self.controllers:
            raise ConfigError(
                f"{split} is one expert of a parameter that is split among processes, where {self.controllers[0].what} cannot happen: "
                "leave the experts out of target_parameters, or train them on processes that each hold the whole model."
            )
        times = [(controller.what, controller.due(self.length)) for controller in self.controllers]
        said = f"{self.described} {[member.name for member in self.members]} {times} {self.steps}".encode()
        text = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        processes.check_same([text], f"config, steps or length of adapter {self.adapter_name!r}", self._count.device)
        self._agreed = True

    def _record(self, event: Event) -> None:
        self.events.append(event)
        logger.info("%s after step %d of adapter %s", event["event"], event["step"], event["adapter"])
        if self.on_event is not None:
            self.on_event(event)


def _when(due: int | None) -> str:
    return "at a time that needs the length of the run" if due is None else f"after step {due}"


def _prepare_after_load(site: nn.Module, _: Any) -> None:
    schedule = getattr(site, "schedule", None)
    if isinstance(schedule, Schedule):
        if (
            not schedule._on_meta
        ):  # an earlier state has not seen what came later; in place, because hosts hold the list
            schedule.events[:] = [event for event in schedule.events if event["step"] <= schedule.steps]
        schedule.prepare()
