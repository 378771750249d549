"""Deterministic, disjoint splits.

Each distinct row has a place in an order drawn from the seed and the row's own content, so the split depends neither on
the order of the file nor on Python's hash seed, and copies of a row always stand together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from random import Random

from weftlora.errors import DataError


def carve(keys: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training rows and of the validation rows, both in file order.

    Rows with equal keys are on the same side. Validation gets `round(fraction * len(keys))` rows, at least one; where
    groups of equal rows do not fit that number, it gets fewer, or the smallest group. Raises DataError without two
    different rows, since nothing would be left to train on.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"a validation split cannot be carved from {len(keys)} row(s), as it takes two that differ: "
            "give data.validation, or set data.validation_fraction: 0."
        )
    order = sorted(groups, key=lambda key: (_draw(seed, key), key))
    wanted = max(1, round(fraction * len(keys)))
    held: list[int] = []
    taken = 0
    for key in order:
        if len(held) + len(groups[key]) <= wanted and taken < len(groups) - 1:
            held += groups[key]
            taken += 1
    if not held:
        held = groups[min(order, key=lambda key: len(groups[key]))]
    chosen = set(held)
    return [index for index in range(len(keys)) if index not in chosen], sorted(chosen)


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()


def sample(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of the indices 0 … count-1, drawn with `seed`, in order; all of them without a limit."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(Random(seed).sample(range(count), limit))


def repeats(keys: Sequence[Hashable]) -> int:
    """How many of `keys` have been seen before."""
    return len(keys) - len(set(keys))
