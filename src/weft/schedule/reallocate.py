"""Moving rank slots between sites: after each due step, score the live slots, decide, move.

    measure   the model on one fixed batch of validation rows, a slot off or alone      → two brackets per slot and row
    decide    scores, births, free slots → slots to take away and to make               (plain numbers; `terms.ranks.reallocate`)
    apply     the plan into masks, A, B and the optimisers' moments                     (`schedule.slots`)

With several processes each scores its share of the slots, the main one decides, and all hold the same masks or stop. A plan is
applied as a whole between two optimiser steps, so no checkpoint can hold half of one.

Source: ALoRA with AB-LoRA scores, arXiv 2403.16187.
"""

from __future__ import annotations

import math
import random
import re
import time as clocks
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from weft.errors import ConfigError
from weft.known import Known
from weft.schedule import slots as surgery
from weft.schedule import together
from weft.schedule.agreement import agreement, by_row, margin, scores
from weft.schedule.schedule import Event, Length, Member, check_possible
from weft.terms.ranks.reallocate import Plan, Reallocate, Room, Slot, decide
from weft.times import rounds

SlotId = tuple[int, int]
"""(number of the member, slot)."""


class Scorer(Protocol):
    """What measures slots; glue makes it from the model and its validation rows. Both return brackets [slots, 2, rows]."""

    def exact(self, slots: Sequence[SlotId], draw: str) -> Tensor:
        """By switching each slot off, and on alone, on the rows that `draw` seeds."""
        ...

    def estimate(self, slots: Sequence[SlotId], draw: str) -> Tensor:
        """To second order, from gradients with respect to the gates."""
        ...


@dataclass(frozen=True)
class Measured:
    """Live slots with what the decision needs, and the brackets of those that were scored exactly, or by estimate."""

    slots: list[Slot]
    scored: list[int] = field(default_factory=list)  # positions in `slots`
    brackets: Tensor | None = None  # [len(scored), 2, rows]


