"""Which rank slots are live: a 0/1 mask in g.

Slots are allocated at capacity and masked, so shapes never change in training. What a choice keeps per site are buffers: `mask`
[slots] is the one that the equation reads, `birth` and `score` are what reports show of it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from weftlora.terms.choice import Choice


class Ranks(Choice):
    """How many rank slots each site has, and when that changes."""

    axis: ClassVar[str] = "ranks"

    @property
    @abstractmethod
    def needs_data(self) -> bool:
        """Whether it measures on validation rows, which training then has to be given."""

    @abstractmethod
    def capacity(self, r: int, fan_in: int, out: int, *, experts: bool = False) -> int:
        """Slots to make room for at a site of initial rank r; at least r. `experts`: the site is one of many, of an expert each."""

    @abstractmethod
    def state(self, r: int, room: int) -> dict[str, Tensor]:
        """Its buffers of a fresh site with r live slots and room for others, by name; {} where every slot is live for good."""
