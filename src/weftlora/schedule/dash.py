"""The launch of Dash: after optimiser step t, each site's directions are fixed once and for all.

    apply     s directions → Ū, V̄ into the site's buffers; the moments of its gains dropped

Source: LoRA-Dash, arXiv 2409.01035.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from weftlora import linalg
from weftlora.schedule.launch import forget_moments
from weftlora.site import Site
from weftlora.terms.boost.dash import Dash, DashTerm


@dataclass(frozen=True)
class DashLaunch:
    """What Dash does with directions; see `Launch`."""

    choice: Dash
    what: str = "the launch of Dash"
    event: str = "dash_launch"

    def flag(self, site: Site) -> Tensor:
        """See `Launch`."""
        return _term(site).launched

    def count(self, site: Site) -> int:
        """See `Launch`."""
        return len(_term(site).gain)

    def apply(self, site: Site, found: linalg.Directions, largest: float) -> dict[str, Any]:
        """See `Launch`: the gains start fresh; moments fed with zeros would make their first steps too large."""
        term = _term(site)
        term.launch(found)
        forget_moments(term.gain)
        return {}

    def gap(self) -> str:
        """See `Launch`."""
        return f"Dash(directions={self.choice.directions}): their other slots stay empty"


def _term(site: Site) -> DashTerm:
    return cast(DashTerm, site.boost)
