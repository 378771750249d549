"""Top2: every token uses the rank slots that its router rates highest.

    ℓ = x Wgᵀ                                [T, r]
    p = r · softmax(ℓ)                       over all slots, until the mixture hardens
    p = 2 · softmax(ℓ over the top two)      afterwards, 0 for the others
    y += (α/r) (p ⊙ drop(x) Aᵀ) Bᵀ           A [r, in], B [out, r], Wg [r, in]

At step `after` the mixture hardens. From then on a token's update has rank 2, whatever r is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from weftlora.errors import ConfigError
from weftlora.kernel import Factors
from weftlora.settings import Time, check_time
from weftlora.terms.events import Controller, Event, Length, Timeline, Validation, check_possible
from weftlora.terms.structure import Draw, OutsideTerm, Place, Size, SlotFirst, Structure, StructureTerm


@dataclass(frozen=True)
class Top2(Structure):
    """A mixture of rank slots of which every token uses two.

    Args:
        after: when the mixture hardens.
    """

    method: ClassVar[str] = "Top2"
    saves: ClassVar[Mapping[str, str]] = {
        "A": "A [r, in]",
        "B": "B [out, r]",
        "router": "Wg [r, in]",
        "hard": "whether the mixture has hardened",
    }
    outside: ClassVar[bool] = True
    no_closed_form: ClassVar[str | None] = "every token picks two rank slots of its own, so no single ΔW exists"
    figures_at: ClassVar[str] = "an even mixture"

    after: Time = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", check_time(self.after, "Top2(after=...)"))

    def build(self, size: Size, room: int, owners: Mapping[str, StructureTerm], draw: Draw) -> Top2Term:
        """A drawn, B zero, the router drawn."""
        if size.r < 3:
            raise ConfigError(f"Top2 mixes two of r={size.r} rank slots, which leaves no choice: use r=3 or more.")
        a = F.pad(draw(size.r, size.fan_in), (0, 0, 0, room))
        return Top2Term(self, a, size.out, F.pad(draw(size.r, size.fan_in), (0, 0, 0, room)))

    def tensors(self) -> frozenset[str]:
        """All of them."""
        return frozenset(self.saves)

    def shared_keys(self, place: Place) -> dict[str, Hashable]:
        """Nothing is shared."""
        return {}

    def sides(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        """Of A and B."""
        return tensors["A"].shape[1], tensors["B"].shape[0]

    def check(self, dropout: float) -> None:
        """Any will do."""

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """The hardening."""
        return [Harden(self, [member.site.structure for member in timeline.members])]


class Top2Term(OutsideTerm):
    """Owns A, B, the router and whether it has hardened, of one site."""

    hard: Tensor

    def __init__(self, choice: Top2, a: Tensor, out: int, router: Tensor):
        super().__init__()
        self.choice = choice
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(a.new_zeros(out, a.shape[0]))
        self.router = nn.Parameter(router)
        self.register_buffer("hard", torch.zeros((), dtype=torch.bool))

    def update(self, x: Tensor, dropped: Tensor, scale: float) -> Tensor:
        """(α/r) (p ⊙ drop(x) Aᵀ) Bᵀ, the router in fp32."""
        rated = F.linear(x.float(), self.router.float())
        best = rated.topk(2, -1)
        few = torch.full_like(rated, -torch.inf).scatter(-1, best.indices, best.values)
        p = torch.where(self.hard, 2 * few.softmax(-1), rated.shape[-1] * rated.softmax(-1))
        return scale * F.linear(p.to(x.dtype) * F.linear(dropped, self.A.to(x.dtype)), self.B.to(x.dtype))

    def factors(self, scale: float) -> Factors:
        """A and B, as if every token used all slots evenly."""
        return Factors(self.A, self.B, scale)

    def by_slot(self) -> list[tuple[nn.Parameter, SlotFirst]]:
        """Slots cannot move: the router would have to be told."""
        return []

    def linear(self) -> list[Tensor]:
        """B."""
        return [self.B]

    def fix(self, omega: Tensor) -> None:
        """There are no heads."""


@dataclass(eq=False)
class Harden:
    """The event: from the soft mixture over all slots to the two best."""

    choice: Top2
    terms: list[Top2Term]
    what: str = "the hardening of Top2"

    def due(self, length: Length) -> int | None:
        """The step that `after` is."""
        return steps_of(self.choice.after, length)

    def done(self) -> bool:
        """Whether it has happened; the buffer is saved with the adapter."""
        return bool(self.terms[0].hard)

    def check(self, length: Length) -> None:
        """It must come before the end."""
        check_possible(self.due(length), length, self.what, self.choice.after)

    def plan(self, step: int, length: Length, optimizer: Optimizer) -> Callable[[], Event] | None:
        """Nothing is measured."""
        due = self.due(length)
        return None if due is None or step < due else self.apply

    def apply(self) -> Event:
        """Harden every site."""
        for term in self.terms:
            term.hard.fill_(True)
        return {"event": "top2_harden", "sites": len(self.terms)}

    def before_step(self, step: int | None, length: Length) -> None:
        """Nothing to get ready."""

    def take_rows(self, rows: Validation) -> bool:
        """No use for any."""
        return False


def steps_of(time: Any, length: Length) -> int | None:
    """A time of a config in optimiser steps; None where the length of the run is needed and unknown."""
    if isinstance(time, int):
        return time
    if isinstance(time, float):
        return None if length.total_steps is None else round(time * length.total_steps)
    return None if length.steps_per_epoch is None else round(time.epochs * length.steps_per_epoch)
