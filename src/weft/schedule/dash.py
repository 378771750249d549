"""The launch of Dash: after optimiser step t, choose each site's directions once and for all.

    measure   W, A, B and, on a routed site, the mean gate of step t     → change rates [k] and σ [k] per site
    decide    rates, σ → indices of the s directions                     (plain numbers; no tensors of the model)
    apply     indices → Ū, V̄ into the site's buffers; the moments of its gains dropped

Decompositions are made site by site and freed. With several processes each decomposes its share of the sites and the
chosen directions are broadcast, so all hold the same bytes.

Source: LoRA-Dash, arXiv 2409.01035. On a routed site, which the paper does not have, ΔW is taken at the mean gate
measured over the forward passes of step t.
"""

from __future__ import annotations

import random
import time as clocks
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from weft import linalg
from weft.errors import ConfigError
from weft.schedule import clock, together
from weft.schedule.schedule import Event, Length, Member, check_possible
from weft.site import Site
from weft.terms.boost.dash import Dash, DashTerm
from weft.times import resolve


@dataclass
class MeanGate:
    """Running mean of the weights of `site`'s router over tokens, filled by the training passes of one step."""

    site: Site
    total: Tensor | None = None
    tokens: int = 0

    def __call__(self, omega: Tensor) -> None:
        """Take in weights [..., N]; an evaluation or generation between two steps is none of the training."""
        if not (self.site.training or torch.is_grad_enabled()):
            return
        flat = omega.detach().flatten(0, -2)
        self.total = flat.double().sum(0) if self.total is None else self.total + flat.double().sum(0)
        self.tokens += flat.shape[0]

    def mean(self, heads: int) -> Tensor:
        """[N] fp64; uniform if nothing was seen."""
        if self.total is None or not self.tokens:
            return torch.full((heads,), 1 / heads, dtype=torch.float64)
        return self.total / self.tokens

    def share(self) -> None:
        """Take in what the other processes saw; all of them must call it."""
        f = self.site.factors()
        seen = torch.zeros(f.heads + 1, dtype=torch.float64, device=f.A.device)
        if self.total is not None:
            seen[:-1], seen[-1] = self.total, self.tokens
        dist.all_reduce(seen)
        self.total, self.tokens = seen[:-1], int(seen[-1])


def decompose(name: str, w: Tensor) -> linalg.Spectrum:
    """The spectrum of the weight W [out, in] of module `name`; glue puts a service with a cache in its place."""
    return linalg.spectrum(w)


@dataclass(eq=False)
class DashController:
    """Launches the Dash slots of every site of one adapter."""

    choice: Dash
    members: list[Member]
    decompose: Callable[[str, Tensor], linalg.Spectrum] = decompose
    gates: dict[str, MeanGate] = field(default_factory=dict)

    def due(self, length: Length) -> int | None:
        """See `Controller`."""
        return resolve(self.choice.after, length.total_steps, length.steps_per_epoch)

    def done(self) -> bool:
        """See `Controller`."""
        return bool(_term(self.members[0].site).launched)

    def check(self, length: Length) -> None:
        """See `Controller`."""
        check_possible(self.due(length), length, "the launch of Dash", self.choice.after)

    def before_step(self, step: int | None, length: Length) -> None:
        """Listen to the routers in the forward passes of the step after which the launch is due, or may be."""
        self._stop_listening()
        if step is None or (self.due(length) == step + 1 and not self.done()):
            for member in self.members:
                if not member.site.mergeable:  # routed
                    gate = self.gates[member.name] = MeanGate(member.site)
                    member.site.gate_meter = gate

    def after_step(self, step: int, length: Length, optimizer: Optimizer) -> Event | None:
        """Launch if step t has been reached."""
        due = self.due(length)
        if due is None or step < due:
            return None
        started = clocks.perf_counter()
        chosen = self._choose()
        if not any(len(found.index) for found, _ in chosen):
            raise ConfigError(
                f"Dash is due after step {due}, but no weight has moved (every change rate is 0): train before the launch, "
                "with a larger `after` or a learning rate above 0."
            )
        for member, (found, _) in zip(self.members, chosen, strict=True):
            term = _term(member.site)
            term.launch(found)
            _forget_moments(term.gain)
        self._stop_listening()
        self._warn_of_gaps(chosen)
        self._warn_of_quantised()
        return {
            "event": "dash_launch",
            "seconds": clocks.perf_counter() - started,
            "sites": {
                member.name: {
                    "index": found.index.tolist(),
                    "sigma": found.sigma.tolist(),
                    "rate": found.rate.tolist(),
                    "ranked_on": member.source,
                    "seconds": seconds,
                }
                for member, (found, seconds) in zip(self.members, chosen, strict=True)
            },
        }

    def _choose(self) -> list[tuple[linalg.Directions, float]]:
        """Directions of every site and the seconds they took, the same on all processes."""
        numbers = range(len(self.members))
        if together.world() == 1:
            return [self._measure_and_decide(n) for n in numbers]
        world, rank = dist.get_world_size(), dist.get_rank()
        for gate in self.gates.values():
            gate.share()
        mine: dict[int, tuple[linalg.Directions, float]] = {}
        failure: Exception | None = None
        try:
            mine = {n: self._measure_and_decide(n) for n in numbers if n % world == rank}
        except Exception as error:
            failure = error
        together.fail(failure, "the launch of Dash", _term(self.members[0].site).gain.device)
        return [_share(mine.get(n), self.members[n], n % world) for n in numbers]

    def _measure_and_decide(self, number: int) -> tuple[linalg.Directions, float]:
        """Directions of one site, and the seconds they took."""
        started, member = clocks.perf_counter(), self.members[number]
        w, (a, b, scale) = member.weight(), factor_pair(member.site, self.gates.get(member.name))
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ConfigError(
                f"{member.name} has values that are not finite at the launch of Dash: lower the learning rate."
            )
        if not torch.isfinite(w).all():
            raise ConfigError(
                f"the base weight of {member.name} has values that are not finite, so it has no directions to launch: "
                "load a base that works, or do not target this module."
            )
        found = self.decompose(member.name, w)
        rate = linalg.change_rate(found, linalg.moved(found, w, a, b, scale), self.choice.eps)
        count = len(_term(member.site).gain)
        lowest = linalg.floor(found.sigma, (w.shape[0], w.shape[1]))
        seed = f"{self.choice.seed}/{number}"
        chosen = decide(rate.tolist(), found.sigma.tolist(), lowest, count, self.choice.select, seed)
        return linalg.take(found, w, rate, chosen), clocks.perf_counter() - started

    def _warn_of_gaps(self, chosen: Sequence[tuple[linalg.Directions, float]]) -> None:
        short = [
            m.name
            for m, (found, _) in zip(self.members, chosen, strict=True)
            if len(found.index) < len(_term(m.site).gain)
        ]
        if short:
            warnings.warn(
                f"{len(short)} sites such as {short[0]} have fewer moved directions than Dash(directions="
                f"{self.choice.directions}): their other slots stay empty.",
                stacklevel=2,
            )

    def _warn_of_quantised(self) -> None:
        blurred = [member.name for member in self.members if member.source == "dequantised"]
        if blurred:
            warnings.warn(
                f"{len(blurred)} sites such as {blurred[0]} ranked their directions on a dequantised base, whose noise owns the "
                "small singular values: give the unquantised checkpoint with weft.attach(model, original=...) before training.",
                stacklevel=2,
            )

    def _stop_listening(self) -> None:
        for member in self.members:
            if self.gates.pop(member.name, None) is not None:
                member.site.gate_meter = None


