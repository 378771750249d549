"""All: every targeted module is adapted; no layer gate is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from weftlora.terms.events import Controller, Timeline
from weftlora.terms.layers import Blocks, Layers, SearchedLayers


@dataclass(frozen=True)
class All(Layers):
    """Every targeted module carries an adapter at full strength."""

    headline: ClassVar[tuple[str, ...] | None] = None
    source: ClassVar[str] = "all that are targeted"

    @property
    def named(self) -> tuple[int | str, ...] | None:
        """None."""
        return None

    @property
    def search(self) -> SearchedLayers | None:
        """None."""
        return None

    def adapts(self, blocks: Blocks, module_name: str) -> bool:
        """Yes."""
        return True

    def check(self, blocks: Blocks, targeted: Sequence[str]) -> None:
        """Nothing can be wrong."""

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """Nothing happens."""
        return []
