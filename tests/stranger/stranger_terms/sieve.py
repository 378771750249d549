"""Sieve: every block has a gate of its own, and those that gates open most are kept.

gate_l = 2 σ(α_l)                              1 where α = 0; blocks do not compete, as they do under a softmax
∂R/∂α_l = (1 − σ(α_l)) h_l + penalty · σ(α_l)  h_l = gate_l ∂R/∂gate_l
kept: the `keep` largest α
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from weftlora.errors import ConfigError
from weftlora.terms.layers import Chosen, SearchedLayers, Weighed


@dataclass(frozen=True)
class Sieve(SearchedLayers):
    """Search which blocks to adapt, each by a gate of its own.

    Args:
        keep: how many.
        rate: of α.
        penalty: how strongly every gate is drawn shut.
        steps, outer_batches, val_size: of the search, see `SearchedLayers`.
    """

    keep: int = 1
    rate: float = 1.0
    penalty: float = 0.0
    steps: int | None = None
    outer_batches: int = 2
    val_size: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.keep, int) or self.keep < 1:
            raise ConfigError(f"Sieve(keep={self.keep!r}) keeps nothing: use a whole number from 1 up.")

    def alpha_hat(self, alpha_n: Tensor) -> Tensor:
        """The gates."""
        return self.gates(alpha_n)

    def gates(self, alpha_n: Tensor) -> Tensor:
        """2 σ(α)."""
        return 2 * torch.sigmoid(alpha_n.double())

    def gradient(self, h_n: Tensor, alpha_n: Tensor) -> Tensor:
        """By hand, because h is all that a backward says."""
        open_n = torch.sigmoid(alpha_n.detach().double())
        return (1 - open_n) * h_n.double() + self.penalty * open_n

    def optimizer(self, alpha_n: Tensor) -> torch.optim.Optimizer:
        """Plain descent."""
        return torch.optim.SGD([alpha_n], lr=self.rate)

    def check_groups(self, n: int) -> None:
        """It keeps no more than there are."""
        if self.keep > n:
            raise ConfigError(f"Sieve(keep={self.keep}) of {n} groups: keep at most {n}.")

    def choose(self, found: Weighed) -> Chosen:
        """The largest α."""
        ranked = sorted(range(len(found.alpha)), key=lambda i: (-found.alpha[i], i))
        last, first_out = found.alpha[ranked[self.keep - 1]], found.alpha[ranked[min(self.keep, len(ranked) - 1)]]
        threshold = (last + first_out) / 2
        distance = tuple(a - threshold for a in found.alpha)
        near = tuple(i for i, d in enumerate(distance) if abs(d) < found.step)
        return Chosen(tuple(sorted(ranked[: self.keep])), distance, near=near)

    @property
    def selects(self) -> int | None:
        """`keep`."""
        return self.keep

    def selecting(self, count: int) -> Self:
        """The same, keeping `count`."""
        return replace(self, keep=count)
