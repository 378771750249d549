"""Extra rank slots along directions of W that the fine-tune is found to need.

y += ((x V̄ᵀᵀ) ⊙ g) Ūᵀ        Ū [out, s], V̄ᵀ [s, in] fixed when they are launched, g [s] learned from zero
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from torch import Tensor, nn

from weftlora import change_rates
from weftlora.kernel import Slots
from weftlora.terms.choice import Choice
from weftlora.terms.extra import ExtraTerm


class Boost(Choice):
    """Slots that the structure does not have."""

    axis: ClassVar[str] = "boost"
    pair: Literal["train", "freeze", "drop"] = "train"
    """What becomes of the structure's A and B once its slots are launched."""

    @abstractmethod
    def build(self, fan_in: int, out: int) -> BoostTerm:
        """The slots of a fresh site, which contribute exactly 0 until they are launched."""


class BoostTerm(ExtraTerm):
    """The boost slots of one site."""

    @abstractmethod
    def slots(self, scale: float, mask: Tensor | None, layer_gate: Tensor | None) -> Slots:
        """See `ExtraTerm`; those without a direction yet are zeros."""

    @abstractmethod
    def launch(self, directions: change_rates.Directions) -> None:
        """Fix the directions; the function stays what it is."""

    @abstractmethod
    def rest(self) -> list[nn.Parameter]:
        """Let what was learned return to its start; the parameters that did."""
