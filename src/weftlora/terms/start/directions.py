"""Directions: A and B start, after a while of plain training, along the directions of W that it moved most.

    before the switch    ΔW = (α/r) B A                      plain LoRA, the pre-launch
    at the switch        A, B ← A₀, B₀                       what the pre-launch had learned is discarded
    after it             ΔW = (α/r) (B A − B₀ A₀)            A₀, B₀ fixed: the frozen twins

    residual             B₀ = Ū diag(√(σ̄/c)),  A₀ = diag(√(σ̄/c)) V̄ᵀ      c = α/r, so c B₀ A₀ = Ū diag(σ̄) V̄ᵀ
    directions           B₀ = 0,  A₀ = κ V̄ᵀ                               nothing to freeze

Ū [out, r], V̄ᵀ [r, in] and σ̄ [r] are the r core directions of W with the largest change rate under the ΔW of the pre-launch
(`weftlora.change_rates`), so A and B carry the part of W along them while W − c B₀ A₀ stays fixed. W itself is never touched: the
removed part would mostly be lost in a 16-bit W and could not be taken out of a quantised one. A twin is the same bits as
the slot it cancels, so the function at the switch is the pretrained one to rounding.

Source: LoRA-Init, arXiv 2409.01035 from version 4 on, reconstructed from its abstract and framework figure; not verified
against text or code. Read there: the pre-launch, the rule of choice, the frozen W − Σ σ̄ ū v̄ᵀ. Inferred: r directions, the
symmetric split, the discarded pre-launch, fresh moments at the switch. Ours: the guard (a slot whose σ̄ is next to nothing
would get next to no gradient from either factor, so it starts with a row of length κ and a column of zeros), what fills
slots without a direction (the same, along the slot's own row of A), and the mode "directions".

The twin slots exist from the start as zeros, so that shapes, optimiser groups and compiled graphs never change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weftlora import change_rates
from weftlora.change_rates import SELECT
from weftlora.errors import ConfigError, suggest
from weftlora.kernel import Axis, Role, Slots
from weftlora.settings import Time, check_time, is_number, is_whole
from weftlora.terms.events import Controller, LaunchEffect, SiteView, Timeline
from weftlora.terms.extra import Direction
from weftlora.terms.start import Start, StartTerm, kaiming_uniform

MODES = ("residual", "directions")


@dataclass(frozen=True)
class Directions(Start):
    """Start A and B along the directions of W that a while of plain training moved most (LoRA-Init).

    Args:
        after: when to switch: optimiser steps (int; 100, as LoRA-Dash), a fraction of the run (float in (0, 1)) or
            `weftlora.epochs(x)`.
        mode: "residual": A and B take over W's part along the directions; "directions" (ours): only A starts along them.
        eps: ε of the change rate, relative to σ_max.
        guard: σ̄ ≤ guard · σ_max starts with a zero product instead, so that gradients do not vanish (ours).
        kappa: κ, the length of a row of A whose column of B starts at zero (ours).
        select: "rate" (the paper); "top" (largest σ), "bottom" (smallest σ) and "random" are controls.
        seed: of the directions that "random" draws.
    """

    saves: ClassVar[Mapping[str, str]] = {
        "down": "A₀ [slots, in]",
        "up": "B₀ [out, slots]",
        "index": "which core directions they are",
        "sigma": "their singular values",
        "rate": "their change rates at the switch",
        "launched": "whether the switch has happened",
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "Search": "start directions are taken in the training after the search, on the selected blocks"
    }
    equation_only: ClassVar[str | None] = "A and B start along directions of W, each the twin of a frozen slot"

    after: Time = 100
    mode: Literal["residual", "directions"] = "residual"
    eps: float = 1e-8
    guard: float = 1e-6
    kappa: float = 1.0
    select: Literal["rate", "top", "bottom", "random"] = "rate"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", check_time(self.after, "Directions(after=...)"))
        for name, valid in (("mode", MODES), ("select", SELECT)):
            if (given := getattr(self, name)) not in valid:
                raise ConfigError(f"Directions({name}={given!r}): {suggest(str(given), valid)}")
        for name, usual in (("eps", "1e-8"), ("guard", "1e-6")):
            if not is_number(given := getattr(self, name)) or not 0 <= given < 1:
                raise ConfigError(f"Directions({name}={given!r}) is not a number in [0, 1): use {usual}.")
        if not is_number(self.kappa) or not 0 < self.kappa < math.inf:
            raise ConfigError(f"Directions(kappa={self.kappa!r}) is not a positive number: use 1.0.")
        if not is_whole(self.seed):
            raise ConfigError(f"Directions(seed={self.seed!r}) is not a seed: use a whole number.")

    def draw(
        self,
        rows: int,
        fan_in: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As Kaiming does, until the switch."""
        return kaiming_uniform(rows, fan_in, device=device, generator=generator)

    def build(self, slots: int, fan_in: int, out: int) -> DirectionsTerm:
        """Empty twins."""
        return DirectionsTerm(self, slots, fan_in, out)

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """The switch."""
        return [timeline.launch(StartSwitch(self))]