@dataclass(eq=False)
class ReallocateController:
    """Moves the rank slots of one adapter."""

    choice: Reallocate
    members: list[Member]
    scorer: Scorer | None = None
    what: str = field(default="moving ranks", init=False)
    _begun: bool = field(default=False, init=False)
    _rounds: Known[int] = field(default_factory=lambda: Known(int), init=False, repr=False)
    _ended: Known[bool] = field(default_factory=lambda: Known(bool), init=False, repr=False)

    def __post_init__(self) -> None:
        first = self.members[0].site
        first.register_buffer("rounds", torch.zeros((), dtype=torch.long))
        first.register_buffer("ended", torch.zeros((), dtype=torch.bool))

    # ------------------------------------------------------------------ when

    @property
    def rounds(self) -> int:
        """Rounds done so far."""
        return self._rounds.read(cast(Tensor, self.members[0].site.rounds))

    def due(self, length: Length) -> int | None:
        """See `Controller`."""
        steps = self._steps(length)
        return None if steps is None else steps[min(self.rounds, len(steps) - 1)]

    def _steps(self, length: Length) -> list[int] | None:
        c = self.choice
        return rounds(c.first, c.every, max(c.max_rounds, 1), length.total_steps, length.steps_per_epoch)

    def done(self) -> bool:
        """See `Controller`."""
        if self.choice.score == "none" or self.choice.max_rounds == 0:
            return True
        return self.rounds >= self.choice.max_rounds or self._ended.read(cast(Tensor, self.members[0].site.ended))

    def check(self, length: Length) -> None:
        """See `Controller`."""
        steps = self._steps(length)
        late = [time for time in (self.choice.first, self.choice.every) if not isinstance(time, int)]
        what = f"the last of {self.choice.max_rounds} rounds of moving ranks"
        check_possible(steps[-1] if steps else None, length, what, late[0] if late else self.choice.first)

    def before_step(self, step: int | None, length: Length) -> None:
        """See `Controller`."""

    def plan(self, step: int, length: Length, optimizer: Optimizer) -> Callable[[], Event] | None:
        """Score and decide the next round if its step has been reached; at the first step, refuse what could not work then."""
        if not self._begun:
            self._check_ready()
            self._begun = True
        due = self.due(length)
        if due is None or step < due:
            return None
        return self._decided(self.rounds + 1)

    def _check_ready(self) -> None:
        if self.choice.needs_data and self.scorer is None:
            raise ConfigError(
                f"Reallocate(score={self.choice.score!r}) scores rank slots on validation rows and was given none: call "
                "weft.attach(model, validation=rows_or_dataloader) before training, or use score='random'."
            )
        surgery.check_sliceable([member.site for member in self.members])
        for group, count in self._groups():
            live = sum(len(self.members[m].site.live()) for m in group)
            if count >= live:
                raise ConfigError(
                    f"Reallocate(move={self.choice.move!r}) takes {count} rank slots a round from modules that have {live}: "
                    "nothing would be left; move fewer."
                )

    # ------------------------------------------------------------------ one round

    def _decided(self, number: int) -> Callable[[], Event]:
        """Measure and decide a round; the function that is returned moves the slots, as a whole or not at all."""
        started = clocks.perf_counter()
        surgery.check_sliceable([member.site for member in self.members])
        self._check_same_masks()

        def decide_here() -> tuple[Measured, dict[str, Any], Plan]:
            found = self._measure(number)
            return found, self._checked(number, found) if self.choice.check else {}, self._plan(found)

        found, checked, plan = together.attempt(decide_here, "a round of moving ranks", self._device)
        plan = self._shared(plan)
        if len(found.slots) - len(plan.pruned) + len(plan.added) <= 0:
            raise ConfigError("moving ranks would leave no live slot in the network: move fewer, or do fewer rounds.")
        measured = clocks.perf_counter() - started
        return lambda: self._moved(number, found, plan, checked, measured)

    def _moved(self, number: int, found: Measured, plan: Plan, checked: dict[str, Any], measured: float) -> Event:
        started = clocks.perf_counter()
        self._apply(number, found, plan)
        self._check_same_masks()
        return {
            "event": "reallocation",
            "round": number,
            "score": self.choice.score,
            "slots": len(found.slots) - len(plan.pruned) + len(plan.added),
            "parameters": sum(len(m.site.live()) * surgery.cost(m.site) for m in self.members),
            **self._story(found, plan),
            **checked,
            "seconds": measured + clocks.perf_counter() - started,
        }

    def _check_same_masks(self) -> None:
        together.check_same([cast(Tensor, member.site.mask) for member in self.members], "rank masks", self._device)

    @property
    def _device(self) -> torch.device:
        return cast(Tensor, self.members[0].site.mask).device

    def _live(self) -> list[SlotId]:
        return [(m, slot) for m, member in enumerate(self.members) for slot in member.site.live()]

    def _draw(self, number: int) -> str:
        return f"{self.choice.seed}/{number if self.choice.resample else 1}"

    def _measure(self, number: int) -> Measured:
        ids = self._live()
        births = [int(self.members[m].site.birth[slot]) for m, slot in ids]  # type: ignore[index]
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

    def _brackets(self, ids: list[SlotId], young: list[bool], draw: str) -> tuple[list[int], Tensor, list[float]]:
        """Positions of the slots that may be pruned on their score, their brackets, and what every slot is worth."""
        everything, terms = list(range(len(ids))), self.choice.terms
        if self.choice.score == "exact":
            found = self._exact(ids, draw)
            return everything, found, scores(found, terms)
        scorer = cast(Scorer, self.scorer)
        estimate = together.from_main(self._together(lambda: scorer.estimate(ids, draw)), self._device)
        worth = scores(estimate, terms)
        if self.choice.score == "taylor":
            return everything, estimate, worth
        short: list[int] = []
        for group, count in self._groups():
            mine = [n for n in everything if ids[n][0] in group and not young[n]]
            short += sorted(mine, key=lambda n: (worth[n], n))[: self.choice.shortlist_factor * count]
        short.sort()
        return short, self._exact([ids[n] for n in short], draw), worth

    def _exact(self, ids: list[SlotId], draw: str) -> Tensor:
        """Exact brackets; those of slots that contribute nothing are exactly 0 and cost nothing."""
        silent: set[SlotId] = set()
        for m in {m for m, _ in ids}:
            mine = [slot for module, slot in ids if module == m]
            quiet = surgery.silent(self.members[m].site, mine)
            silent |= {(m, slot) for slot, still in zip(mine, quiet, strict=True) if still}
        loud = [n for n, each in enumerate(ids) if each not in silent]
        mine = loud[together.rank() :: together.world()]
        scorer = cast(Scorer, self.scorer)
        found = self._together(lambda: scorer.exact([ids[n] for n in mine], draw))
        out = torch.zeros(len(ids), *found.shape[1:], dtype=torch.float64)
        out[mine] = found
        return together.total(out, self._device)

    def _together(self, measure: Callable[[], Tensor]) -> Tensor:
        """What this process measures, or an error on all of them: the next thing is that they exchange it."""
        return together.attempt(measure, "scoring rank slots", self._device)

    def _plan(self, found: Measured) -> Plan:
        plans = []
        for group, count in self._groups():
            rooms = [self._room(m) for m in group]
            mine = [slot for slot in found.slots if slot.module in group]
            budget = self._budget(group) if self.choice.unit == "params" else None
            plans.append(decide(mine, rooms, count, budget=budget, revive=self.choice.revive))
        return Plan(*(tuple(each for one in part for each in one) for part in zip(*map(_parts, plans), strict=True)))

    def _room(self, m: int) -> Room:
        site = self.members[m].site
        live = set(site.live())
        capacity = len(cast(Tensor, site.mask))
        return Room(m, tuple(slot for slot in range(capacity) if slot not in live), surgery.cost(site))

    def _budget(self, group: Sequence[int]) -> int:
        """What the group's slots cost at the start."""
        sites = [self.members[m].site for m in group]
        return sum(site.initial_rank * surgery.cost(site) for site in sites)

    def _groups(self) -> list[tuple[list[int], int]]:
        """Members that are ranked together, and how many slots move among them per round."""
        blocks: dict[str, list[int]] = {}
        for m, member in enumerate(self.members):
            blocks.setdefault(block_of(member.name), []).append(m)
        kinds = {block: len({kind_of(self.members[m].name) for m in group}) for block, group in blocks.items()}
        if self.choice.scope == "block":
            return [(group, self._count(kinds[block], len(group))) for block, group in blocks.items()]
        everything = list(range(len(self.members)))
        return [(everything, self._count(max(kinds.values()), len(everything)))]

    def _count(self, kinds: int, modules: int) -> int:
        move = self.choice.move
        return {"types": kinds, "modules": modules}[move] if isinstance(move, str) else move

    def _shared(self, plan: Plan) -> Plan:
        """The main process' plan."""
        parts = [torch.tensor(part, dtype=torch.long).reshape(-1, 2) for part in (plan.pruned, plan.added)]
        pruned, added = (together.from_main(part, self._device).tolist() for part in parts)
        receivers = together.from_main(torch.tensor(plan.receivers, dtype=torch.long), self._device).tolist()
        return Plan(tuple(map(tuple, pruned)), tuple(map(tuple, added)), tuple(receivers))

    def _apply(self, number: int, found: Measured, plan: Plan) -> None:
        """All of the plan, or, if something is wrong with it, nothing."""
        jobs = []
        for m in sorted({m for m, _ in (*plan.pruned, *plan.added)}):
            gone, made = ([slot for module, slot in part if module == m] for part in (plan.pruned, plan.added))
            rows = [self._new_row(number, m, slot) for slot in made]
            jobs.append((self.members[m].site, gone, made, rows))
        for slot in found.slots:
            self.members[slot.module].site.score[slot.slot] = slot.score  # type: ignore[operator]
        for site, gone, made, rows in jobs:
            surgery.move(site, gone, made, rows, number)
        first = self.members[0].site
        cast(Tensor, first.rounds).fill_(number)
        cast(Tensor, first.ended).fill_(not plan.receivers)  # every module lost a slot: the paper's rounds end here

    def _new_row(self, number: int, m: int, slot: int) -> Tensor:
        member = self.members[m]
        seed = random.Random(f"{self.choice.seed}/{number}/{member.name}/{slot}").getrandbits(63)
        return member.site.fresh_row(torch.Generator().manual_seed(seed))

    # ------------------------------------------------------------------ what is told

    def _story(self, found: Measured, plan: Plan) -> Event:
        name = [member.name for member in self.members]
        by_id = {(slot.module, slot.slot): slot for slot in found.slots}
        values = sorted(slot.score for slot in found.slots)
        story: Event = {
            "pruned": [[name[m], slot, by_id[m, slot].score] for m, slot in plan.pruned],
            "added": [[name[m], slot] for m, slot in plan.added],
            "ranks": {member.name: len(member.site.live()) for member in self.members},
            "scored": len(found.scored),
            "lowest": values[0],
            "median": values[len(values) // 2],
            "highest": values[-1],
        }
        if found.brackets is not None and len(found.scored) > 1:
            last_in, first_in = found.brackets.sum(2).std(0).tolist()
            story |= {"spread": {"last_in": last_in, "first_in": first_in}}
            story |= self._certainty(found, plan)
        return story

    def _certainty(self, found: Measured, plan: Plan) -> Event:
        if self.choice.scope == "block" or self.choice.grace_rounds or found.brackets is None:
            return {}  # there is no one cut
        if (cut := margin(found.brackets, self.choice.terms, len(plan.pruned))) is None:
            return {}
        gap, noise = cut
        if gap < noise and together.rank() == 0:
            warnings.warn(
                f"which rank slots move is within the noise of {by_row(found.brackets, 'both').shape[1]} validation rows: give "
                "Reallocate(rows=...) more of them, or take the moves as partly random.",
                stacklevel=2,
            )
        return {"margin": gap, "noise": noise if math.isfinite(noise) else None}

    def _checked(self, number: int, found: Measured) -> Event:
        """The score in use against the exact one, and the exact one against itself on other rows."""
        ids, terms = [(slot.module, slot.slot) for slot in found.slots], self.choice.terms
        count = sum(count for _, count in self._groups())
        exact = self.choice.score == "exact" and found.brackets is not None
        truth = scores(found.brackets if exact else self._exact(ids, self._draw(number)), terms)  # type: ignore[arg-type]
        other = scores(self._exact(ids, f"{self._draw(number)}/other rows"), terms)
        told = {"exact_on_other_rows": agreement(other, truth, count)}
        if not exact:
            worst = max(slot.score for slot in found.slots) + 1
            guess = [slot.score if slot.able else worst for slot in found.slots]
            told["score_in_use"] = agreement(guess, truth, count)
        return {"agreement": told}


def _parts(plan: Plan) -> tuple[tuple[SlotId, ...], tuple[SlotId, ...], tuple[int, ...]]:
    return plan.pruned, plan.added, plan.receivers


def block_of(name: str) -> str:
    """The block that a module stands in: its name up to the first number; "" without one."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return found.group() if found else ""


def kind_of(name: str) -> str:
    """The name with its numbers left open: equal for the same module of all blocks."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", name)
