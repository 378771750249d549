"""Which directions of every W an adapter's ΔW moves most: what LoRA-Dash and LoRA-Init both ask at their step.

    measure   W, A, B and, on a routed site, the mean gate of step t     → change rates [k] and σ [k] per site
    decide    rates, σ → indices, best first                             (plain numbers; no tensors of the model)

Decompositions are made site by site and freed, one per site however many ask at that step; who asks by the same rule gets
the same list, cut to its own length. With several processes each decomposes its share of the sites and the chosen
directions are broadcast, so all hold the same bytes. Where W is split among them, every process is sent one whole W at a time, its
own of the next few sites, and no W is ever on two of them.

Source: LoRA-Dash, arXiv 2409.01035. On a routed site, which the paper does not have, ΔW is taken at the mean gate
measured over the forward passes of step t.
"""

from __future__ import annotations

import time as clocks
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from weftlora import change_rates
from weftlora.adapter.shards import carrier, is_sharded, whole
from weftlora.adapter.site import Site
from weftlora.errors import ConfigError
from weftlora.kernel import Slots
from weftlora.progress import Progress, Tick, ignore
from weftlora.schedule import processes
from weftlora.schedule.schedule import Member
from weftlora.terms.events import Length
from weftlora.terms.extra import ExtraTerm


@dataclass(frozen=True)
class Rule:
    """How directions are ranked; see `weftlora.change_rates.decide`."""

    eps: float
    select: str
    seed: int


@dataclass(frozen=True)
class Ranked:
    """What was found at one site."""

    found: dict[Rule, change_rates.Directions]
    largest: float  # σ_max of W
    seconds: float  # for reading, decomposing and ranking; 0 on the processes that were sent it

    def first(self, rule: Rule, count: int) -> change_rates.Directions:
        """The best `count` directions by that rule; fewer where there are no more."""
        d = self.found[rule]
        return change_rates.Directions(
            d.index[:count], d.sigma[:count], d.rate[:count], d.up[:, :count], d.down[:count]
        )


class _Matrices(NamedTuple):
    """What one site is ranked by, on the process that does: W [out, in], None where it can read that itself, and of ΔW A, B and
    the scale."""

    W: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


class Asker(Protocol):
    """Who needs directions at some step."""

    @property
    def what(self) -> str:
        """How sentences call what it does then."""
        ...

    @property
    def rule(self) -> Rule:
        """By which it wants them ranked."""
        ...

    def is_due(self, step: int, length: Length) -> bool:
        """Whether it needs them after this step."""
        ...

    def count(self, site: Site) -> int:
        """How many it needs there."""
        ...


@dataclass
class MeanGate:
    """Running mean of the weights of `site`'s router over tokens, filled by the training passes of one step."""

    site: Site
    seen: Tensor | None = None
    """[N + 1] fp64: the sum of the weights over tokens, then how many tokens; a tensor, since a number would be a constant of a
    compiled graph."""

    def __call__(self, omega: Tensor) -> None:
        """Take in weights [..., N]; an evaluation or generation between two steps is none of the training."""
        if self.site.training or torch.is_grad_enabled():
            self.add(omega)

    def add(self, omega: Tensor) -> None:
        """Take in weights [..., N]."""
        flat = omega.detach().flatten(0, -2).double()
        seen = torch.cat([flat.sum(0), torch.ones_like(flat[:, 0]).sum(0, keepdim=True)])
        self.seen = seen if self.seen is None else self.seen + seen

    def mean(self, heads: int) -> Tensor:
        """[N] fp64; uniform if nothing was seen."""
        if self.seen is None or not self.seen[-1]:
            return torch.full((heads,), 1 / heads, dtype=torch.float64)
        return self.seen[:-1] / self.seen[-1]

    def share(self) -> None:
        """Take in what the other processes saw; all of them must call it."""
        with whole(self.site):
            f = self.site.factors()
        device = carrier(f.A.device)
        seen = torch.zeros(f.heads + 1, dtype=torch.float64) if self.seen is None else self.seen
        self.seen = seen.to(device)
        dist.all_reduce(self.seen)


