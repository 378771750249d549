"""What may be said of paired differences, in a sentence: better, worse, not distinguishable, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

from weftlora.compare.metrics import metric_of
from weftlora.compare.record import Interval, Verdict
from weftlora.compare.stats import MOST_SEEDS, interval, is_constant, seeds_needed


def verdict(
    gaps: Sequence[float], metric: str, higher_is_better: bool, against: str, planned: int | None = None
) -> Verdict:
    """The verdict on differences to `against`, one per seed, at 95 %.

    Args:
        gaps: score minus the score of `against`.
        planned: how many seeds there should be; where some are missing, the sentence says so.

    Raises:
        RunError: a difference is no finite number.
    """
    missing = (
        "" if planned is None or planned == len(gaps) else f" ({len(gaps)} of {planned} seeds are complete in both)"
    )
    if not gaps:
        return Verdict("single", f"no verdict: no seed is complete both here and in {against}")
    if len(gaps) == 1:
        return Verdict("single", f"one seed: no verdict{missing}")
    found = interval(gaps)
    if excludes_zero(found):
        better = (found.mean > 0) == higher_is_better
        constant = f", the same in all {len(gaps)} seeds" if is_constant(gaps) else ""
        word = "better" if better else "worse"
        return Verdict("better" if better else "worse", f"{word} by {size(found, metric)}{constant}{missing}")
    needed = seeds_needed(gaps)
    if not any(gaps):
        rest = f"all {len(gaps)} differences are 0"
    elif found.low is None:
        rest = "two equal differences have no spread to judge them by"
    elif needed is None:
        rest = f"no number of seeds below {MOST_SEEDS} would settle a difference this small"
    else:
        rest = f"about {needed} seeds would settle it"
    return Verdict("undecided", f"not distinguishable from {against} at n={len(gaps)}; {rest}{missing}", needed)


def excludes_zero(found: Interval) -> bool:
    """Whether there is an interval and 0 is outside it."""
    return found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)


def size(found: Interval, metric: str) -> str:
    """A difference without its sign, with its interval: 0.031 nats [0.012, 0.050]. The interval must not have 0 in it."""
    unit = metric_of(metric)
    numbers = sorted(abs(value) * unit.factor for value in (found.low, found.mean, found.high) if value is not None)
    low, mean, high = (f"{value:.{_digits(numbers[0], numbers[-1] - numbers[0])}f}" for value in numbers)
    return f"{mean} {unit.word} [{low}, {high}]"


def _digits(nearest: float, width: float) -> int:
    """Decimals that show two figures of an interval's width, and that do not show its end nearest 0 as 0."""
    digits = 1
    while digits < 12 and (0 < width < 10 ** (1 - digits) or round(nearest, digits) == 0):
        digits += 1
    return digits
