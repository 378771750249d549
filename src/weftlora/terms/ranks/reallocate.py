"""Reallocate: a fixed budget of rank slots, moved between sites while they train.

    ΔW_m = s Σ_i α_{m,i} B_m[:,i] A_m[i,:]        gates α ∈ {0, 1}; s = lora_alpha / r fixed at the initial rank

    score of a live slot i       [L(M∖i) − L(M)] + [L(∅) − L({i})]      last-in plus first-in; L is cross-entropy
    prune                        the n slots of lowest score
    U                            the modules that lost none
    add                          n new slots over U as evenly as possible, the remainder to the highest mean score; none where U is
                                 empty: the total falls by n, and rounds go on

M is the network with all live slots, M∖i without slot i, {i} with slot i alone and every other slot of the network off, ∅
the base. A new slot has A Kaiming and B = 0, so adding changes nothing.

Source: ALoRA with AB-LoRA scores, arXiv 2403.16187, equation 6 and algorithm 1. Its score S(M) − S(M∖i) + S({i}), with
S = −L, is the sum above minus a constant. Ours, where the paper is silent: the order among ties, s fixed, capacity, B = 0, when in
a run the rounds are. How many slots n is can be read in two ways: see `Reallocate.move`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from weftlora.errors import ConfigError, suggest
from weftlora.settings import Time, check_time, is_whole
from weftlora.terms.events import Controller, Timeline
from weftlora.terms.ranks import Ranks

WAYS = ("exact", "shortlist", "taylor")
GATE_STEPS, GATE_MOVE = 8, 0.5
"""Of the gates that `score="gate"` trains, and how far the first step moves the a' of largest slope: ours, the paper does not say."""
AUTO = tuple(f"{way} (auto)" for way in WAYS)
"""What "auto" is called once it is decided."""
ABLATIONS = ("sensitivity", "gate")
"""The scores that the paper compares its own with: of a slot as a whole, not of its brackets."""
SCORES = ("auto", *WAYS, *ABLATIONS, "random", "none", *AUTO)
EXPERT_ROOM = 1.25
"""Of an expert, its room for slots over its rank."""
NEED_DATA = ("auto", *WAYS, *ABLATIONS, *AUTO)