class DirectionsTerm(StartTerm):
    """The frozen twins of one site's slots. Saved: twins, which directions they are, and whether they have been switched on."""

    roles: ClassVar[Mapping[str, Role]] = {}
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]] = {
        "down": ("slots", "in"),
        "up": ("out", "slots"),
        **dict.fromkeys(("index", "sigma", "rate"), cast("tuple[Axis, ...]", ("slots",))),
        "launched": (),
    }

    down: Tensor | None
    up: Tensor | None
    index: Tensor
    sigma: Tensor
    rate: Tensor
    launched: Tensor

    def __init__(self, choice: Directions, r: int, fan_in: int, out: int):
        super().__init__()
        self.choice = choice
        residual = choice.mode == "residual"
        self.register_buffer("down", torch.zeros(r, fan_in) if residual else None)
        self.register_buffer("up", torch.zeros(out, r) if residual else None)
        self.register_buffer("index", torch.full((r,), -1, dtype=torch.long))
        self.register_buffer("sigma", torch.zeros(r))
        self.register_buffer("rate", torch.zeros(r))
        self.register_buffer("launched", torch.zeros((), dtype=torch.bool))

    def slots(self, scale: float, mask: Tensor | None, layer_gate: Tensor | None) -> Slots | None:
        """A₀, B₀ and −scale × mask × layer gate: what switches slot j off switches its twin off. None without twins."""
        if self.down is None or self.up is None:
            return None
        gate = torch.full_like(self.sigma, -scale)
        for factor in (mask, layer_gate):
            gate = gate if factor is None else gate * factor.to(gate)
        return Slots(self.down, self.up, gate)

    @torch.no_grad()
    def clear(self, slots: Sequence[int]) -> None:
        """Forget the twins of slots that are taken away: what is made in their place later has none."""
        chosen = list(slots)
        if self.down is not None and self.up is not None:
            self.down[chosen] = 0
            self.up[:, chosen] = 0
        self.index[chosen] = -1
        self.sigma[chosen] = 0
        self.rate[chosen] = 0

    @torch.no_grad()
    def switch(self, found: Any, a_ri: Tensor, b_or: Tensor, live: Tensor, scale: float, largest: float) -> Tensor:
        """Start the live slots of A [r, in] and B [out, r] along `found` and set their twins, in place.

        Args:
            found: a `weftlora.change_rates.Directions`, no more than there are live slots.
            live: [slots] int64, the numbers of the slots to start, best direction first; the others are left alone.
            scale: c = α/r.
            largest: σ_max of W.

        Returns:
            [slots] bool: which of the live slots have a twin; the others start with a zero product.
        """
        a_si, b_os, frozen = start_values(found, a_ri[live], b_or.shape[0], self.choice, scale, largest)
        for parameter, twin, value, dim in ((a_ri, self.down, a_si, 0), (b_or, self.up, b_os, 1)):
            if twin is not None:
                value = value.to(parameter.dtype).to(twin.dtype)  # the bits that both can hold
                columns = frozen.to(value)[:, None] if dim == 0 else frozen.to(value)
                twin.zero_().index_copy_(dim, live, value * columns)
            parameter.index_copy_(dim, live, value.to(parameter.dtype))
        n = len(found.index)
        self.index.fill_(-1)[live[:n]] = found.index.to(self.index.device)
        for name in ("sigma", "rate"):
            buffer = getattr(self, name)
            buffer.zero_()[live[:n]] = getattr(found, name).to(buffer)
        self.launched.fill_(True)
        return frozen

    @property
    def happened(self) -> bool:
        """Whether the switch has."""
        return bool(self.launched)

    @property
    def phase(self) -> str:
        """Before or after the switch."""
        return "switched" if self.happened else "before the switch"

    def chosen(self) -> list[Direction]:
        """Those that slots started from, in the order of the slots."""
        index, sigma, rate = self.index.tolist(), self.sigma.tolist(), self.rate.tolist()
        return [Direction(i, sigma[k], rate[k], None) for k, i in enumerate(index) if i >= 0]

    def stored(self) -> tuple[Tensor, Tensor] | None:
        """The twins, once they are set."""
        return (self.down, self.up) if self.happened and self.down is not None and self.up is not None else None


