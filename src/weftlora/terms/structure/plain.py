"""Plain: one A and one B per site.

    ΔW = (α/r) B A          A [r, in], B [out, r]

Source: LoRA, arXiv 2106.09685, equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from weftlora.kernel import Factors, Role


@dataclass(frozen=True)
class Plain:
    """One pair of factors per site: stock LoRA's function."""


class PlainTerm(nn.Module):
    """Owns A [r, in] and B [out, r] of one site."""

    roles: ClassVar[Mapping[str, Role]] = {"A": "down", "B": "up"}

    def __init__(self, a: torch.Tensor, out_features: int):
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(a.new_zeros(out_features, a.shape[0]))

    def factors(self, scale: float) -> Factors:
        """The letters of the equation that this term contributes."""
        return Factors(self.A, self.B, scale)