@dataclass(frozen=True)
class Reallocate(Ranks):
    """Move rank slots from where removing them costs least to where slots are worth most.

    Args:
        first: the first round: optimiser steps (int), a fraction of the run, or `weftlora.epochs(x)`. The paper's is after one
            epoch of at most 10, with early stopping; a third of the run is ours.
        every: between rounds, in the same units. The paper's is a quarter epoch; a twelfth of the run is ours.
        max_rounds: at most so many rounds (paper: 8); 0 never moves anything.
        move: slots moved per round: "types", as many as a block has kinds of adapted modules (n = 1 · N_mod, with N_mod as the
            paper defines it); "modules", as many as there are adapted modules (one eighth of the budget at r = 8, which its
            examples need); or a number. A round moves fewer where not so many can move, and says why.
        all_lost: what becomes of the rounds when every module has lost a slot in one: "go_on" (Algorithm 1), or "end", the rule
            of 0.1.0rc1, which also gave up slots that no module had room for. A run started with that rule keeps it.
        scope: "global", one ranking over the network; "block", each block ranks and moves its own `move` slots.
        unit: what the budget counts: "ranks" (the paper), or "params", so that new slots never cost more numbers than
            were freed.
        score: "exact"; "taylor", a second-order estimate from two backward passes; "shortlist", exact scores of the
            `shortlist_factor` · n slots of lowest estimate; "sensitivity", AdaLoRA's |w ∂L/∂w| (an ablation of the paper),
            averaged over the slot's row of A and its column of B; "gate", its other ablation: gates α' = 2 sigmoid(a') of the live
            slots, from a' = 0, trained on the round's rows for GATE_STEPS steps of descent, everything else as it is; "random"
            and "none" are controls. "auto" is exact where that costs at most a tenth of the training; else the shortlist, if that
            does, in rounds in which it can certify that no slot left out of it belongs to the lowest; else its estimate. It is
            decided once, from counts (`weftlora.schedule.scoring_cost`), and is called "taylor (auto)" and so on from then on.
        terms: which bracket counts: "both" (the paper), "last_in" or "first_in".
        rows: validation rows per round (paper: 32).
        resample: draw new rows each round; False keeps those of the first.
        shortlist_factor: see `score`.
        grace_rounds: for so many rounds a new slot cannot be taken away.
        revive: whether a module without slots may get new ones.
        max_rank: slots that a module has room for; None is twice its rank, of an expert a quarter more than its rank, since room costs
            parameters and moments for each of many experts. Never more than the smaller side of W.
        check: measure each round how well the score does: against the exact one, and the exact one against itself on other
            rows, which there must be. Costs two exact rounds.
        chunk_tokens: tokens per forward while scoring, where memory is short; None chooses.
        seed: of the rows, of new slots and of "random".
    """

    saves: ClassVar[Mapping[str, str]] = {
        "mask": "0 or 1 per rank slot",
        "birth": "the round that made the slot; 0: the start",
        "score": "of every slot, in the last round that scored it",
    }
    counts: ClassVar[Mapping[str, str]] = {
        "rounds": "rounds done",
        "ended": "whether no more rounds will come",
        "way": "where weftlora chooses how slots are scored: 0 before it has, else which way, from 1",
    }
    earlier: ClassVar[Mapping[int, Mapping[str, Any]]] = {1: {"all_lost": "end", "score": "exact"}}
    refuses: ClassVar[Mapping[str, str]] = {
        "Search": "ranks move in the training after the search, between the selected blocks"
    }
    equation_only: ClassVar[str | None] = "rank slots that move are rows of A and columns of B"

    first: Time = 1 / 3
    every: Time = 1 / 12
    max_rounds: int = 8
    move: Literal["types", "modules"] | int = "types"
    all_lost: Literal["go_on", "end"] = "go_on"
    scope: Literal["global", "block"] = "global"
    unit: Literal["ranks", "params"] = "ranks"
    score: Literal[
        "auto",
        "exact",
        "shortlist",
        "taylor",
        "sensitivity",
        "gate",
        "random",
        "none",
        "exact (auto)",
        "shortlist (auto)",
        "taylor (auto)",
    ] = "auto"
    terms: Literal["both", "last_in", "first_in"] = "both"
    rows: int = 32
    resample: bool = True
    shortlist_factor: int = 4
    grace_rounds: int = 0
    revive: bool = False
    max_rank: int | None = None
    check: bool = False
    chunk_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("first", "every"):
            object.__setattr__(self, name, check_time(getattr(self, name), f"Reallocate({name}=...)"))
        lowest = {"max_rounds": 0, "rows": 1, "shortlist_factor": 1, "grace_rounds": 0}
        for name, least in lowest.items():
            _check_whole(name, getattr(self, name), least)
        for name in ("max_rank", "chunk_tokens"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        if not is_whole(self.seed):
            raise ConfigError(f"Reallocate(seed={self.seed!r}) is not a seed: use a whole number.")
        if self.move not in ("types", "modules"):
            if isinstance(self.move, str):
                raise ConfigError(f"Reallocate(move={self.move!r}): {suggest(self.move, ['types', 'modules'])}")
            _check_whole("move", self.move, 1)
        for name, valid in _WORDS.items():
            if (value := getattr(self, name)) not in valid:
                raise ConfigError(f"Reallocate({name}={value!r}): {suggest(str(value), valid)}")
        for name in ("resample", "revive", "check"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"Reallocate({name}={value!r}) is neither true nor false: use one of the two.")

    @property
    def needs_data(self) -> bool:
        """Whether its rounds need validation rows."""
        return self.max_rounds > 0 and (self.score in NEED_DATA or (self.check and self.score == "random"))

    @property
    def auto(self) -> bool:
        """Whether weftlora chose, or is to choose, the way of scoring."""
        return self.score == "auto" or self.score in AUTO

    @property
    def way(self) -> str:
        """The way of scoring without who chose it; "auto" where that is not decided yet."""
        return self.score.removesuffix(" (auto)")

    def decided(self, way: str) -> Reallocate:
        """It with a way of scoring that "auto" has come to."""
        return replace(self, score=f"{way} (auto)")  # type: ignore[arg-type]

    def capacity(self, r: int, fan_in: int, out: int, *, experts: bool = False) -> int:
        """Slots to make room for at a site of initial rank r; at least r. `experts`: the site is one of many, of an expert each.

        Raises:
            ConfigError: max_rank is below r.
        """
        if self.max_rank is not None and self.max_rank < r:
            raise ConfigError(
                f"Reallocate(max_rank={self.max_rank}) is below the initial rank {r}: raise it to {r} or more."
            )
        usual = math.ceil(EXPERT_ROOM * r) if experts else 2 * r
        return max(r, min(self.max_rank or usual, fan_in, out))

    def state(self, r: int, room: int) -> dict[str, Tensor]:
        """r live slots, all of the start."""
        return {
            "mask": F.pad(torch.ones(r), (0, room)),
            "birth": torch.zeros(r + room, dtype=torch.long),
            "score": torch.zeros(r + room, dtype=torch.float64),
        }

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """The rounds."""
        return [timeline.move_slots(self)]


_WORDS = {
    "all_lost": ("go_on", "end"),
    "scope": ("global", "block"),
    "unit": ("ranks", "params"),
    "score": SCORES,
    "terms": ("both", "last_in", "first_in"),
}


def _check_whole(name: str, value: Any, least: int) -> None:
    if not is_whole(value, least):
        raise ConfigError(f"Reallocate({name}={value!r}) is out of range: use a whole number from {least} up.")


@dataclass(frozen=True)
class Slot:
    """A live slot, in plain numbers. `worth` goes into its module's mean; a slot that is not `able` cannot be pruned."""

    module: int
    slot: int
    score: float
    birth: int = 0
    worth: float | None = None
    able: bool = True

    @property
    def order(self) -> tuple[float, int, int, int]:
        """Pruned first is least: the lower score, then the younger, then the earlier in the network."""
        return self.score, -self.birth, self.module, self.slot


@dataclass(frozen=True)
class Room:
    """A module that slots can move into: the free slots it has, and what a slot of it costs."""

    module: int
    free: tuple[int, ...]
    cost: int = 1


@dataclass(frozen=True)
class Plan:
    """(module, slot) pairs: taken away, and newly made, both in the order of the decision."""

    pruned: tuple[tuple[int, int], ...] = ()
    added: tuple[tuple[int, int], ...] = ()
    receivers: tuple[int, ...] = field(default=())
    """U, best first: the modules that lost none and could receive."""
    clipped: tuple[str, ...] = ()
    """Why not as many were taken away as were to be, or not as many made as were taken away; as clauses."""


def decide(
    slots: Sequence[Slot],
    rooms: Sequence[Room],
    count: int,
    *,
    budget: int | None = None,
    revive: bool = False,
    fit: bool = True,
) -> Plan:
    """Which slots go, and where new ones are made.

    Args:
        slots: all live slots of the modules in `rooms`.
        count: slots to take away; fewer if fewer are able, or the modules would be left without any.
        budget: the most that all slots may cost after the round. None makes as many as were taken away, whatever they cost.
        revive: whether a module without a live slot is in U (last).
        fit: take away no more than modules that lost none have room for.
    """
    able = sorted((s for s in slots if s.able), key=lambda s: s.order)
    most, clipped = count, []
    if len(able) < min(most, len(slots)):
        most = len(able)
        clipped.append(f"only {most} of {len(slots)} slots could be taken away")
    if most >= len(slots):
        most = max(len(slots) - 1, 0)
        clipped.append("the last slot stays")
    plan = _of(able[:most], slots, rooms, budget, revive)
    if fit and budget is None and plan.receivers and len(plan.added) < most:
        fits, fails = len(plan.added), most  # with fewer taken away, more modules have room: a bisection finds the most
        while fails - fits > 1:
            middle = (fits + fails) // 2
            tried = _of(able[:middle], slots, rooms, budget, revive)
            fits, fails = (middle, fails) if len(tried.added) == middle or not tried.receivers else (fits, middle)
        plan = _of(able[:fits], slots, rooms, budget, revive)
        clipped.append(f"modules that lost none have room for {fits} (max_rank)")
    short = len(plan.pruned) - len(plan.added)
    if plan.pruned and not plan.receivers:
        clipped.append("every module lost a slot, so none were made")
    elif budget is None and short > 0:
        clipped.append(f"modules that lost none have no room for {short} (max_rank)")
    return replace(plan, clipped=tuple(clipped))


def _of(gone: Sequence[Slot], slots: Sequence[Slot], rooms: Sequence[Room], budget: int | None, revive: bool) -> Plan:
    """The plan that takes these slots away."""
    lost = {s.module for s in gone}
    worth: dict[int, list[float]] = {}
    for s in slots:
        worth.setdefault(s.module, []).append(s.score if s.worth is None else s.worth)
    mean = {module: sum(values) / len(values) for module, values in worth.items()}
    able = [room for room in rooms if room.module not in lost and (room.module in mean or revive)]
    receivers = sorted(able, key=lambda room: (-mean.get(room.module, float("-inf")), room.module))

    if budget is None:
        added = allocate([Room(room.module, room.free) for room in receivers], len(gone))
    else:
        cost = {room.module: room.cost for room in rooms}
        live = sum(cost[s.module] for s in slots) - sum(cost[s.module] for s in gone)
        added = allocate(receivers, budget - live)
    return Plan(tuple((s.module, s.slot) for s in gone), tuple(added), tuple(room.module for room in receivers))


def allocate(receivers: Sequence[Room], budget: int) -> list[tuple[int, int]]:
    """Deal new slots to the receivers in turn, one each, while there is room and budget.

    With every cost 1 and no module full this is the paper's division: q each, one more for the first `budget mod |U|`. What a
    full module cannot take goes on to the next.
    """
    free = {room.module: list(room.free) for room in receivers}
    added: list[tuple[int, int]] = []
    dealt = True
    while dealt:
        dealt = False
        for room in receivers:
            if free[room.module] and room.cost <= budget:
                added.append((room.module, free[room.module].pop(0)))
                budget -= room.cost
                dealt = True
    return added
