"""Moving rank slots between sites: after each due step, score the live slots, decide, move.

    measure   the model on one fixed batch of validation rows, a slot off or alone      → two brackets per slot and row
              (`schedule.rank_slots`)
    decide    scores, births, free slots → slots to take away and to make               (plain numbers; `terms.ranks.reallocate`)
    apply     the plan into masks, A, B and the optimisers' moments                     (`schedule.rank_slots`)

With several processes the main one decides, and all hold the same masks or stop. A plan is applied as a whole between two optimiser
steps, so no checkpoint can hold half of one.

Source: ALoRA with AB-LoRA scores, arXiv 2403.16187.
"""

from __future__ import annotations

import math
import random
import time as clocks
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from weftlora.adapter.buffers import Remembered
from weftlora.errors import ConfigError
from weftlora.schedule import processes
from weftlora.schedule import rank_slots as surgery
from weftlora.schedule.rank_slots import Measured, Scorer, Scoring, SlotId, by_row, margin
from weftlora.schedule.schedule import Member
from weftlora.settings import rounds
from weftlora.terms.events import Event, Length, SlotMoves, Validation, check_possible
from weftlora.terms.ranks.reallocate import Plan, Room, decide


@dataclass(eq=False)
class ReallocateController:
    """Moves the rank slots of one adapter."""

    choice: SlotMoves
    members: list[Member]
    scorer: Scorer | None = None
    what: str = field(default="moving ranks", init=False)
    _begun: bool = field(default=False, init=False)
    _rounds: Remembered[int] = field(default_factory=lambda: Remembered(int), init=False, repr=False)
    _ended: Remembered[bool] = field(default_factory=lambda: Remembered(bool), init=False, repr=False)

    def __post_init__(self) -> None:
        first = self.members[0].site
        first.register_counter("rounds", torch.zeros((), dtype=torch.long))
        first.register_counter("ended", torch.zeros((), dtype=torch.bool))

    @property
    def scoring(self) -> Scoring:
        """What measures its slots."""
        return Scoring(self.choice, self.members, self.scorer)

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

    def take_rows(self, rows: Validation) -> bool:
        """See `Controller`: slots are scored on them."""
        choice, given = self.choice, rows.count
        if choice.check and choice.needs_data and given <= choice.rows:
            raise ConfigError(
                f"{choice.title}(check=True) compares scores on {choice.rows} rows with scores on others, and {given} were given: "
                "give more, or leave check out."
            )
        if choice.needs_data and given < choice.rows:
            warnings.warn(
                f"{choice.title}(rows={choice.rows}) scores on so many validation rows and {given} were given, so every round scores "
                "on all of them: give more, or lower rows.",
                stacklevel=4,
            )
        self.scorer = rows.slots(choice)
        return True

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
                f"{self.choice.title}(score={self.choice.score!r}) scores rank slots on validation rows and was given none: call "
                "weftlora.attach(model, validation=rows_or_dataloader) before training, or use score='random'."
            )
        surgery.check_sliceable([member.site for member in self.members])
        for group, count in self.scoring.groups():
            live = sum(len(self.members[m].site.live()) for m in group)
            if count >= live:
                raise ConfigError(
                    f"{self.choice.title}(move={self.choice.move!r}) takes {count} rank slots a round from modules that have {live}: "
                    "nothing would be left; move fewer."
                )

    # ------------------------------------------------------------------ one round

    def _decided(self, number: int) -> Callable[[], Event]:
        """Measure and decide a round; the function that is returned moves the slots, as a whole or not at all."""
        started, scoring = clocks.perf_counter(), self.scoring
        surgery.check_sliceable([member.site for member in self.members])
        self._check_same_masks()

        def decide_here() -> tuple[Measured, dict[str, Any], Plan]:
            found = scoring.measure(number)
            return found, scoring.check(number, found) if self.choice.check else {}, self._plan(found)

        found, checked, plan = processes.attempt(decide_here, "a round of moving ranks", self._device)
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
        processes.check_same([cast(Tensor, member.site.mask) for member in self.members], "rank masks", self._device)

    @property
    def _device(self) -> torch.device:
        return cast(Tensor, self.members[0].site.mask).device

    def _plan(self, found: Measured) -> Plan:
        plans = []
        for group, count in self.scoring.groups():
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

    def _shared(self, plan: Plan) -> Plan:
        """The main process' plan."""
        parts = [torch.tensor(part, dtype=torch.long).reshape(-1, 2) for part in (plan.pruned, plan.added)]
        pruned, added = (processes.from_main(part, self._device).tolist() for part in parts)
        receivers = processes.from_main(torch.tensor(plan.receivers, dtype=torch.long), self._device).tolist()
        return Plan(tuple(map(tuple, pruned)), tuple(map(tuple, added)), tuple(receivers))

    def _apply(self, number: int, found: Measured, plan: Plan) -> None:
        """All of the plan, or, if something is wrong with it, nothing."""
        jobs = []
        for m in sorted({m for m, _ in (*plan.pruned, *plan.added)}):
            gone, made = ([slot for module, slot in part if module == m] for part in (plan.pruned, plan.added))
            rows = [self._new_row(number, m, slot) for slot in made]
            jobs.append((self.members[m].site, gone, made, rows))
        for slot in found.slots:
            cast(Tensor, self.members[slot.module].site.score)[slot.slot] = slot.score
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
        if gap < noise and processes.rank() == 0:
            warnings.warn(
                f"which rank slots move is within the noise of {by_row(found.brackets, 'both').shape[1]} validation rows: give "
                "Reallocate(rows=...) more of them, or take the moves as partly random.",
                stacklevel=2,
            )
        return {"margin": gap, "noise": noise if math.isfinite(noise) else None}


def _parts(plan: Plan) -> tuple[tuple[SlotId, ...], tuple[SlotId, ...], tuple[int, ...]]:
    return plan.pruned, plan.added, plan.receivers
