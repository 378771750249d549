"""Where A and B start.

a start draws the random rows of A; B is 0, so that ΔW = 0
a start that comes later keeps frozen twins: slots −A₀, B₀ beside the structure's, 0 until then
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from weftlora.terms.choice import Choice
from weftlora.terms.extra import ExtraTerm


class Start(Choice):
    """The values at step 0 of A, or of A and B at a later step."""

    axis: ClassVar[str] = "start"

    @abstractmethod
    def draw(
        self,
        rows: int,
        fan_in: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Random rows of A [rows, fan_in] fp32, from torch's global generator or the one given."""

    @abstractmethod
    def build(self, slots: int, fan_in: int, out: int) -> StartTerm | None:
        """What a site of that many rank slots keeps of its start; None where nothing is kept."""


class StartTerm(ExtraTerm):
    """What one site keeps of its start: slots of its own, each the twin of a slot of the structure."""

    @abstractmethod
    def clear(self, slots: Sequence[int]) -> None:
        """Forget the twins of slots that are taken away: what is made in their place later has none."""

    @abstractmethod
    def stored(self) -> tuple[Tensor, Tensor] | None:
        """A₀ [slots, in] and B₀ [out, slots] that A and B started from, where they are kept."""


def kaiming_uniform(
    rows: int,
    fan_in: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """[rows, fan_in] fp32, uniform on ±1/√fan_in, from torch's global generator or the one given."""
    bound = 1.0 / math.sqrt(fan_in)
    return torch.empty(rows, fan_in, device=device).uniform_(-bound, bound, generator=generator)