def decide(rate: list[float], sigma: list[float], lowest: float, count: int, select: str, seed: str) -> list[int]:
    """Which core directions to launch, best first: of those that moved and are above the floor, at most `count`.

    "rate": largest change rate, ties by index; "top": largest σ; "bottom": smallest σ; "random": drawn with `seed`.
    """
    able = [k for k, (r, s) in enumerate(zip(rate, sigma, strict=True)) if r > 0 and s > lowest]
    if select == "random":
        return random.Random(seed).sample(able, min(count, len(able)))
    if select == "rate":
        able.sort(key=lambda k: (-rate[k], k))
    if select == "bottom":
        able.reverse()
    return able[:count]


def _term(site: Site) -> DashTerm:
    return cast(DashTerm, site.boost)


def factor_pair(site: Site, gate: MeanGate | None) -> tuple[Tensor, Tensor, float]:
    """A [r, in], B [out, r] and the scale of the site's ΔW without its Dash slots; at the mean gate if it is routed."""
    f = site.factors()
    a, b = f.A.detach().double(), f.B.detach().double()
    if f.gate is not None:
        a = f.gate.detach().to(a)[:, None] * a
    if f.v is not None:
        b = f.v.detach().to(b)[:, None] * b
    if f.router is not None:
        omega = (gate or MeanGate(site)).mean(f.heads).to(b)
        b = torch.einsum("onr,n->or", b.unflatten(1, (f.heads, -1)), omega)
    return a, b, f.scale


def _forget_moments(gain: nn.Parameter) -> None:
    """The gains start fresh at the launch: moments fed with zeros would make their first steps too large."""
    for optimizer in clock.owners(gain):
        optimizer.state.pop(gain, None)


def _share(
    found: tuple[linalg.Directions, float] | None, member: Member, source: int
) -> tuple[linalg.Directions, float]:
    """The directions that process `source` found, on all processes."""
    term = _term(member.site)
    device = term.gain.device
    count = torch.tensor([len(found[0].index) if found else 0], device=device)
    dist.broadcast(count, source)
    s = int(count)
    shapes = {"index": (s,), "sigma": (s,), "rate": (s,), "up": (term.up.shape[0], s), "down": (s, term.down.shape[1])}
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        dtype = torch.long if name == "index" else torch.float64
        value = (
            getattr(found[0], name).to(device).contiguous() if found else torch.empty(shape, dtype=dtype, device=device)
        )
        dist.broadcast(value, source)
        tensors[name] = value
    return linalg.Directions(**tensors), found[1] if found else 0.0
