"""What the runs of a comparison say together: means over few seeds, intervals that are honest about it, verdicts.

Runs become rows: the scores of each method over its seeds, and its differences to the baseline by seed. What may be said of paired
differences is a sentence: better, worse, not distinguishable, or nothing. The interval that decides it:

    low = m − w L / (L + U)      high = m + w U / (L + U)      w = 2 t s / √n · 1.005

Letters: n values of mean m and standard deviation s (n − 1 below the line); t the Student quantile at n − 1 degrees; L and U
how far the lower and upper ends of the smoothed bootstrap distribution of the mean lie from m, at a tail of Φ(−t) each.

The shape is the bootstrap's, the width is that of the t-interval. Why not a plain bootstrap, at n = 5:

- Every percentile interval lies between the smallest and the largest value, so it leaves out 0 at least whenever all five
  differences have one sign: in 6 % of experiments without any difference (measured: 16 %). This is its narrowness bias; the
  expanded percentile interval, at a tail of Φ(−t √(n / (n−1))), corrects what it can and still errs in 8 %.
- The bootstrap t-interval divides by the standard deviation of resamples, many of which have but two distinct values. It covers
  95 %, and finds a difference of two standard deviations in 72 % of experiments; symmetric, in 62 %. At n = 3 it is infinite.
- For normal differences no unbiased test is stronger than the t-test, which finds 91 %. To err in at most 5 % and to find 90 %,
  an interval has to be as wide as the t-interval.

So resamples are smoothed: half the variance is kept in the values and half is normal noise, which gives their means the
variance s²/n that is wanted and a distribution without steps. It is read at the tail that turns a normal distribution into
Student's, and scaled to the t-interval's width and half a percent more, which is what the shape, itself estimated, costs. For
symmetric values this is the t-interval; for skewed ones it leans as they do. What it does, in % of experiments (100,000; at n =
10, 20,000):

    differences                   n = 3                n = 5                n = 10
                            covers  finds 2 sd   covers  finds 2 sd   covers  finds 2 sd
    normal                    95.2      46.8       95.1      90.7       95.1     100.0
    gamma, skewness 0.6       94.5      48.4       94.4      91.3       94.6      99.8
    gamma, skewness 1         93.7      50.4       93.4      91.3       93.9      99.7
    Student's t, 5 degrees    95.8      54.3       95.8      90.3       95.6      99.3
    Student's t, 3 degrees    96.2      65.3       96.1      92.0       95.8      98.6
    uniform                   92.3      38.0       93.8      96.6       95.2     100.0

"finds 2 sd": leaves out 0 where the true difference is two standard deviations, mean of both signs. Where it is 0, what is not
covered is a false verdict. Two methods that are equal have differences that are symmetric around 0, whatever their scores are
like. Skewed differences of mean 0, where every interval of this width errs in more than 5 %, take two methods that differ and
have equal means.

Sources: Hesterberg, What Teachers Should Know About the Bootstrap, arXiv:1411.5279 (narrowness bias, expanded percentile and
bootstrap t intervals); Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (smoothed bootstrap). The scaling is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations_with_replacement
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import nctdtr, ndtr, stdtrit

from weftlora.compare.record import Interval, Method, Outcome, Row, Verdict, metric_of
from weftlora.errors import RunError

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 1000
"""More seeds than this are not proposed."""
ENUMERATED = 8
"""Up to so many values all resamples are taken: 6435 multisets at n = 8."""
DRAWN = 10_000
"""Resamples beyond that, from a fixed seed, half of them the others' mirror images."""

MARGIN = 1.005
"""How much wider than the t-interval: without it, normal differences of mean 0 are left out in 5.01 % of experiments."""