@dataclass(frozen=True)
class StartSwitch:
    """What LoRA-Init does with directions; see `weftlora.terms.events.Launch`.

    The pre-launch is discarded: right after the switch the function is the pretrained one. Gains of Dash slots that were
    launched earlier return to 0 with it, and keep their directions.
    """

    choice: Directions
    what: str = "the switch of LoRA-Init"
    event: str = "start_switch"

    def flag(self, site: SiteView) -> Tensor:
        """See `Launch`."""
        return _term(site).launched

    def count(self, site: SiteView) -> int:
        """See `Launch`: as many as the site has live slots."""
        return len(_live(site))

    @torch.no_grad()
    def apply(self, site: SiteView, found: change_rates.Directions, largest: float) -> LaunchEffect:
        """See `Launch`. "guarded": the chosen directions whose σ̄ was too small to split."""
        f = site.structure.factors(site.scale)
        a, b = cast(nn.Parameter, f.A), cast(nn.Parameter, f.B)
        frozen = _term(site).switch(found, a, b, _live(site), site.scale, largest)
        gains = [] if site.boost is None else site.boost.rest()
        split = frozen[: len(found.index)].tolist()
        guarded = [k for k, able in zip(found.index.tolist(), split, strict=True) if not able]
        return LaunchEffect({"guarded": guarded if self.choice.mode == "residual" else []}, [a, b, *gains])

    def gap(self) -> str:
        """See `Launch`."""
        return "rank slots: their other slots start as plain LoRA's do, without a direction"


def _live(site: SiteView) -> Tensor:
    """The numbers of the slots that the rank mask leaves on, all of them without one: [slots] int64."""
    term = _term(site)
    return (torch.ones_like(term.index) if site.mask is None else site.mask).nonzero().flatten()


def _term(site: SiteView) -> DirectionsTerm:
    return cast(DirectionsTerm, site.start)


def start_values(
    found: Any, rows_ri: Tensor, out: int, choice: Directions, scale: float, largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A₀ [r, in] and B₀ [out, r] in fp64, and which slots have a non-zero product [r].

    Args:
        found: a `weftlora.change_rates.Directions` of s ≤ r directions: the first s slots.
        rows_ri: the rows of A before the switch; the slots beyond s keep their direction.
        largest: σ_max of W.
    """
    a = choice.kappa * F.normalize(rows_ri.detach().double(), dim=1)
    b = a.new_zeros(out, len(a))
    frozen = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    up, down, sigma = (t.to(a) for t in (found.up, found.down, found.sigma))
    s, able = len(sigma), (sigma > choice.guard * largest) & (choice.mode == "residual")
    root = (sigma / scale).sqrt()
    a[:s] = torch.where(able, root, choice.kappa)[:, None] * down
    b[:, :s] = torch.where(able, root, 0.0) * up
    frozen[:s] = able
    return a, b, frozen
