"""Rank slots of an adapter: scored, taken away and made, with what optimisers keep about them.

Scores come as brackets [slots, 2, rows] fp64: what each validation row adds to a slot's last-in (0) and first-in (1) term. Which
slots have them, and by which of the `Scorer`'s ways, is the choice's word:

    exact        both brackets of every live slot
    taylor       both brackets of every live slot, estimated
    shortlist    the slots of lowest estimate exactly; what every slot is worth to its module by the estimate
    sensitivity  no brackets: |w ∂L/∂w| of a slot's numbers, averaged over its part of each parameter and summed over these
    gate         no brackets: the slot's gate after some steps of descent on the rows' loss, from 1
    random       numbers drawn by name, slot and round

Beside them stands how far to trust them: how well two ways agree, and whether a decision is above the noise of its rows. Scoring
changes nothing. With several processes each scores its share of the slots, or, where a forward takes all of them, all slots on its
share of the rows, and all hold the same brackets.

Moving slots changes tensors and moments:

    prune    A_i = 0, B_i = 0, their moments 0, mask 0           nothing of a dead slot moves again: its gradient is exactly 0
    make     A_i given, B_i = 0, mask 1                          the function stays what it is
             first moments 0; second moments the mean of the surviving slots' of the same tensor

With β = 0.9, 0.999 and the step count that all slots of a tensor share, a second moment of 0 would give a new slot first steps
of 2.5 to 4.6 times the learning rate; seeded, they are a tenth of it and grow to it. A site without survivors counts its steps
from 0 again, which is exact. What belongs to surviving slots is not touched.

Source: ALoRA with AB-LoRA scores, arXiv 2403.16187.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weftlora.adapter.shards import edited, has_own_rows, is_piece, is_sharded, is_split_as, whole
from weftlora.adapter.site import ExpertOf, Site
from weftlora.errors import ConfigError
from weftlora.progress import Progress, ignore
from weftlora.schedule import processes, schedule
from weftlora.schedule.schedule import Member
from weftlora.terms.events import SlotMoves
from weftlora.terms.ranks.reallocate import ABLATIONS, Slot
from weftlora.terms.structure import SlotFirst

TERMS = {"both": (0, 1), "last_in": (0,), "first_in": (1,)}


def by_row(brackets: Tensor, terms: str) -> Tensor:
    """[slots, rows]: the scores before they are summed over rows."""
    return brackets[:, list(TERMS[terms])].sum(1)


def scores(brackets: Tensor, terms: str) -> list[float]:
    """One score per slot."""
    return by_row(brackets, terms).sum(1).tolist()


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; nan where one side is constant."""
    a, b = (_ranks(torch.tensor(values, dtype=torch.float64)) for values in (one, other))
    a, b = a - a.mean(), b - b.mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else math.nan


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's τ_b: agreeing minus disagreeing pairs over all pairs, pairs tied on a side taken out; nan if one is constant."""
    a, b = (_order(torch.tensor(values, dtype=torch.float64)) for values in (one, other))
    scale = float(a.abs().sum() * b.abs().sum()) ** 0.5
    return float((a * b).sum()) / scale if scale else math.nan


def _order(values: Tensor) -> Tensor:
    return torch.sign(values[:, None] - values[None, :])


def _ranks(values: Tensor) -> Tensor:
    less = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)
    return less.double() + (equal.double() - 1) / 2


def lowest(values: Sequence[float], count: int) -> list[int]:
    """The positions of the `count` lowest values, ties by position."""
    return sorted(range(len(values)), key=lambda i: (values[i], i))[:count]


def agreement(guess: Sequence[float], truth: Sequence[float], count: int) -> dict[str, Any]:
    """Spearman's and Kendall's correlation; overlap of the `count` lowest; regret.

    Regret is what the choice by `guess` loses in truth, relative to the sum over the truly lowest.
    """
    chosen, right = lowest(guess, count), lowest(truth, count)
    best = sum(truth[i] for i in right)
    lost = sum(truth[i] for i in chosen) - best
    rho, tau = spearman(guess, truth), kendall(guess, truth)
    return {
        "spearman": rho if math.isfinite(rho) else None,
        "kendall": tau if math.isfinite(tau) else None,
        "overlap": len(set(chosen) & set(right)) / max(count, 1),
        "regret": lost / abs(best) if best else None,
    }