def decompose(name: str, w: Tensor) -> change_rates.Spectrum:
    """The spectrum of the weight W [out, in] of module `name`; `weftlora.host.attach` puts a service with a cache in its place."""
    return change_rates.spectrum(w)


@dataclass(eq=False)
class Ranker:
    """Ranks the directions of every site of one adapter, once per step for all who ask."""

    members: list[Member]
    askers: list[Asker] = field(default_factory=list)
    decompose: Callable[[str, Tensor], change_rates.Spectrum] = decompose
    gates: dict[str, MeanGate] = field(default_factory=dict)
    on_progress: Progress = field(default_factory=lambda: ignore, repr=False)
    _last: tuple[int, list[Ranked]] | None = field(default=None, init=False)

    def before_step(self, step: int | None, length: Length) -> None:
        """Listen to the routers in the forward passes of the step after which somebody will ask, or may."""
        self._last = None
        for member in self.members:
            if self.gates.pop(member.name, None) is not None:
                member.listen(None)
        if step is None or any(asker.is_due(step + 1, length) for asker in self.askers):
            for member in self.members:
                if member.held.routed:
                    gate = self.gates[member.name] = MeanGate(member.held)
                    member.listen(gate)

    def rank(self, step: int, length: Length) -> list[Ranked]:
        """What every site's directions are after this step, the same on all processes.

        Raises:
            ConfigError: a factor or a weight has values that are not finite.
            WeftError: the ranking failed on another process.
        """
        if self._last is None or self._last[0] != step:
            due = [asker for asker in self.askers if asker.is_due(step, length)]
            self._last = step, self._rank_all(due)
        return self._last[1]

    def _rank_all(self, due: list[Asker]) -> list[Ranked]:
        numbers = range(len(self.members))
        split = any(member.is_split() or is_sharded(member.site) for member in self.members)
        if processes.world() == 1 and not split:
            return list(self._ranked(numbers, due).values())
        for gate in self.gates.values():
            gate.share()
        size = processes.world() if split else len(numbers)
        return [each for at in numbers[::size] for each in self._rank_turn(numbers[at : at + size], split, due)]

    def _rank_turn(self, numbers: Sequence[int], split: bool, due: list[Asker]) -> list[Ranked]:
        """Those members, on all processes, each ranked by one. With `split` no process is the ranker of two of them."""
        world, rank = processes.world(), processes.rank()
        rules = list(dict.fromkeys(asker.rule for asker in due))
        device = next(self.members[0].site.parameters()).device
        sent = {n: self._sent(n, n % world) for n in numbers} if split else {}
        own = [n for n in numbers if n % world == rank]
        mine = processes.attempt(lambda: self._ranked(own, due, sent), _names(due), device)
        return [_share(mine.get(n), rules, self.members[n].site, device, n % world) for n in numbers]

    def _sent(self, number: int, process: int) -> _Matrices | None:
        """What that process ranks the member by, read by all; None on the others."""
        member = self.members[number]
        pair = self._pair(member)
        w = member.weight_on(process) if member.is_split() else None
        return _Matrices(w, *pair) if process == processes.rank() else None

    def _pair(self, member: Member) -> tuple[Tensor, Tensor, float]:
        with whole(member.site):
            return factor_pair(member.site, self.gates.get(member.name), dash=member.site.start is not None)

    def _ranked(
        self, numbers: Sequence[int], due: list[Asker], sent: Mapping[int, _Matrices | None] | None = None
    ) -> dict[int, Ranked]:
        """Those members one after the other, as whoever watches is told."""
        found = {}
        for done, n in enumerate(numbers):
            found[n] = self._rank_one(n, due, (sent or {}).get(n))
            self.on_progress(Tick("ranking directions", done + 1, len(numbers)))
        return found

    def _rank_one(self, number: int, due: list[Asker], sent: _Matrices | None = None) -> Ranked:
        started, member = clocks.perf_counter(), self.members[number]
        a, b, scale = self._pair(member) if sent is None else (sent.A, sent.B, sent.scale)
        w = member.weight() if sent is None or sent.W is None else sent.W
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ConfigError(
                f"{member.name} has values that are not finite at {_names(due)}: lower the learning rate."
            )
        if not torch.isfinite(w).all():
            raise ConfigError(
                f"the base weight of {member.name} has values that are not finite, so it has no directions to launch: "
                "load an undamaged base, or do not target this module."
            )
        counts: dict[Rule, int] = {}
        for asker in due:
            counts[asker.rule] = max(counts.get(asker.rule, 0), asker.count(member.site))
        spectrum = self.decompose(member.name, w)
        moved = change_rates.moved(spectrum, w, a, b, scale)
        sigma, lowest = spectrum.sigma.tolist(), change_rates.floor(spectrum.sigma, (w.shape[0], w.shape[1]))
        found = {}
        for rule, count in counts.items():
            rate = change_rates.change_rate(spectrum, moved, rule.eps)
            chosen = change_rates.decide(rate.tolist(), sigma, lowest, count, rule.select, f"{rule.seed}/{number}")
            found[rule] = change_rates.take(spectrum, w, rate, chosen)
        return Ranked(found, sigma[0], clocks.perf_counter() - started)


