"""Counting optimiser steps where nobody can forget to: torch's global hook after `optimizer.step`.

A schedule counts a step if the optimiser that took it holds the schedule's anchor parameter, looked up by identity at
that moment, because hosts replace parameters. Skipped steps do not count: without fused kernels a GradScaler does not
call `step` at all; with them it does and leaves a non-zero `found_inf` on the optimiser. Forward calls, evaluation,
accumulation and recomputation take no optimiser step and so cannot count.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Counted(Protocol):
    """What listens to optimiser steps."""

    def anchor(self) -> nn.Parameter | None:
        """The parameter whose optimiser is the one to count; None while nothing is trained."""
        ...

    def after_step(self, optimizer: Optimizer) -> None:
        """Called once after every real step of that optimiser."""
        ...


_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_hook: Any = None


def listen(listener: Counted) -> None:
    """Count steps for `listener` for as long as it lives."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)
    _listeners.add(listener)


def holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether `parameter` itself, not an equal one, is in a group of `optimizer`."""
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def owner_of(parameter: nn.Parameter) -> Optimizer | None:
    """The optimiser, among those that have taken a step, that holds `parameter`."""
    return next((optimizer for optimizer in _optimizers if holds(optimizer, parameter)), None)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    skipped = getattr(optimizer, "found_inf", None)
    if skipped is not None and float(skipped) != 0:
        return
    _optimizers.add(optimizer)
    for listener in list(_listeners):
        anchor = listener.anchor()
        if anchor is not None and holds(optimizer, anchor):
            listener.after_step(optimizer)
