"""The switch of LoRA-Init: after optimiser step t, A and B start anew along each site's directions.

    apply     r directions → A₀, B₀ into A and B and, bit for bit, into their frozen twins; moments of A and B dropped

The pre-launch is discarded: right after the switch the function is the pretrained one. Gains of Dash slots that were
launched earlier return to 0 with it, and keep their directions.

Source: LoRA-Init, arXiv 2409.01035, as reconstructed in `weftlora.terms.start.directions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from weftlora import linalg
from weftlora.schedule.launch import forget_moments
from weftlora.site import Site
from weftlora.terms.start.directions import Directions, DirectionsTerm


@dataclass(frozen=True)
class StartSwitch:
    """What LoRA-Init does with directions; see `Launch`."""

    choice: Directions
    what: str = "the switch of LoRA-Init"
    event: str = "start_switch"

    def flag(self, site: Site) -> Tensor:
        """See `Launch`."""
        return _term(site).launched

    def count(self, site: Site) -> int:
        """See `Launch`: as many as the site has live slots."""
        return len(_live(site))

    @torch.no_grad()
    def apply(self, site: Site, found: linalg.Directions, largest: float) -> dict[str, Any]:
        """See `Launch`. "guarded": the chosen directions whose σ̄ was too small to split."""
        a, b = (site.structure.get_parameter(name) for name in ("A", "B"))
        frozen = _term(site).switch(found, a, b, _live(site), site.scale, largest)
        gains = [] if site.boost is None else list(site.boost.parameters())
        for gain in gains:
            gain.zero_()
        for parameter in (a, b, *gains):
            forget_moments(parameter)
        split = frozen[: len(found.index)].tolist()
        guarded = [k for k, able in zip(found.index.tolist(), split, strict=True) if not able]
        return {"guarded": guarded if self.choice.mode == "residual" else []}

    def gap(self) -> str:
        """See `Launch`."""
        return "rank slots: their other slots start as plain LoRA's do, without a direction"


def start_switches(start: object) -> list[StartSwitch]:
    """What this choice of the axis `start` does over time: one switch, or nothing."""
    return [StartSwitch(start)] if isinstance(start, Directions) else []


def start_of(site: Site) -> DirectionsTerm | None:
    """The term that holds the site's start directions; None where A and B start as plain LoRA's do."""
    return site.start if isinstance(site.start, DirectionsTerm) else None


def _live(site: Site) -> Tensor:
    """The numbers of the slots that the rank mask leaves on, all of them without one: [slots] int64."""
    term = _term(site)
    return (torch.ones_like(term.index) if site.mask is None else site.mask).nonzero().flatten()


def _term(site: Site) -> DirectionsTerm:
    return cast(DirectionsTerm, site.start)