def factor_pair(site: Site, gate: MeanGate | None, *, dash: bool = False) -> tuple[Tensor, Tensor, float]:
    """A [R, in], B [out, R] and the scale of the site's ΔW, fp64; at the mean gate if it is routed.

    The frozen slots of LoRA-Init are in it; those of Dash with `dash` only.
    """
    f = site.factors()
    a, b = f.A.detach().double(), f.B.detach().double()
    if f.gate is not None:
        a = f.gate.detach().to(a)[:, None] * a
    if f.v is not None:
        b = f.v.detach().to(b)[:, None] * b
    if f.router is not None:
        omega = (gate or MeanGate(site)).mean(f.heads).to(b)
        b = torch.einsum("onr,n->or", b.unflatten(1, (f.heads, len(a))), omega)
    if (twins := _slots(site.start, site, f.scale)) is not None:
        # B A − B₀ A₀ as (B − B₀) A + B₀ (A − A₀): exactly 0 right after the switch, where the other form leaves rounding
        live = site.live()  # as in f, which has no other slots
        gate_r = -twins.gate.detach().to(a)[live] / f.scale
        twin_a, twin_b = twins.down[live].to(a), twins.up[:, live].to(b)
        a, b = torch.cat([a, gate_r[:, None] * (f.A.detach().to(a) - twin_a)]), torch.cat([b - twin_b, twin_b], 1)
    if dash and (slots := _slots(site.boost, site, f.scale)) is not None:
        a = torch.cat([a, slots.down.to(a)])
        b = torch.cat([b, slots.up.to(b) * (slots.gate.detach().to(b) / f.scale)], 1)
    return a, b, f.scale


def _slots(term: ExtraTerm | None, site: Site, scale: float) -> Slots | None:
    return None if term is None else term.slots(scale, site.mask, site.layer_gate)


def _names(due: list[Asker]) -> str:
    return " and ".join(asker.what for asker in due)


def _share(ranked: Ranked | None, rules: list[Rule], site: Site, device: torch.device, source: int) -> Ranked:
    """What process `source` found at this site, on all processes."""
    fan_in, out = site.size.fan_in, site.size.out
    device = carrier(device)
    counts = [len(ranked.found[rule].index) for rule in rules] if ranked else [0] * len(rules)
    head = torch.tensor([ranked.largest if ranked else 0.0, *counts], dtype=torch.float64, device=device)
    dist.broadcast(head, source)
    found = {}
    for rule, s in zip(rules, map(int, head[1:].tolist()), strict=True):
        shapes = {"index": (s,), "sigma": (s,), "rate": (s,), "up": (out, s), "down": (s, fan_in)}
        tensors: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            dtype = torch.long if name == "index" else torch.float64
            here = getattr(ranked.found[rule], name) if ranked else torch.empty(shape, dtype=dtype)
            tensors[name] = here.to(device).contiguous()
            dist.broadcast(tensors[name], source)
        found[rule] = change_rates.Directions(**tensors)
    return Ranked(found, float(head[0]), ranked.seconds if ranked else 0.0)
