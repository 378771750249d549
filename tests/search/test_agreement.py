"""How far selections agree, in plain numbers."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from weftlora.errors import ConfigError
from weftlora.search.agreement import chance, jaccard, stability


def test_chance_is_the_mean_jaccard_over_all_pairs_of_subsets():
    for a, b, n in ((3, 3, 6), (2, 4, 6), (5, 5, 6), (1, 6, 6)):
        pairs = [(set(x), set(y)) for x in combinations(range(n), a) for y in combinations(range(n), b)]
        assert chance(a, b, n) == pytest.approx(fmean(jaccard(x, y) for x, y in pairs))
    assert chance(12, 12, 32) == pytest.approx(0.24, abs=0.005)  # the spec's reference point


def test_stability_is_the_mean_over_pairs_beside_its_chance():
    found = stability([(0, 1), (0, 1), (0, 2)], 4)
    assert found.jaccard == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert found.chance == pytest.approx(chance(2, 2, 4))
    assert found.frequency == (1.0, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0)
    with pytest.raises(ConfigError, match="at least two"):
        stability([(0,)], 4)