Array = NDArray[np.float64]


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of `values` and the interval that holds the true one at `level`: see the module.

    Of the values' order it knows nothing. One value has no interval, and two equal ones have none: scores that are counted, such
    as an accuracy, are equal by chance in one pair of 10 (measured). Three equal values and more have one of no width.

    Raises:
        RunError: no value, or one that is no finite number.
    """
    if not values:
        raise RunError("there is no value to take a mean of: no run is complete.")
    if wrong := [value for value in values if not math.isfinite(value)]:
        raise RunError(f"a value is {wrong[0]}, which has no mean: leave the run out and say that it diverged.")
    n, mean = len(values), fmean(values)
    if n == 1 or (n == 2 and is_constant(values)):
        return Interval(mean, None, None, n, level)
    if is_constant(values):
        return Interval(mean, mean, mean, n, level)
    spread, t = stdev(values), float(stdtrit(n - 1, (1 + level) / 2))
    residuals = (np.sort(np.asarray(values, dtype=np.float64)) - mean) / spread
    tail = float(ndtr(-t))
    lower, upper = _reach(-residuals, tail), _reach(residuals, tail)
    width = MARGIN * 2 * t * spread / math.sqrt(n) / (lower + upper)
    return Interval(mean, mean - width * lower, mean + width * upper, n, level)


def is_constant(values: Sequence[float]) -> bool:
    """Whether the values are equal but for rounding."""
    return max(values) - min(values) <= 1e-12 * max(map(abs, values))


def seeds_needed(gaps: Sequence[float], level: float = LEVEL, power: float = POWER) -> int | None:
    """About how many seeds would tell paired differences like `gaps` from 0, if their true mean and spread are those seen.

    The fewest, above those there are, with which a t-test at `level` has `power`, rounded up to two figures; None if `MOST_SEEDS`
    would not do.
    """
    if is_constant(gaps):
        return None
    effect = abs(fmean(gaps)) / stdev(gaps)

    def settles(n: int) -> bool:
        t = float(stdtrit(n - 1, (1 + level) / 2))
        return 1 - float(nctdtr(n - 1, effect * math.sqrt(n), t)) >= power

    fewest = next((n for n in range(len(gaps) + 1, MOST_SEEDS + 1) if settles(n)), None)
    return fewest if fewest is None or fewest < 100 else math.ceil(fewest / 10) * 10


def expected_false(count: int, level: float = LEVEL) -> str:
    """What to bear in mind with `count` verdicts in one table, in a sentence without its full stop."""
    comparisons = "1 comparison" if count == 1 else f"{count} comparisons"
    verdicts = f"{count * (1 - level):.2g}"
    return f"with {comparisons}, {verdicts} false verdicts are expected even if all methods are equal"


def _reach(residuals: Array, tail: float) -> float:
    """How far above 0 the smoothed bootstrap mean of `residuals` [n], of standard deviation 1, lies with probability `tail`."""
    counts, weights = _resamples(len(residuals))
    n = len(residuals)
    means = counts @ residuals / math.sqrt(2 * n * (n - 1))  # [resamples], of variance 1 / 2n
    noise = math.sqrt(0.5 / n)
    low, high = 0.0, float(means.max()) + 40 * noise  # Φ(−40) is below the smallest double
    while high - low > 1e-10:
        middle = (low + high) / 2
        if weights @ ndtr((means - middle) / noise) > tail:
            low = middle
        else:
            high = middle
    return high


@lru_cache(maxsize=16)
def _resamples(n: int) -> tuple[Array, Array]:
    """How often each of n values is in a resample [resamples, n], and the probability of that resample [resamples]."""
    if n > ENUMERATED:
        drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWN // 2)
        return np.concatenate([drawn, drawn[:, ::-1]]).astype(np.float64), np.full(DRAWN, 1 / DRAWN)
    sets = list(combinations_with_replacement(range(n), n))
    counts: NDArray[Any] = np.array([np.bincount(chosen, minlength=n) for chosen in sets])
    ways = np.array([math.factorial(n) / math.prod(map(math.factorial, row)) for row in counts.tolist()])
    return counts.astype(np.float64), ways / n**n


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
        return Verdict("better" if better else "worse", f"{word} by {size_in_words(found, metric)}{constant}{missing}")
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


def size_in_words(found: Interval, metric: str) -> str:
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


def rows(
    methods: Sequence[Method], outcomes: Sequence[Outcome], metric: str, higher_is_better: bool, baseline: str
) -> list[Row]:
    """A row per method, in their order. Only complete runs count, and only seeds that are complete in both are compared.

    Raises:
        RunError: a complete run without the metric, or with one that is no finite number; two runs of a method and seed.
    """
    by_method = {method.name: _by_seed(method.name, outcomes) for method in methods}
    base = by_method.get(baseline, {})
    made = []
    for method in methods:
        runs = by_method[method.name]
        scores = {seed: _score(run, metric) for seed, run in _complete(runs).items()}
        score = interval(list(scores.values())) if scores else None
        if said := _no_contender(method, baseline, bool(scores)):
            made.append(Row(method.name, score, None, 0, said))
            continue
        beside = {seed: _score(run, metric) for seed, run in _complete(base).items()}
        gaps = [scores[seed] - beside[seed] for seed in sorted(scores.keys() & beside.keys())]
        wins = sum(gap > 0 if higher_is_better else gap < 0 for gap in gaps)
        planned = len(runs.keys() | base.keys())
        judged = verdict(gaps, metric, higher_is_better, baseline, planned)
        gap = interval(gaps) if gaps else None
        made.append(Row(method.name, score, gap, wins, judged, _step_ratio(runs, base)))
    return made


def _no_contender(method: Method, baseline: str, complete: bool) -> Verdict | None:
    """The verdict on what is not compared: the baseline itself, of which a seed is complete or not, and the frozen base."""
    if method.name == baseline:
        missing = "" if complete else ", and no seed of it is complete"
        return Verdict("baseline", f"what the others are compared with{missing}")
    if method.frozen:
        return Verdict("single", "the frozen base: no verdict")
    return None


def _by_seed(name: str, outcomes: Sequence[Outcome]) -> dict[int, Outcome]:
    runs: dict[int, Outcome] = {}
    for run in outcomes:
        if run.method == name:
            if run.seed in runs:
                raise RunError(
                    f"{name} has two runs of seed {run.seed}, {runs[run.seed].folder} and {run.folder}: give only one of them."
                )
            runs[run.seed] = run
    return runs


def _complete(runs: dict[int, Outcome]) -> dict[int, Outcome]:
    return {seed: run for seed, run in runs.items() if run.status == "complete"}


def _score(run: Outcome, metric: str) -> float:
    if metric not in run.scores:
        known = ", ".join(run.scores) or "nothing"
        raise RunError(
            f"the run {run.folder} has no {metric}, only {known}: evaluate it again, or compare by one of these."
        )
    return run.scores[metric]


def _step_ratio(runs: dict[int, Outcome], base: dict[int, Outcome]) -> Interval | None:
    """CPU seconds per step over the baseline's, paired by seed; None where either has no such figure."""
    ours, theirs = (
        {seed: run.figures["cpu_per_step"] for seed, run in _complete(these).items() if run.figures.get("cpu_per_step")}
        for these in (runs, base)
    )
    ratios = [ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return interval(ratios) if ratios else None
