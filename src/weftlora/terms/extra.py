"""Slots beside the structure's, along directions of W that are found while it trains.

    y += ((x downᵀ) ⊙ gate) upᵀ        down [E, in], up [out, E]: zeros until their event, so that shapes never change

Both the boost and the later start of A and B are such slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from weftlora.kernel import Axis, Role, Slots


@dataclass(frozen=True)
class Direction:
    """A core direction of W that was chosen; None for what a file from elsewhere does not say."""

    index: int | None
    """Of the direction in W's spectrum, σ descending."""
    sigma: float | None
    rate: float | None
    """Its change rate when it was chosen."""
    gain: float | None
    """What has been learned for it, where that is one number."""


class ExtraTerm(nn.Module, ABC):
    """The extra slots of one site."""

    roles: ClassVar[Mapping[str, Role]] = {}
    """What each of its parameters does in the equation, by name."""
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]] = {}
    """What the axes of each of its tensors run over; see `StructureTerm.axes`."""

    @abstractmethod
    def slots(self, scale: float, mask: Tensor | None, layer_gate: Tensor | None) -> Slots | None:
        """Its rows of A, columns of B̃ and gates, given α/r, the mask [r] and the layer gate [] of the site; None without any."""

    @property
    @abstractmethod
    def phase(self) -> str:
        """Where it is in time: "before the launch", "launched"."""

    @property
    @abstractmethod
    def happened(self) -> bool:
        """Whether its directions have been chosen."""

    @abstractmethod
    def chosen(self) -> list[Direction]:
        """The directions that it has chosen, in the order of the slots."""