def margin(brackets: Tensor, terms: str, count: int) -> tuple[float, float] | None:
    """The gap in score between the last slot below the cut and the first above it, and the gap's standard error over rows.

    None where nothing is above the cut. The error is nan on a single row.
    """
    rows = by_row(brackets, terms)
    order = lowest(rows.sum(1).tolist(), count + 1)
    if not 0 < count < len(rows):
        return None
    gap = rows[order[count]] - rows[order[count - 1]]
    noise = float(gap.std() * math.sqrt(len(gap))) if len(gap) > 1 else math.nan
    return float(gap.sum()), noise


FIRST = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})
PROBED = (16, 1024)
"""Of the matrix on which an optimiser is tried: 8-bit ones keep small matrices in 32 bits."""


def by_slot(site: Site) -> list[tuple[nn.Parameter, SlotFirst]]:
    """The parameters that have a part per slot, A first, and how to see a tensor of their shape with the slots first (a view)."""
    return site.by_slot()


def cost(site: Site) -> int:
    """How many trainable parameters one slot of the site has."""
    if is_sharded(site):
        return site.slot_parameters
    parts = [view(p) for p, view in by_slot(site)]
    return sum(part.numel() for part in parts) // len(parts[0])


def are_silent(site: Site, slots: Sequence[int]) -> list[bool]:
    """Which of the slots contribute exactly nothing: B is 0, and no router reads them."""
    with whole(site):
        parts = [view(p.detach())[list(slots)].flatten(1) for p, view in by_slot(site)[1:]]
    return (torch.cat(parts, 1) == 0).all(1).tolist() if slots else []


def check_sliceable(sites: Sequence[Site]) -> None:
    """Raise `ConfigError`, naming the optimiser, if what it keeps about A or B is not known to lie slot by slot."""
    for site in sites:
        for parameter, _ in by_slot(site):
            for optimizer, name, value in _kept(parameter):
                _check_lies_by_slot(optimizer, name, value, parameter)


def check_optimizer(make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    """Find before training what `check_sliceable` would find after its first step, by a step on a matrix of its own.

    Args:
        make: an optimiser of these parameters. One that cannot be made or does not step on a matrix alone is left to the first step.

    Raises:
        ConfigError: as of `check_sliceable`.
    """
    probe = nn.Parameter(torch.zeros(PROBED))
    probe.grad = torch.ones_like(probe)
    try:
        optimizer = make([probe])
        optimizer.step()
    except Exception:  # whatever a library's optimiser asks for beside parameters with a gradient
        return
    for name, value in _tensors(optimizer, probe):
        _check_lies_by_slot(optimizer, name, value, probe)


def _check_lies_by_slot(optimizer: Optimizer, name: str, value: Tensor, parameter: nn.Parameter) -> None:
    if name not in FIRST | SECOND or not is_split_as(value, parameter):
        raise ConfigError(
            f"{type(optimizer).__name__} keeps a state {name!r} ({type(value).__name__} {list(value.shape)}) for a matrix "
            f"{list(parameter.shape)} that cannot be taken apart by rank, so rank cannot move between modules: train "
            "with AdamW, Adam or SGD (not an 8-bit or factored optimiser), or use ranks=Uniform()."
        )


@torch.no_grad()
def move(site: Site, pruned: Sequence[int], made: Sequence[int], rows: Sequence[Tensor], birth: int) -> None:
    """Take slots away and make others, in this order.

    Args:
        rows: the new row of A [in] of each slot in `made`.
        birth: number of the round, kept for the new slots.
    """
    mask, births, score = (getattr(site, name) for name in ("mask", "birth", "score"))
    survivors = sorted(set(site.live()) - set(pruned))
    changed = [*pruned, *made]
    with whole(site):  # how to see them by slot is said of whole tensors
        views = [view for _, view in by_slot(site)]
    for number, (parameter, view) in enumerate(zip([p for p, _ in by_slot(site)], views, strict=True)):
        with edited(parameter) as value:
            view(value)[changed] = 0
            if number == 0:
                for slot, row in zip(made, rows, strict=True):
                    view(value)[slot] = row.to(value)
        for name, held in _split_with(parameter):
            with edited(held, parameter) as value:
                if name == "grad":
                    view(value)[changed] = 0
                    continue
                seed: Tensor | int = 0
                if name in SECOND and survivors:
                    seed = view(value)[survivors].mean(0)
                elif (
                    name in SECOND and site.part_of is not None
                ):  # the other experts' steps are counted in the same number
                    seed = _of_others(site, parameter, value)
                view(value)[pruned] = 0
                view(value)[made] = seed
        if made and not survivors and site.part_of is None:
            for optimizer in schedule.owners(parameter):
                _count_anew(optimizer.state.get(parameter, {}))
    for buffer, gone, new in ((mask, 0, 1), (births, 0, birth), (score, 0, 0)):
        buffer[pruned] = gone
        buffer[made] = new
    if site.start is not None:  # its frozen twins are of the slots that were
        site.start.clear(changed)


def _split_with(parameter: nn.Parameter) -> list[tuple[str, Tensor]]:
    """The gradient of `parameter` and what optimisers keep about it, on all processes the same: who holds no number of it under
    FSDP1 has neither, and takes part with nothing."""
    found = [(name, value) for _, name, value in _kept(parameter)]
    if parameter.grad is not None:
        found.append(("grad", parameter.grad))
    if not is_piece(parameter):
        return found
    named, empty = dict(found), parameter.detach().new_empty(parameter.shape)
    return [(name, named.get(name, empty)) for name in processes.all_names(list(named))]


def _of_others(site: Site, parameter: nn.Parameter, value: Tensor) -> Tensor | int:
    """What an optimiser keeps about a live slot of the other experts of the batch, on average; 0 where none has one."""
    batch, own = cast(ExpertOf, site.part_of)
    parts = []
    for e in range(batch.experts):
        if e != own and (live := (other := batch.expert(e)).live()):
            parts.append(dict(by_slot(other))[parameter](value)[live])
    return torch.cat(parts).mean(0) if parts else 0


def _kept(parameter: nn.Parameter) -> Iterator[tuple[Optimizer, str, Tensor]]:
    """What optimisers keep about `parameter` that is more than one number."""
    for optimizer in schedule.owners(parameter):
        if parameter in optimizer.state:
            yield from ((optimizer, name, value) for name, value in _tensors(optimizer, parameter))


def _tensors(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """Of what one of them keeps about it."""
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.dim() > 0:
            yield name, value


ADAM = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "mu_product", "step"})
"""What torch's Adam, AdamW and NAdam keep, which at 0 is what they begin with."""


