"""Rank correlation, overlap and regret; the margin at the cut and its noise."""

from __future__ import annotations

import pytest
import torch

from weftlora.schedule.rank_slots import agreement, kendall, margin, spearman


def test_rank_correlation_with_ties() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 3], [1, 1, 3, 2]) == pytest.approx(7 / 9)  # ranks 0.5, 0.5, 2, 3
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert kendall([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert kendall([1, 1, 2, 3], [1, 1, 3, 2]) == pytest.approx(3 / 5)  # four pairs agree, one does not, one is tied
    assert kendall([1, 2, 3], [1, 1, 2]) == pytest.approx(2 / 6**0.5)  # two agree, one is tied on one side
    assert agreement([1.0, 1.0], [1.0, 2.0], 1)["spearman"] is None
    assert agreement([1.0, 1.0], [1.0, 2.0], 1)["kendall"] is None


def test_overlap_and_regret() -> None:
    told = agreement([0.0, 1.0, 2.0, 3.0], [-4.0, 5.0, -2.0, 6.0], 2)  # chosen 0, 1; truly lowest 0, 2
    assert told["overlap"] == 0.5
    assert told["regret"] == pytest.approx((1 - -6) / 6)


def test_the_margin_and_its_noise() -> None:
    rows = torch.tensor([[1.0, 1.0], [2.0, 4.0], [9.0, 9.0]], dtype=torch.float64)
    brackets = torch.stack([rows, torch.zeros_like(rows)], 1)
    gap, noise = margin(brackets, "both", 1)  # by row 1 and 3: sum 4, standard deviation √2 by row
    assert gap == 4
    assert noise == pytest.approx(2**0.5 * 2**0.5)
    assert margin(brackets, "both", 3) is None
