"""Values that mean the same everywhere: what counts as a number, when something happens in a run, which label no loss counts.

True and False are no numbers here, although Python has them as 1 and 0, and neither is an integer beyond 64 bits, which no float
and no tensor holds. A time is in optimiser steps, a fraction of the run, or
epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from weftlora.errors import ConfigError

IGNORE = -100
"""The label of a token, or of a row, that the loss leaves out: what torch calls ignore_index and transformers relies on."""


MOST_THREADS = 1024
"""Threads from which on torch itself may fall over."""


def is_whole(value: Any, least: int | None = None) -> TypeGuard[int]:
    """Whether `value` is an int of 64 bits, and no smaller than `least`."""
    return (
        isinstance(value, int)
        and not isinstance(value, bool)
        and abs(value) < 2**63
        and (least is None or value >= least)
    )


def check_seed(seed: Any, where: str) -> int:
    """A seed that every library takes: a whole number of 32 bits. Raises ConfigError."""
    if not is_whole(seed, 0) or seed >= 2**32:
        raise ConfigError(f"{where}={seed!r} is not a seed: use a whole number from 0 to 2**32 - 1.")
    return seed


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is an int of 64 bits or a float, which may be infinite or no number."""
    return isinstance(value, float) or is_whole(value)


@dataclass(frozen=True)
class Epochs:
    """A time in passes over the training data; made by `weftlora.epochs`."""

    epochs: float


Time = int | float | Epochs


def epochs(x: float) -> Epochs:
    """A time in epochs: `Dash(after=weftlora.epochs(0.5))`. Needs to be told how many optimiser steps an epoch has."""
    if not is_number(x) or not 0 < x < math.inf:
        raise ConfigError(f"weftlora.epochs({x!r}) is not a time: use a positive number of passes over the data.")
    return Epochs(float(x))


def check_time(time: Any, where: str) -> Time:
    """A valid time: an int ≥ 1 (optimiser steps), a float in (0, 1) (fraction of the run), `weftlora.epochs(x)` or its saved form."""
    if isinstance(time, Mapping) and set(time) == {"epochs"}:
        return epochs(time["epochs"])
    if isinstance(time, Epochs):
        return epochs(time.epochs)
    if is_whole(time, 1):
        return time
    if isinstance(time, float) and 0 < time < 1:
        return time
    raise ConfigError(
        f"{where}: {time!r} is not a time: use optimiser steps (100), a fraction of the run (0.1) or weftlora.epochs(0.5)."
    )


def resolve(time: Time, total_steps: int | None, steps_per_epoch: float | None, begins: int = 0) -> int | None:
    """The optimiser step that `time` means, at least 1; None while the length of the run or of an epoch is unknown.

    A fraction is of the steps after `begins`.
    """
    if isinstance(time, Epochs):
        return None if steps_per_epoch is None else max(1, round(time.epochs * steps_per_epoch))
    if isinstance(time, float):
        return None if total_steps is None else begins + max(1, round(time * (total_steps - begins)))
    return time


def rounds(
    first: Time, every: Time, count: int, total_steps: int | None, steps_per_epoch: float | None, begins: int = 0
) -> list[int] | None:
    """The optimiser steps round(first + n·every), n < count, each at least one after the one before; None where unknown.

    Fractions are of the steps after `begins`.
    """
    length = None if total_steps is None else total_steps - begins
    start, gap = (_in_steps(time, length, steps_per_epoch) for time in (first, every))
    gap = 0.0 if count < 2 else gap  # which nobody needs to know then
    if start is None or gap is None:
        return None
    start += begins if isinstance(first, float) else 0
    found: list[int] = []
    for n in range(count):
        found.append(max(round(start + n * gap), found[-1] + 1 if found else 1))
    return found


def _in_steps(time: Time, total_steps: int | None, steps_per_epoch: float | None) -> float | None:
    if isinstance(time, Epochs):
        return None if steps_per_epoch is None else time.epochs * steps_per_epoch
    if isinstance(time, float):
        return None if total_steps is None else time * total_steps
    return float(time)
