"""Counting optimiser steps where nobody can forget to: torch's global hook after `optimizer.step`.

A schedule counts a step if the optimiser that took it holds the schedule's anchor parameter, looked up by identity at
that moment, because hosts replace parameters. Skipped steps do not count: without fused kernels a GradScaler does not
call `step` at all; with them it does and leaves a non-zero `found_inf` on the optimiser. Nor does a step count that finds
no gradient: it changes nothing. Forward calls, evaluation, accumulation and recomputation take no optimiser step and so
cannot count. An optimiser that steps within another's step (ZeroRedundancyOptimizer, Lookahead) holds the same
parameters: the outer step is the one that counts, because only after it are the weights what the next forward sees.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


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
    if (skipped is not None and float(skipped) != 0) or _is_empty(optimizer):
        return
    others = [other for other in _optimizers if other is not optimizer]
    for listener in list(_listeners.values()):
        if listener.counts(optimizer) and not any(listener.counts(other) and _is_running(other) for other in others):
            listener.after_step(optimizer)


def _is_empty(optimizer: Optimizer) -> bool:
    """Whether no parameter of `optimizer` has a gradient."""
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def _is_running(optimizer: Optimizer) -> bool:
    """Whether a method of `optimizer` is being executed."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_locals.get("self") is optimizer:
            return True
    return False
