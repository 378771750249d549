"""A mean over few seeds and an interval that is honest about it.

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

from weftlora.compare.record import Interval
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
