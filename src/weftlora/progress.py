"""What a long call tells whoever watches it. The library only reports; showing it is the command line's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tick:
    """`done` of `total` units of `phase` (optimiser steps, batches)."""

    phase: str
    done: int
    total: int
    loss: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    """Of the whole call, with what comes between and after the units that are counted; None where only these are known."""


Progress = Callable[[Tick], None]
"""Whatever watches a long call: called with a `Tick` after every unit of work."""


def ignore(tick: Tick) -> None:
    """Watch nothing."""