@torch.no_grad()
def begin_anew(state: dict[str, Any], parameter: nn.Parameter) -> bool:
    """Set what an optimiser keeps about `parameter` to what it begins with; False where that is not known, and nothing is set."""
    tensors = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
    if "exp_avg" not in state or not state.keys() <= ADAM or not all(is_split_as(t, parameter) for t in tensors):
        return False
    for value in tensors:
        value.zero_()
    _count_anew(state)
    return True


def _count_anew(state: dict[str, Any]) -> None:
    if isinstance(step := state.get("step"), Tensor):
        step.zero_()
    elif step is not None:
        state["step"] = 0
    if isinstance(product := state.get("mu_product"), Tensor):  # NAdam's running product
        product.fill_(1)


T = TypeVar("T")
_WHAT = "scoring rank slots"
SlotId = tuple[int, int]
"""(number of the member, slot)."""


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one of several processes measures, as many as any other does: their forwards wait for each other.

    Where the rows do not divide, the last ones of some shares are measured again and count for nobody.
    """

    number: int
    count: int

    def of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its part of a batch."""
        if self.count == 1:
            return dict(batch)
        rows = len(batch["labels"])
        at = self._at(rows)
        at += [0] * (math.ceil(rows / self.count) - len(at))
        return {name: value[torch.tensor(at, device=value.device)] for name, value in batch.items()}

    def among_all(self, found: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """What was measured of its rows [..., rows of the part], in their places among all rows; 0 in the others."""
        if self.count == 1:
            return found
        at = self._at(rows := len(batch["labels"]))
        out = found.new_zeros(*found.shape[:-1], rows)
        out[..., at] = found[..., : len(at)]
        return out

    def _at(self, rows: int) -> list[int]:
        return list(range(self.number, rows, self.count))


ALL = Share(0, 1)


class Scorer(Protocol):
    """What measures slots; `weftlora.host.attach` makes it from the model and its validation rows."""

    def drawn(self, draw: str, *, other: bool = False) -> Mapping[str, Tensor]:
        """The rows that `draw` seeds; with `other`, as many that it does not take."""
        ...

    def exact(self, slots: Sequence[SlotId], draw: str, *, other: bool = False, share: Share = ALL) -> Tensor:
        """Brackets [slots, 2, rows] by switching each slot off, and on alone, on these rows; shares add up to all of them."""
        ...

    def estimate(self, slots: Sequence[SlotId], draw: str, *, share: Share = ALL) -> Tensor:
        """Brackets [slots, 2, rows] to second order, from gradients with respect to the gates; shares add up to all of them."""
        ...

    def sensitivity(self, slots: Sequence[SlotId], draw: str) -> Tensor:
        """[slots] fp64: |w ∂L/∂w|, averaged over the slot's part of every parameter, summed over these."""
        ...

    def gates(self, slots: Sequence[SlotId], draw: str) -> Tensor:
        """[slots] fp64: gates α' = 2 sigmoid(a') of the slots, trained on these rows from a' = 0."""
        ...

    def check(self, *, estimated: bool) -> None:
        """Raise ConfigError where no row has a label that counts, or the model gives no estimates and these are wanted."""
        ...

    def watch(self, progress: Progress) -> None:
        """Tell `progress` how far a round is."""
        ...


CERTAIN = 2.0
"""Errors of the estimate that a shortlist's first excluded slot must lie above its last taken one."""


@dataclass(frozen=True)
class Certificate:
    """How sure it is that no slot outside a shortlist belongs to the lowest.

    `error`: standard deviation of estimate − exact over the shortlist. `distance`: how far the estimate of the first slot left out
    lies above the exact score of the last one taken, in errors; None where nothing was left out.
    """

    error: float
    distance: float | None

    @property
    def holds(self) -> bool:
        """Whether the shortlist's decision is that of exact scores, as far as the error can tell."""
        return self.distance is None or self.distance >= CERTAIN


def certify(exact: Sequence[float], estimate: Sequence[float], excluded: Sequence[float], count: int) -> Certificate:
    """Of a shortlist with these exact and estimated scores, from which the `count` lowest are taken.

    The mean of estimate − exact is taken out of those that were left out: it moves no rank.
    """
    apart = torch.tensor(estimate, dtype=torch.float64) - torch.tensor(exact, dtype=torch.float64)
    error = float(apart.std(correction=0)) if len(apart) else 0.0
    if not excluded or not exact:
        return Certificate(error, None)
    gap = min(excluded) - float(apart.mean()) - sorted(exact)[min(count, len(exact)) - 1]
    return Certificate(error, gap / error if error else math.copysign(math.inf, gap))


@dataclass(frozen=True)
class Measured:
    """Live slots with what the decision needs, and the brackets of those that were scored exactly, or by estimate."""

    slots: list[Slot]
    scored: list[int] = field(default_factory=list)  # positions in `slots`
    brackets: Tensor | None = None  # [len(scored), 2, rows]
    certificate: Certificate | None = None


@dataclass(frozen=True)
class Scoring:
    """Measures the slots of one adapter. All processes must call `measure`, `check` and `exact`."""

    choice: SlotMoves
    members: list[Member]
    scorer: Scorer | None
    progress: Progress = ignore

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
        certificate = None
        if self.scorer is not None:
            self.scorer.watch(self.progress)
        if self.choice.way == "random":
            dice = [random.Random(f"{self.choice.seed}/{number}/{self.members[m].name}/{slot}") for m, slot in ids]
            values, scored, brackets = [die.random() for die in dice], list[int](), None
            worth = values
        elif self.choice.way in ABLATIONS:
            scorer = cast(Scorer, self.scorer)
            measure = scorer.gates if self.choice.way == "gate" else scorer.sensitivity
            self._check_same_rows(self._draw(number), other=False)
            measured = self._together(lambda: measure(ids, self._draw(number)))
            values = worth = processes.from_main(measured, self._device).tolist()
            scored, brackets = list[int](), None
        else:
            scored, brackets, worth, certificate = self._brackets(ids, young, self._draw(number))
            values = list(worth)
            for position, value in zip(scored, scores(brackets, self.choice.terms), strict=True):
                values[position] = value
        able = set(range(len(ids))) if brackets is None else set(scored)
        if not all(map(math.isfinite, [*values, *worth])):
            raise ConfigError(
                "the scores that decide where rank moves are not finite: the training has diverged, lower the learning rate."
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
            certificate,
        )

    def check(self, number: int, found: Measured) -> dict[str, Any]:
        """The score in use against the exact one, and the exact one against itself on other rows: plain numbers to tell."""
        ids, terms = [(slot.module, slot.slot) for slot in found.slots], self.choice.terms
        count = sum(count for _, count in self.groups())
        exact = self.choice.way == "exact" and found.brackets is not None
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
            quiet = are_silent(self.members[m].site, mine)
            silent |= {(m, slot) for slot, still in zip(mine, quiet, strict=True) if still}
        loud = [n for n, each in enumerate(ids) if each not in silent]
        scorer = cast(Scorer, self.scorer)
        if self.in_lockstep:
            share = self._share
            found = self._together(lambda: scorer.exact([ids[n] for n in loud], draw, other=other, share=share))
            out = torch.zeros(len(ids), *found.shape[1:], dtype=torch.float64)
            out[loud] = self._joined(found, share)
            return out
        mine = loud[processes.rank() :: processes.world()]
        found = self._together(lambda: scorer.exact([ids[n] for n in mine], draw, other=other))
        out = torch.zeros(len(ids), *found.shape[1:], dtype=torch.float64)
        out[mine] = found
        processes.sum_up([out], self._device)
        return out

    def _brackets(
        self, ids: list[SlotId], young: list[bool], draw: str
    ) -> tuple[list[int], Tensor, list[float], Certificate | None]:
        """Positions of the slots that may be pruned on their score, their brackets, what every slot is worth, and a shortlist's
        certificate."""
        everything, terms = list(range(len(ids))), self.choice.terms
        if self.choice.way == "exact":
            found = self.exact(ids, draw)
            return everything, found, scores(found, terms), None
        scorer = cast(Scorer, self.scorer)
        share = self._share
        estimate = self._joined(self._together(lambda: scorer.estimate(ids, draw, share=share)), share)
        worth = scores(estimate, terms)
        if self.choice.way == "taylor":
            return everything, estimate, worth, None
        short: list[int] = []
        parts: list[tuple[list[int], list[int], int]] = []
        for group, count in self.groups():
            mine = [n for n in everything if ids[n][0] in group and not young[n]]
            mine.sort(key=lambda n: (worth[n], n))
            cut = self.choice.shortlist_factor * count
            parts.append((mine[:cut], mine[cut:], count))
            short += mine[:cut]
        short.sort()
        found = self.exact([ids[n] for n in short], draw)
        truth = dict(zip(short, scores(found, terms), strict=True))
        each = [
            certify([truth[n] for n in mine], [worth[n] for n in mine], [worth[n] for n in left], count)
            for mine, left, count in parts
        ]
        weakest = min(each, key=lambda one: math.inf if one.distance is None else one.distance)
        if self.choice.auto and not weakest.holds:  # its own estimate, then, which no slot is left out of
            return everything, estimate, worth, weakest
        return short, found, worth, weakest

    def _check_same_rows(self, draw: str, *, other: bool) -> None:
        """Scores of other rows than a neighbour's cannot be ranked with its own."""
        if processes.world() > 1:
            scorer = cast(Scorer, self.scorer)
            rows = processes.attempt(lambda: scorer.drawn(draw, other=other), _WHAT, self._device)
            what = "the validation rows that rank slots are scored on"
            processes.check_same([rows[name] for name in sorted(rows)], what, self._device)

    def _draw(self, number: int) -> str:
        return f"{self.choice.seed}/{number if self.choice.resample else 1}"

    def _count(self, kinds: int, modules: int) -> int:
        move = self.choice.move
        return {"types": kinds, "modules": modules}[move] if isinstance(move, str) else move

    def _together(self, measure: Callable[[], T]) -> T:
        """What this process measures, or an error on all of them: the next thing is that they exchange it."""
        return processes.attempt(measure, _WHAT, self._device, lockstep=self.in_lockstep)

    @property
    def in_lockstep(self) -> bool:
        """Whether a forward takes all processes, so that they run equally many: each scores all slots, on its share of the rows."""
        return any(is_sharded(member.site) or member.is_split() for member in self.members)

    @property
    def _share(self) -> Share:
        """The rows of this process in a lockstep: all of them where the processes compute one forward together."""
        return Share(processes.rank(), processes.world()) if all(has_own_rows(m.site) for m in self.members) else ALL

    def _joined(self, found: Tensor, share: Share) -> Tensor:
        """The brackets of all rows, the same on all processes."""
        if share.count == 1:
            return processes.from_main(found, self._device)
        processes.sum_up([found], self._device)
        return found

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
