"""Means and intervals over few seeds."""

from __future__ import annotations

import itertools
import math
import random
from statistics import fmean, stdev

import pytest
from scipy.stats import t

from weftlora.compare import statistics
from weftlora.compare.statistics import expected_false, interval, seeds_needed
from weftlora.errors import RunError

SKEWED = [0.0, 0.1, 0.2, 0.3, 2.0]


def test_one_value_has_no_interval():
    found = interval([0.3])
    assert (found.mean, found.low, found.high, found.n) == (0.3, None, None, 1)


@pytest.mark.parametrize("values", [[0.25] * 5, [0.1 + 0.2, 0.3, 0.3], [0.0] * 3])
def test_equal_values_have_an_interval_of_no_width(values):
    found = interval(values)
    assert found.low == found.high == found.mean == pytest.approx(values[0])


@pytest.mark.parametrize("values", [[0.25, 0.25], [0.1 + 0.2, 0.3], [0.0, 0.0]])
def test_two_equal_values_have_no_interval(values):
    found = interval(values)
    assert (found.low, found.high, found.n) == (None, None, 2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(RunError, match="leave the run out"):
        interval([1.0, wrong])


def test_no_value_is_refused():
    with pytest.raises(RunError, match="no run is complete"):
        interval([])


@pytest.mark.parametrize("values", [[1.0, 4.0], [-1.0, 0.0, 1.0], [-3.0, -1.0, 0.0, 1.0, 3.0]])
def test_symmetric_values_have_the_t_interval(values):
    found, n = interval(values), len(values)
    half = statistics.MARGIN * t.ppf(0.975, n - 1) * stdev(values) / n**0.5
    assert (found.low, found.high) == pytest.approx((fmean(values) - half, fmean(values) + half), abs=1e-7)


@pytest.mark.parametrize("n", [3, 5, 8, 9, 12])
def test_the_width_is_that_of_the_t_interval_and_the_shape_the_values_own(n):
    values = [value**3 for value in random.Random(n).choices(range(10), k=n)]
    found = interval(values)
    assert found.high - found.low == pytest.approx(
        2 * statistics.MARGIN * t.ppf(0.975, n - 1) * stdev(values) / n**0.5, rel=1e-6
    )
    assert found.high - found.mean != pytest.approx(found.mean - found.low, rel=1e-3)


def test_it_leans_to_the_side_of_the_long_tail():
    found = interval(SKEWED)
    assert found.high - found.mean > 1.05 * (found.mean - found.low)


@pytest.mark.parametrize("n", [5, 12])
def test_order_sign_and_scale_change_nothing_else(n):
    values = [*SKEWED, *(0.05 * k for k in range(n - 5))]
    found = interval(values)
    assert interval(list(reversed(values))) == found
    mirrored = interval([-value for value in values])
    assert (-mirrored.high, -mirrored.low) == pytest.approx((found.low, found.high), abs=1e-8)
    moved = interval([1000 * value + 7 for value in values])
    assert (moved.low, moved.high) == pytest.approx((1000 * found.low + 7, 1000 * found.high + 7), rel=1e-6)


def test_a_higher_level_is_wider():
    narrow, wide = interval(SKEWED, 0.9), interval(SKEWED, 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_all_resamples_are_taken_with_their_probability():
    counts, weights = statistics._resamples(3)
    drawn = [tuple(sorted(pick)) for pick in itertools.product(range(3), repeat=3)]
    for row, weight in zip(counts.astype(int), weights, strict=True):
        values = tuple(value for value, times in enumerate(row) for _ in range(times))
        assert weight == pytest.approx(drawn.count(values) / 27)
    assert weights.sum() == pytest.approx(1)


def test_seeds_needed_is_the_sample_size_of_the_t_test():
    # 1, 0.5 and 0.2 standard deviations take 10, 34 and 199 pairs in every table (two-sided 5 %, power 80 %)
    for effect, pairs in ((1.0, 10), (0.5, 34), (0.2, 200)):
        gaps = [effect - 1, effect, effect + 1]
        assert seeds_needed(gaps) == pairs


def test_seeds_needed_knows_when_none_would_do():
    assert seeds_needed([-1.0, 0.001, 1.0]) is None
    assert seeds_needed([0.0, 0.0]) is None
    assert seeds_needed([5.0, 5.1, 4.9]) == 4  # more than there are


def test_expected_false_verdicts():
    assert expected_false(8).startswith("with 8 comparisons, 0.4 false verdicts")
    assert expected_false(1).startswith("with 1 comparison, 0.05 false")
