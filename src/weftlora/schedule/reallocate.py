"""Moving rank slots between sites: after each due step, score the live slots, decide, move.

    measure   the model on one fixed batch of validation rows, a slot off or alone      → two brackets per slot and row
              (`schedule.rank_slots`)
    decide    scores, births, free slots → slots to take away and to make               (plain numbers; `terms.ranks.reallocate`)
    apply     the plan into masks, A, B and the optimisers' moments                     (`schedule.rank_slots`)

With several processes the main one decides, and all hold the same masks or stop. A plan is applied as a whole between two optimiser
steps, so no checkpoint can hold half of one. What must fail for every outcome is refused at the first step; a round that cannot move
all of its slots moves as many as can, and one that cannot be scored moves none: the event says why.

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
from weftlora.errors import ApartError, ConfigError, WeftError
from weftlora.progress import Progress, ignore
from weftlora.schedule import processes
from weftlora.schedule import rank_slots as surgery
from weftlora.schedule.rank_slots import Measured, Scorer, Scoring, SlotId, by_row, margin
from weftlora.schedule.schedule import Member
from weftlora.schedule.scoring_cost import Counts
from weftlora.settings import rounds
from weftlora.terms.events import Event, Length, SlotMoves, Validation, check_possible
from weftlora.terms.ranks.reallocate import ABLATIONS, WAYS, Plan, Room, decide


@dataclass(eq=False)
class ReallocateController:
    """Moves the rank slots of one adapter."""

    choice: SlotMoves
    members: list[Member]
    scorer: Scorer | None = None
    what: str = field(default="moving ranks", init=False)
    config: Any = field(default=None, init=False, repr=False)
    """The host's config of the adapter, which is told the way of scoring that "auto" comes to; None where there is none."""
    on_progress: Progress = field(default_factory=lambda: ignore, init=False, repr=False)
    given: int | None = field(default=None, init=False)
    row_tokens: float | None = field(default=None, init=False)
    _begun: bool = field(default=False, init=False)
    _rounds: Remembered[int] = field(default_factory=lambda: Remembered(int), init=False, repr=False)
    _ended: Remembered[bool] = field(default_factory=lambda: Remembered(bool), init=False, repr=False)

    def __post_init__(self) -> None:
        first = self.members[0].held
        first.register_counter("rounds", torch.zeros((), dtype=torch.long))
        first.register_counter("ended", torch.zeros((), dtype=torch.bool))
        if self.choice.auto:
            way = self.choice.way
            first.register_counter("way", torch.tensor(0 if way == "auto" else 1 + WAYS.index(way)))

    @property
    def scoring(self) -> Scoring:
        """What measures its slots."""
        return Scoring(self.choice, self.members, self.scorer, self.on_progress)

    # ------------------------------------------------------------------ which way of scoring

    def counts(self, length: Length) -> Counts:
        """What scoring costs, and what is known of the training it is part of."""
        c, groups = self.choice, self.scoring.groups()
        blocks = len({surgery.block_of(member.name) for member in self.members})
        left = max(c.max_rounds - self.rounds, 0)
        slots, moved = len(self.scoring.live()), sum(count for _, count in groups)
        rows = min(c.rows, self.given or c.rows)
        known = self.row_tokens, length.total_steps, length.tokens_per_step
        return Counts(slots, moved, blocks, left, rows, c.shortlist_factor, *known)

    def settle(self, length: Length, *, now: bool = False) -> None:
        """Decide what "auto" is, once: when all counts are known, or `now` with those that are.

        The way is a buffer, so a checkpoint brings its own back, on whatever machine; with several processes the main one's counts.
        """
        if not self.choice.auto:
            return
        kept = cast(Tensor, self.members[0].site.way)
        if kept.is_meta or cast(Tensor, self.members[0].site.mask).is_meta:  # there is nothing to count yet
            return
        counts = self.counts(length)
        known = self.scorer is not None and None not in (counts.row_tokens, counts.steps, counts.step_tokens)
        experts = any(member.expert is not None for member in self.members)  # too many slots to switch one by one
        if not int(kept) and (known or now or experts):
            kept.fill_(1 + WAYS.index("taylor" if experts else counts.way()))
        if now:
            processes.take_over([kept], self._device)
        if int(kept) and (way := WAYS[int(kept) - 1]) != self.choice.way:
            self.choice = self.choice.decided(way)
        if self.config is not None and getattr(self.config, "ranks", None) != self.choice:
            self.config.ranks = self.choice

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
        count = max(c.max_rounds, 1)
        return rounds(c.first, c.every, count, length.total_steps, length.steps_per_epoch, length.begins)

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
        if not cast(Tensor, self.members[0].site.mask).is_meta and self.rounds == 0:
            self._check_can_move()

    def before_step(self, step: int | None, length: Length) -> None:
        """See `Controller`."""

    def take_rows(self, rows: Validation) -> bool:
        """See `Controller`: slots are scored on them."""
        choice, given = self.choice, rows.count
        self.given, self.row_tokens = given, rows.tokens
        if choice.check and choice.needs_data and given <= choice.rows:
            raise ConfigError(
                f"{choice.title}(check=True) compares scores on {choice.rows} rows with scores on others, and {given} were given: "
                "give more, or leave check out."
            )
        if choice.needs_data and given < choice.rows:
            warnings.warn(
                f"{choice.title}(rows={choice.rows}) scores on that many validation rows and {given} were given, so every round "
                "scores on all of them: give more, or lower rows.",
                stacklevel=4,
            )
        self.scorer = rows.slots(choice)
        return True

    def plan(self, step: int, length: Length, optimizer: Optimizer) -> Callable[[], Event] | None:
        """Score and decide the next round if its step has been reached; at the first step, refuse what could not work then."""
        if not self._begun:
            self.settle(length, now=True)
            self._check_ready()
            self._begun = True
        due = self.due(length)
        if due is None or step < due:
            return None
        return self._decided(self.rounds + 1)

    def _check_ready(self) -> None:
        if self.choice.needs_data and self.scorer is None:
            raise ConfigError(
                f"{self.choice.title}(score={self.choice.way!r}) decides on validation rows where rank moves and was given none: call "
                "weftlora.attach(model, validation=rows_or_dataloader) before training, or use score='random'."
            )
        surgery.check_sliceable([member.site for member in self.members])
        if self.rounds == 0:
            self._check_can_move()
        if self.choice.needs_data and not self.done():
            estimated = self.choice.way in ("taylor", "shortlist", *ABLATIONS)
            scorer = cast(Scorer, self.scorer)
            lockstep = self.scoring.in_lockstep
            processes.attempt(
                lambda: scorer.check(estimated=estimated), "scoring rank slots", self._device, lockstep=lockstep
            )

    def _check_can_move(self) -> None:
        """Refuse what no score could make possible, at the start; later rounds do what they can."""
        groups = self.scoring.groups()
        live = [sum(len(self.members[m].site.live()) for m in group) for group, _ in groups]
        if all(len(group) < 2 for group, _ in groups):
            raise ConfigError(
                f"{self.choice.title}(scope={self.choice.scope!r}) has one adapted module and moves rank between modules: "
                "target two or more" + ("." if self.choice.scope == "global" else ", or use scope='global'.")
            )
        if all(count >= there for (_, count), there in zip(groups, live, strict=True)):
            raise ConfigError(
                f"{self.choice.title}(move={self.choice.move!r}) takes {groups[0][1]} ranks a round from modules that have "
                f"{live[0]}: nothing would be left; move fewer."
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

        try:  # in a lockstep all that can fail on one process alone is agreed inside
            found, checked, plan = (
                decide_here()
                if scoring.in_lockstep
                else processes.attempt(decide_here, "a round of moving ranks", self._device)
            )
        except ApartError:
            raise
        except WeftError as error:  # on all processes; training is worth more than a round
            warnings.warn(f"round {number} of moving ranks moves nothing: {error}", stacklevel=2)
            reason = str(error)
            return lambda: self._skipped(number, reason, clocks.perf_counter() - started)
        plan = self._shared(plan)
        measured = clocks.perf_counter() - started
        return lambda: self._moved(number, found, plan, checked, measured)

    def _moved(self, number: int, found: Measured, plan: Plan, checked: dict[str, Any], measured: float) -> Event:
        started = clocks.perf_counter()
        self._apply(number, found, plan)
        self._check_same_masks()
        return {
            **self._layout(number),
            **self._story(found, plan),
            **checked,
            "seconds": measured + clocks.perf_counter() - started,
        }

    def _skipped(self, number: int, reason: str, seconds: float) -> Event:
        cast(Tensor, self.members[0].site.rounds).fill_(number)
        told: Event = {"pruned": [], "added": [], "asked": self._asked, "lost": 0, "clipped": [reason]}
        return {**self._layout(number), **told, "scored": 0, "seconds": seconds}

    def _layout(self, number: int) -> Event:
        ranks = {member.name: len(member.site.live()) for member in self.members}
        return {
            "event": "reallocation",
            "round": number,
            "score": self.choice.score,
            "slots": sum(ranks.values()),
            "parameters": sum(ranks[m.name] * surgery.cost(m.site) for m in self.members),
            "ranks": ranks,
        }

    @property
    def _asked(self) -> int:
        return sum(count for _, count in self.scoring.groups())

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
            fit = self.choice.all_lost != "end"
            plans.append(decide(mine, rooms, count, budget=budget, revive=self.choice.revive, fit=fit))
        pruned, added, receivers = (
            tuple(each for one in part for each in one) for part in zip(*map(_parts, plans), strict=True)
        )
        return Plan(pruned, added, receivers, tuple(dict.fromkeys(why for plan in plans for why in plan.clipped)))

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
        return Plan(tuple(map(tuple, pruned)), tuple(map(tuple, added)), tuple(receivers), plan.clipped)

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
        cast(Tensor, first.ended).fill_(self.choice.all_lost == "end" and not plan.receivers)

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
            "asked": self._asked,
            "lost": len(plan.pruned) - len(plan.added),
            **({"clipped": list(plan.clipped)} if plan.clipped else {}),
            "scored": len(found.scored),
            "lowest": values[0],
            "median": values[len(values) // 2],
            "highest": values[-1],
        }
        if found.brackets is not None and len(found.scored) > 1:
            last_in, first_in = found.brackets.sum(2).std(0).tolist()
            story |= {"spread": {"last_in": last_in, "first_in": first_in}}
            story |= self._certainty(found, plan)
        if (sure := found.certificate) is not None:
            distance = sure.distance if sure.distance is not None and math.isfinite(sure.distance) else None
            story["certificate"] = {"error": sure.error, "distance": distance, "holds": sure.holds}
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
