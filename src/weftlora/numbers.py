"""What counts as a number in a setting: True and False do not, although Python has them as 1 and 0."""

from __future__ import annotations

from typing import Any, TypeGuard


def is_whole(value: Any, least: int | None = None) -> TypeGuard[int]:
    """Whether `value` is an int, and no smaller than `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether `value` is an int or a float, which may be infinite or no number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
