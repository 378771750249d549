"""Trim: once, the rank slots whose absence costs least on validation rows are taken away.

cost of slot i of a module      L(without i) − L          L: loss on `rows` validation rows
taken away                      the `slots` cheapest, at most all but one of a module
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from weftlora.errors import ConfigError
from weftlora.terms.events import Controller, Event, Length, Timeline, Validation, check_possible
from weftlora.terms.ranks import Ranks


@dataclass(frozen=True)
class Trim(Ranks):
    """Take away the rank slots that validation rows miss least.

    Args:
        at: after which optimiser step.
        slots: how many, over all modules.
        rows: validation rows to measure on.
    """

    saves: ClassVar[Mapping[str, str]] = {"mask": "0 or 1 per rank slot"}
    equation_only: ClassVar[str | None] = "a slot that is taken away is a row of A and a column of B"
    counts: ClassVar[Mapping[str, str]] = {"trimmed": "whether it has happened"}

    at: int = 100
    slots: int = 1
    rows: int = 16

    def __post_init__(self) -> None:
        for name in ("at", "slots", "rows"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ConfigError(f"Trim({name}={value!r}) trims nothing: use a whole number from 1 up.")

    @property
    def needs_data(self) -> bool:
        """Yes."""
        return True

    def capacity(self, r: int, fan_in: int, out: int, *, experts: bool = False) -> int:
        """No more than it starts with."""
        return r

    def state(self, r: int, room: int) -> dict[str, Tensor]:
        """All are live."""
        return {"mask": torch.ones(r + room)}

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """The trimming."""
        return [Trimming(self, timeline)]


@dataclass(eq=False)
class Trimming:
    """The event."""

    choice: Trim
    timeline: Timeline
    validation: Validation | None = field(default=None, init=False)
    what: str = "trimming ranks"

    def __post_init__(self) -> None:
        self.first.register_counter("trimmed", torch.zeros((), dtype=torch.bool))

    @property
    def first(self) -> Any:
        """The adapter's first site, which holds the count."""
        return self.timeline.members[0].site

    def due(self, length: Length) -> int | None:
        """After step `at`."""
        return self.choice.at

    def done(self) -> bool:
        """Whether it has happened."""
        return bool(self.first.trimmed)

    def check(self, length: Length) -> None:
        """It must come before the end."""
        check_possible(self.choice.at, length, self.what, self.choice.at)

    def before_step(self, step: int | None, length: Length) -> None:
        """Nothing to get ready."""

    def take_rows(self, rows: Validation) -> bool:
        """It measures on them."""
        self.validation = rows
        return True

    def plan(self, step: int, length: Length, optimizer: Optimizer) -> Callable[[], Event] | None:
        """Measure what each slot is worth, once it is time."""
        if self.validation is None:
            raise ConfigError(
                "Trim measures on validation rows and was given none: call weftlora.attach(model, validation=rows) before training."
            )
        if step < self.choice.at:
            return None
        chosen = self.cheapest(self.costs(self.validation))
        return lambda: self.apply(chosen)

    def costs(self, validation: Validation) -> list[tuple[float, int, int]]:
        """(cost, module, slot) of every live slot; nothing is changed in the end."""
        batch = validation.draw(self.choice.rows, "trim")
        whole, found = validation.loss(batch), []
        for m, member in enumerate(self.timeline.members):
            for slot in member.site.live():
                before = member.site.mask.clone()
                member.site.mask[slot] = 0
                found.append((validation.loss(batch) - whole, m, slot))
                member.site.mask.copy_(before)
        return found

    def cheapest(self, costs: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
        """The slots to take away: every module keeps one."""
        left = [len(member.site.live()) for member in self.timeline.members]
        chosen = []
        for cost, m, slot in sorted(costs):
            if len(chosen) < self.choice.slots and left[m] > 1:
                chosen.append((cost, m, slot))
                left[m] -= 1
        return chosen

    def apply(self, chosen: list[tuple[float, int, int]]) -> Event:
        """Switch them off for good."""
        for _, m, slot in chosen:
            self.timeline.members[m].site.mask[slot] = 0
        self.first.trimmed.fill_(True)
        names = [member.name for member in self.timeline.members]
        return {"event": "trim", "pruned": [[names[m], slot, cost] for cost, m, slot in chosen]}
