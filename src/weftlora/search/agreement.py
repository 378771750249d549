"""How far selections agree: J = |a ∩ b| / |a ∪ b|.

Two random selections of the same sizes agree too, so J is always shown against that chance.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from weftlora.errors import ConfigError


def jaccard(a: Collection[int], b: Collection[int]) -> float:
    """|a ∩ b| / |a ∪ b|; 1 for two empty sets."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 1.0


def chance(a: int, b: int, n: int) -> float:
    """The expected Jaccard index of two random subsets of n with a and b members."""
    if not a and not b:
        return 1.0
    total = math.comb(n, b)
    shared = range(max(0, a + b - n), min(a, b) + 1)
    return math.fsum(math.comb(a, k) * math.comb(n - a, b - k) / total * k / (a + b - k) for k in shared)


@dataclass(frozen=True)
class Stability:
    """How far selections agree: mean Jaccard index over pairs, what chance gives for their sizes, and how often each is in."""

    selections: int
    jaccard: float
    chance: float
    frequency: tuple[float, ...]


def stability(selections: Sequence[Collection[int]], n: int) -> Stability:
    """Agreement of at least two selections out of n. Raises ConfigError for fewer."""
    if len(selections) < 2:
        raise ConfigError("stability compares at least two selections: search with several seeds or search-set sizes.")
    pairs = list(combinations(selections, 2))
    return Stability(
        len(selections),
        fmean(jaccard(a, b) for a, b in pairs),
        fmean(chance(len(a), len(b), n) for a, b in pairs),
        tuple(fmean(float(i in chosen) for chosen in selections) for i in range(n)),
    )
