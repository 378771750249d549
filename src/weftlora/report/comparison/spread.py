"""Means over seeds with intervals, for what a comparison's own record has none: curves, domains, further metrics, costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from weftlora.compare import stats
from weftlora.compare.record import Comparison, Interval, Outcome


def interval(values: Sequence[float]) -> Interval | None:
    """The mean and its interval; None without a number that is finite."""
    known = [value for value in values if math.isfinite(value)]
    return stats.interval(known) if known else None


def score(outcome: Outcome, metric: str, domain: str | None = None) -> float | None:
    """A score of a complete run, on all rows or on those of a domain; None where there is none."""
    scores: Mapping[str, float] = outcome.scores if domain is None else outcome.domains.get(domain, {})
    value = scores.get(metric, math.nan)
    return value if outcome.status == "complete" and math.isfinite(value) else None


def scores(found: Comparison, name: str, metric: str, domain: str | None = None) -> dict[int, float]:
    """A score of every complete run of a method, by seed."""
    return {o.seed: value for o in found.of(name) if (value := score(o, metric, domain)) is not None}


def paired(found: Comparison, name: str, metric: str, domain: str | None = None) -> dict[int, float]:
    """The score of a method less that of the baseline, by seed, where both are complete."""
    base = scores(found, found.baseline, metric, domain)
    return {seed: value - base[seed] for seed, value in scores(found, name, metric, domain).items() if seed in base}
