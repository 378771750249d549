"""What rank slots are worth now: the live slots of an adapter, scored as its choice says, and how far to trust the scores.

    exact        both brackets of every live slot                             (`Scorer`)
    taylor       both brackets of every live slot, estimated                  (`Scorer`)
    shortlist    the slots of lowest estimate exactly; what every slot is worth to its module by the estimate
    random       numbers drawn by name, slot and round

Nothing is changed here. With several processes each scores its share of the slots and all hold the same brackets.

Source: ALoRA with AB-LoRA scores, arXiv 2403.16187.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from weftlora.errors import ConfigError
from weftlora.schedule import slots as surgery
from weftlora.schedule import together
from weftlora.schedule.agreement import agreement, scores
from weftlora.schedule.schedule import Member
from weftlora.terms.ranks.reallocate import Reallocate, Slot

T = TypeVar("T")
SlotId = tuple[int, int]
"""(number of the member, slot)."""


class Scorer(Protocol):
    """What measures slots; glue makes it from the model and its validation rows."""

    def drawn(self, draw: str, *, other: bool = False) -> Mapping[str, Tensor]:
        """The rows that `draw` seeds; with `other`, as many that it does not take."""
        ...

    def exact(self, slots: Sequence[SlotId], draw: str, *, other: bool = False) -> Tensor:
        """Brackets [slots, 2, rows] by switching each slot off, and on alone, on these rows."""
        ...

    def estimate(self, slots: Sequence[SlotId], draw: str) -> Tensor:
        """Brackets [slots, 2, rows] to second order, from gradients with respect to the gates."""
        ...


@dataclass(frozen=True)
class Measured:
    """Live slots with what the decision needs, and the brackets of those that were scored exactly, or by estimate."""

    slots: list[Slot]
    scored: list[int] = field(default_factory=list)  # positions in `slots`
    brackets: Tensor | None = None  # [len(scored), 2, rows]


@dataclass(frozen=True)
class Scoring:
    """Measures the slots of one adapter. All processes must call `measure`, `check` and `exact`."""

    choice: Reallocate
    members: list[Member]
    scorer: Scorer | None

    def live(self) -> list[SlotId]:
        """The live slots, in the order of the network."""
        return [(m, slot) for m, member in enumerate(self.members) for slot in member.site.live()]

    def groups(self) -> list[tuple[list[int], int]]:
        """Members that are ranked together, and how many slots move among them per round."""
        blocks: dict[str, list[int]] = {}
        for m, member in enumerate(self.members):
            blocks.setdefault(block_of(member.name), []).append(m)
        kinds = {block: len({kind_of(self.members[m].name) for m in group}) for block, group in blocks.items()}
        if self.choice.scope == "block":
            return [(group, self._count(kinds[block], len(group))) for block, group in blocks.items()]
        everything = list(range(len(self.members)))
        return [(everything, self._count(max(kinds.values()), len(everything)))]

    def measure(self, number: int) -> Measured:
        """Every live slot in round `number`.

        Raises:
            ConfigError: a score is not finite.
            WeftError: scoring failed on another process.
        """
        ids = self.live()
        births = [int(cast(Tensor, self.members[m].site.birth)[slot]) for m, slot in ids]
        young = [birth > 0 and number - birth <= self.choice.grace_rounds for birth in births]
        if self.choice.score == "random":
            dice = [random.Random(f"{self.choice.seed}/{number}/{self.members[m].name}/{slot}") for m, slot in ids]
            values, scored, brackets = [die.random() for die in dice], list[int](), None
            worth = values
        else:
            scored, brackets, worth = self._brackets(ids, young, self._draw(number))
            values = list(worth)
            for position, value in zip(scored, scores(brackets, self.choice.terms), strict=True):
                values[position] = value
        able = set(range(len(ids))) if brackets is None else set(scored)
        if not all(map(math.isfinite, [*values, *worth])):
            raise ConfigError(
                "the scores of rank slots are not finite: the training has diverged, lower the learning rate."
            )
        return Measured(
            [
                Slot(m, slot, value, birth, w, n in able and not new)
                for n, ((m, slot), value, birth, w, new) in enumerate(
                    zip(ids, values, births, worth, young, strict=True)
                )
            ],
            scored,
            brackets,
        )

    def check(self, number: int, found: Measured) -> dict[str, Any]:
        """The score in use against the exact one, and the exact one against itself on other rows: plain numbers to tell."""
        ids, terms = [(slot.module, slot.slot) for slot in found.slots], self.choice.terms
        count = sum(count for _, count in self.groups())
        exact = self.choice.score == "exact" and found.brackets is not None
        truth = scores(found.brackets if exact else self.exact(ids, self._draw(number)), terms)  # type: ignore[arg-type]
        other = scores(self.exact(ids, self._draw(number), other=True), terms)
        told = {"exact_on_other_rows": agreement(other, truth, count)}
        if not exact:
            worst = max(slot.score for slot in found.slots) + 1
            guess = [slot.score if slot.able else worst for slot in found.slots]
            told["score_in_use"] = agreement(guess, truth, count)
        return {"agreement": told}

    def exact(self, ids: list[SlotId], draw: str, *, other: bool = False) -> Tensor:
        """Exact brackets [slots, 2, rows] fp64; those of slots that contribute nothing are exactly 0 and cost nothing."""
        self._check_same_rows(draw, other=other)
        silent: set[SlotId] = set()
        for m in {m for m, _ in ids}:
            mine = [slot for module, slot in ids if module == m]
            quiet = surgery.silent(self.members[m].site, mine)
            silent |= {(m, slot) for slot, still in zip(mine, quiet, strict=True) if still}
        loud = [n for n, each in enumerate(ids) if each not in silent]
        mine = loud[together.rank() :: together.world()]
        scorer = cast(Scorer, self.scorer)
        found = self._together(lambda: scorer.exact([ids[n] for n in mine], draw, other=other))
        out = torch.zeros(len(ids), *found.shape[1:], dtype=torch.float64)
        out[mine] = found
        together.sum_up([out], self._device)
        return out

    def _brackets(self, ids: list[SlotId], young: list[bool], draw: str) -> tuple[list[int], Tensor, list[float]]:
        """Positions of the slots that may be pruned on their score, their brackets, and what every slot is worth."""
        everything, terms = list(range(len(ids))), self.choice.terms
        if self.choice.score == "exact":
            found = self.exact(ids, draw)
            return everything, found, scores(found, terms)
        scorer = cast(Scorer, self.scorer)
        estimate = together.from_main(self._together(lambda: scorer.estimate(ids, draw)), self._device)
        worth = scores(estimate, terms)
        if self.choice.score == "taylor":
            return everything, estimate, worth
        short: list[int] = []
        for group, count in self.groups():
            mine = [n for n in everything if ids[n][0] in group and not young[n]]
            short += sorted(mine, key=lambda n: (worth[n], n))[: self.choice.shortlist_factor * count]
        short.sort()
        return short, self.exact([ids[n] for n in short], draw), worth

    def _check_same_rows(self, draw: str, *, other: bool) -> None:
        """Scores of other rows than a neighbour's cannot be ranked with its own."""
        if together.world() > 1:
            scorer = cast(Scorer, self.scorer)
            rows = self._together(lambda: scorer.drawn(draw, other=other))
            what = "the validation rows that rank slots are scored on"
            together.check_same([rows[name] for name in sorted(rows)], what, self._device)

    def _draw(self, number: int) -> str:
        return f"{self.choice.seed}/{number if self.choice.resample else 1}"

    def _count(self, kinds: int, modules: int) -> int:
        move = self.choice.move
        return {"types": kinds, "modules": modules}[move] if isinstance(move, str) else move

    def _together(self, measure: Callable[[], T]) -> T:
        """What this process measures, or an error on all of them: the next thing is that they exchange it."""
        return together.attempt(measure, "scoring rank slots", self._device)

    @property
    def _device(self) -> torch.device:
        return cast(Tensor, self.members[0].site.mask).device


def block_of(name: str) -> str:
    """The block that a module stands in: its name up to the first number; "" without one."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return found.group() if found else ""


def kind_of(name: str) -> str:
    """The name with its numbers left open: equal for the same module of all blocks."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", name)
