"""Dash: s extra slots along the task-specific directions of W, their gains learned from zero.

    before the launch    ΔW = (α/r) B A
    after it             ΔW = (α/r) B A + Ū diag(g) V̄ᵀ       Ū [out, s], V̄ᵀ [s, in] fixed, g [s] learned

    pair="freeze"        the same, with A and B as they are at the launch
    pair="drop"          ΔW = Ū diag(g) V̄ᵀ

Ū and V̄ are the s core directions of W with the largest change rate under the ΔW of the moment of the launch
(`weftlora.change_rates`). Dash slots have scale 1, not α/r.

Source: LoRA-Dash, arXiv 2409.01035. Where we knowingly differ from the released code: the launch is counted in optimiser
steps (there, in forward calls of the layer, evaluation and recomputation included), ε and a rank floor, directions are
buffers saved with the adapter and never chosen again, one dropout mask for all slots, and Ū diag(g) V̄ᵀ is never formed.

The slots exist from the start with Ū = V̄ = 0, so that shapes, optimiser groups and compiled graphs never change: until
the launch they contribute exactly 0 and the gradient of g is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from weftlora import change_rates
from weftlora.change_rates import SELECT
from weftlora.errors import ConfigError, suggest
from weftlora.kernel import Axis, Role, Slots
from weftlora.settings import Time, check_time, is_number, is_whole
from weftlora.terms.boost import Boost, BoostTerm
from weftlora.terms.events import Controller, LaunchEffect, SiteView, Timeline
from weftlora.terms.extra import Direction


@dataclass(frozen=True)
class Dash(Boost):
    """Launch s directions after a while of plain training.

    Args:
        directions: s, slots per site (paper's tables: 8).
        after: when to choose them: optimiser steps (int; the paper's 100), a fraction of the run (float in (0, 1)) or
            `weftlora.epochs(x)`.
        eps: ε of the change rate, relative to σ_max.
        select: "rate" (the paper); "top" (largest σ), "bottom" (smallest σ) and "random" are controls.
        seed: of the directions that "random" draws.
        pair: what becomes of A and B after the launch: "train" (the paper, and its authors where they were asked); "freeze", so
            that only the gains are trained; "drop", the same without A and B, so that the update starts again from 0.
    """

    headline: ClassVar[tuple[str, ...] | None] = ("directions",)
    saves: ClassVar[Mapping[str, str]] = {
        "gain": "g [s]",
        "down": "V̄ᵀ [s, in]",
        "up": "Ū [out, s]",
        "index": "which core directions they are",
        "sigma": "their singular values",
        "rate": "their change rates at the launch",
        "launched": "whether the launch has happened",
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "Search": "directions are launched in the training after the search, on the selected blocks"
    }
    equation_only: ClassVar[str | None] = "directions are ranked by ΔW, and its slots stand beside those of A and B"

    directions: int = 8
    after: Time = 100
    eps: float = 1e-8
    select: Literal["rate", "top", "bottom", "random"] = "rate"
    seed: int = 0
    pair: Literal["train", "freeze", "drop"] = "train"
    objections: Mapping[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.pair not in (pairs := ("train", "freeze", "drop")):
            raise ConfigError(f"Dash(pair={self.pair!r}): {suggest(str(self.pair), pairs)}")
        if self.pair != "train":
            reason = f"with pair={self.pair!r} A and B are not trained after the launch"
            object.__setattr__(self, "objections", {"Reallocate": reason, "Directions": reason})
        if not is_whole(self.directions, 1):
            raise ConfigError(f"Dash(directions={self.directions!r}) launches nothing: use a whole number from 1 up.")
        object.__setattr__(self, "after", check_time(self.after, "Dash(after=...)"))
        if not is_number(self.eps) or not 0 <= self.eps < math.inf:
            raise ConfigError(f"Dash(eps={self.eps!r}) is not a number from 0 up: use 1e-8.")
        if self.select not in SELECT:
            raise ConfigError(f"Dash(select={self.select!r}): {suggest(str(self.select), SELECT)}")
        if not is_whole(self.seed):
            raise ConfigError(f"Dash(seed={self.seed!r}) is not a seed: use a whole number.")

    def build(self, fan_in: int, out: int) -> DashTerm:
        """s empty slots; fewer where W has fewer directions."""
        return DashTerm(self, fan_in, out)

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """The launch."""
        return [timeline.launch(DashLaunch(self))]


class DashTerm(BoostTerm):
    """The Dash slots of one site. Saved: gains, directions, which they are, and whether they have been launched."""

    roles: ClassVar[Mapping[str, Role]] = {"gain": "gain"}
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]] = {
        "gain": ("slots",),
        "down": ("slots", "in"),
        "up": ("out", "slots"),
        **dict.fromkeys(("index", "sigma", "rate"), cast("tuple[Axis, ...]", ("slots",))),
        "launched": (),
    }

    down: Tensor
    up: Tensor
    index: Tensor
    sigma: Tensor
    rate: Tensor
    launched: Tensor

    def __init__(self, choice: Dash, fan_in: int, out: int):
        super().__init__()
        self.choice = choice
        s = min(choice.directions, fan_in, out)
        self.gain = nn.Parameter(torch.zeros(s))
        self.register_buffer("down", torch.zeros(s, fan_in))
        self.register_buffer("up", torch.zeros(out, s))
        self.register_buffer("index", torch.full((s,), -1, dtype=torch.long))
        self.register_buffer("sigma", torch.zeros(s))
        self.register_buffer("rate", torch.zeros(s))
        self.register_buffer("launched", torch.zeros((), dtype=torch.bool))

    def slots(self, scale: float, mask: Tensor | None, layer_gate: Tensor | None) -> Slots:
        """V̄ᵀ, Ū and g: scale 1, outside the rank mask, under the layer gate."""
        return Slots(self.down, self.up, self.gain if layer_gate is None else self.gain * layer_gate.to(self.gain))

    @torch.no_grad()
    def launch(self, directions: change_rates.Directions) -> None:
        """Fix the directions, possibly fewer than s; gains stay 0, so the function does too."""
        s = len(directions.index)
        for name in ("down", "up", "index", "sigma", "rate"):
            value, buffer = getattr(directions, name), getattr(self, name)
            place = buffer[:, :s] if name == "up" else buffer[:s]
            place.copy_(value)
        self.launched.fill_(True)

    @torch.no_grad()
    def rest(self) -> list[nn.Parameter]:
        """The gains return to 0; the directions are kept."""
        self.gain.zero_()
        return [self.gain]

    @property
    def happened(self) -> bool:
        """Whether they have been launched."""
        return bool(self.launched)

    @property
    def phase(self) -> str:
        """Before or after the launch."""
        rests = {"train": "", "freeze": ", A and B frozen", "drop": ", A and B dropped"}[self.choice.pair]
        return f"launched{rests}" if self.happened else "before the launch"

    def chosen(self) -> list[Direction]:
        """Those of the slots at work; what a file imported from the released code does not say is None."""
        gains, used = self.gain.detach().tolist(), (self.index >= 0) | self.up.any(0)
        return [self._direction(k, gains[k]) for k in used.nonzero().flatten().tolist()]

    def _direction(self, k: int, gain: float) -> Direction:
        if int(self.index[k]) < 0:
            return Direction(None, None, None, gain)
        return Direction(int(self.index[k]), float(self.sigma[k]), float(self.rate[k]), gain)


@dataclass(frozen=True)
class DashLaunch:
    """What Dash does with directions; see `weftlora.terms.events.Launch`."""

    choice: Dash
    what: str = "the launch of Dash"
    event: str = "dash_launch"

    def flag(self, site: SiteView) -> Tensor:
        """See `Launch`."""
        return _term(site).launched

    def count(self, site: SiteView) -> int:
        """See `Launch`."""
        return len(_term(site).index)

    def apply(self, site: SiteView, found: change_rates.Directions, largest: float) -> LaunchEffect:
        """See `Launch`: the gains start fresh; moments fed with zeros would make their first steps too large."""
        term = _term(site)
        term.launch(found)
        if self.choice.pair == "train":
            return LaunchEffect({}, [term.gain])
        return LaunchEffect({"pair": self.choice.pair}, [term.gain], cast(nn.Module, site.structure).parameters())

    def gap(self) -> str:
        """See `Launch`."""
        return f"Dash(directions={self.choice.directions}): their other slots stay empty"


def _term(site: SiteView) -> DashTerm:
    return cast(DashTerm, site.boost)
