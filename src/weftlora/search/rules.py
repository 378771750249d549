"""From α to a set of blocks: plain numbers in, plain numbers out.

    above_mean       α_i > mean(α)        the same for α + c, which is all that α̂ determines of α
    raw_zero         α_i > 0              means the same only while Σα = 0, which Adam does not keep
    alpha_hat_gt_1   α̂_i > 1              stricter: α̂_i ≥ 1 implies α_i ≥ mean(α) (AM ≥ GM), not the reverse
    top_k            the k largest

Ties go to the lower index. J = |a ∩ b| / |a ∪ b| measures how far two selections agree; two random ones of the same sizes
agree too, so it is always shown against that chance.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from weftlora.errors import ConfigError, RunError
from weftlora.terms.layers.search import Fewer, Rule


@dataclass(frozen=True)
class Chosen:
    """Indices in increasing order. `distance`: how far every α is above (selected) or below its threshold, in units of α.

    `filled`: those that the rule did not select and `min_layers` did. `near`: those that one more step could turn.
    """

    selected: tuple[int, ...]
    distance: tuple[float, ...]
    filled: tuple[int, ...]
    near: tuple[int, ...]

    @property
    def margin(self) -> float:
        """The smallest distance of all."""
        return min(abs(d) for d in self.distance)


def choose(
    alpha: Sequence[float],
    rule: Rule,
    *,
    top_k: int | None = None,
    min_layers: int = 1,
    when_fewer: Fewer = "fill",
    step: float = 0.0,
) -> Chosen:
    """Apply a rule to α.

    Args:
        step: how far one step moves an α; what is nearer to its threshold than that is flagged.

    Raises:
        ConfigError: an α is no number, or more blocks are asked for than there are.
        RunError: the rule selects fewer than `min_layers`, and `when_fewer` is "error".
    """
    n = len(alpha)
    check_counts(n, top_k, min_layers)
    if not n or not all(math.isfinite(a) for a in alpha):
        raise ConfigError(f"α={list(alpha)} cannot be selected from: the search has diverged.")
    ranked = sorted(range(n), key=lambda i: (-alpha[i], i))
    threshold = _threshold(alpha, rule, ranked, top_k)
    if rule == "top_k":
        chosen = set(ranked[:top_k])
    else:
        rounding = 8 * 2.0**-52 * max(abs(a) for a in alpha)
        chosen = {i for i in range(n) if alpha[i] - threshold > rounding}
    if len(chosen) < min_layers and when_fewer == "error":
        raise RunError(
            f"select={rule!r} selects {len(chosen)} of {n} groups, fewer than min_layers={min_layers}: the search found no more "
            "worth an adapter; search longer, lower min_layers, or take those of the largest α too (when_fewer='fill')."
        )
    filled = tuple(sorted(i for i in ranked[:min_layers] if i not in chosen)) if len(chosen) < min_layers else ()
    distance = tuple(a - threshold for a in alpha)
    near = tuple(i for i in range(n) if abs(distance[i]) < step)
    return Chosen(tuple(sorted(chosen | set(filled))), distance, filled, near)


def check_counts(n: int, top_k: int | None, min_layers: int) -> None:
    """Raise ConfigError if more blocks are asked for than the n that there are."""
    for name, count in (("top_k", top_k or 0), ("min_layers", min_layers)):
        if count > n:
            raise ConfigError(f"{name}={count} of {n} groups cannot be selected: use at most {n}.")


def _threshold(alpha: Sequence[float], rule: Rule, ranked: list[int], top_k: int | None) -> float:
    n = len(alpha)
    if rule == "raw_zero":
        return 0.0
    if rule == "above_mean":
        return math.fsum(alpha) / n
    if rule == "alpha_hat_gt_1":  # α̂_i > 1  ⇔  α_i > log mean exp α
        top = max(alpha)
        return top + math.log(math.fsum(math.exp(a - top) for a in alpha) / n)
    if top_k is None:
        raise ConfigError("select='top_k' needs top_k=k.")
    ordered = [alpha[i] for i in ranked]
    return ordered[-1] if top_k == n else (ordered[top_k - 1] + ordered[top_k]) / 2


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
