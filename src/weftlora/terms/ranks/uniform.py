"""Uniform: every site keeps the rank it starts with; no mask is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from weftlora.terms.events import Controller, Timeline
from weftlora.terms.ranks import Ranks


@dataclass(frozen=True)
class Uniform(Ranks):
    """Every rank slot of every site is live for the whole run (plain LoRA's allocation)."""

    headline: ClassVar[tuple[str, ...] | None] = None

    @property
    def needs_data(self) -> bool:
        """No."""
        return False

    def capacity(self, r: int, fan_in: int, out: int, *, experts: bool = False) -> int:
        """r."""
        return r

    def state(self, r: int, room: int) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """Nothing happens."""
        return []
