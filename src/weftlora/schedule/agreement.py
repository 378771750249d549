"""How far two ways of scoring slots agree, and whether a decision stands above the noise of the rows it was taken on.

Brackets are [slots, 2, rows] fp64: what each validation row adds to a slot's last-in (0) and first-in (1) term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TERMS = {"both": (0, 1), "last_in": (0,), "first_in": (1,)}


def by_row(brackets: Tensor, terms: str) -> Tensor:
    """[slots, rows]: the scores before they are summed over rows."""
    return brackets[:, list(TERMS[terms])].sum(1)


def scores(brackets: Tensor, terms: str) -> list[float]:
    """One score per slot."""
    return by_row(brackets, terms).sum(1).tolist()


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; nan where one side is constant."""
    a, b = (_ranks(torch.tensor(values, dtype=torch.float64)) for values in (one, other))
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else math.nan


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's τ_b: agreeing minus disagreeing pairs over all pairs, pairs tied on a side taken out; nan if one is constant."""
    a, b = (_order(torch.tensor(values, dtype=torch.float64)) for values in (one, other))
    scale = float(a.abs().sum() * b.abs().sum()) ** 0.5
    return float((a * b).sum()) / scale if scale else math.nan


def _order(values: Tensor) -> Tensor:
    return torch.sign(values[:, None] - values[None, :])


def _ranks(values: Tensor) -> Tensor:
    less = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return less.double() + (equal.double() - 1) / 2


def lowest(values: Sequence[float], count: int) -> list[int]:
    """The positions of the `count` lowest values, ties by position."""
    return sorted(range(len(values)), key=lambda i: (values[i], i))[:count]


def agreement(guess: Sequence[float], truth: Sequence[float], count: int) -> dict[str, Any]:
    """Spearman's and Kendall's correlation; overlap of the `count` lowest; regret.

    Regret is what the choice by `guess` loses in truth, relative to the sum over the truly lowest.
    """
    chosen, right = lowest(guess, count), lowest(truth, count)
    best = sum(truth[i] for i in right)
    lost = sum(truth[i] for i in chosen) - best
    rho, tau = spearman(guess, truth), kendall(guess, truth)
    return {
        "spearman": rho if math.isfinite(rho) else None,
        "kendall": tau if math.isfinite(tau) else None,
        "overlap": len(set(chosen) & set(right)) / max(count, 1),
        "regret": lost / abs(best) if best else None,
    }


def margin(brackets: Tensor, terms: str, count: int) -> tuple[float, float] | None:
    """The gap in score between the last slot below the cut and the first above it, and the gap's standard error over rows.

    None where nothing is above the cut. The error is nan on a single row.
    """
    rows = by_row(brackets, terms)
    order = lowest(rows.sum(1).tolist(), count + 1)
    if not 0 < count < len(rows):
        return None
    gap = rows[order[count]] - rows[order[count - 1]]
    noise = float(gap.std() * math.sqrt(len(gap))) if len(gap) > 1 else math.nan
    return float(gap.sum()), noise
