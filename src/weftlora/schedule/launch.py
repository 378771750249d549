"""The one controller of what starts along directions of W: LoRA-Dash's gains and LoRA-Init's A and B.

    measure, decide   `weftlora.schedule.direction_ranking`, once per site and step for everybody who is due
    apply             each launch puts its directions into the sites; moments of what starts anew are dropped

All that are due after a step have decided before the first is applied, so LoRA-TSD, which is both at once, ranks both on the
same pre-launch: the directions of Dash are then the first of LoRA-Init's. With different times the later one ranks on what
the update is then.
"""

from __future__ import annotations

import time as clocks
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from weftlora import change_rates
from weftlora.adapter.buffers import Remembered
from weftlora.adapter.shards import whole
from weftlora.adapter.site import Site, held_by
from weftlora.errors import ConfigError
from weftlora.schedule import schedule
from weftlora.schedule.direction_ranking import Ranked, Ranker, Rule
from weftlora.schedule.rank_slots import begin_anew
from weftlora.schedule.schedule import Member
from weftlora.settings import resolve
from weftlora.terms.events import Event, Launch, Length, Validation, check_possible


@dataclass(eq=False)
class LaunchController:
    """Does one launch on every site of one adapter after the step it is due."""

    launch: Launch
    ranker: Ranker
    _happened: Remembered[bool] = field(default_factory=lambda: Remembered(bool), init=False, repr=False)

    def __post_init__(self) -> None:
        self.ranker.askers.append(self)

    @property
    def what(self) -> str:
        """See `Controller`."""
        return self.launch.what

    @property
    def rule(self) -> Rule:
        """See `Asker`."""
        choice = self.launch.choice
        return Rule(choice.eps, choice.select, choice.seed)

    @property
    def _members(self) -> list[Member]:
        return self.ranker.members

    def due(self, length: Length) -> int | None:
        """See `Controller`."""
        return resolve(self.launch.choice.after, length.total_steps, length.steps_per_epoch, length.begins)

    def done(self) -> bool:
        """See `Controller`."""
        return self._happened.read(self.launch.flag(self._members[0].site))

    def check(self, length: Length) -> None:
        """See `Controller`."""
        check_possible(self.due(length), length, self.what, self.launch.choice.after)

    def is_due(self, step: int, length: Length) -> bool:
        """See `Asker`: after step t, and in the steps after it until it succeeds."""
        due = self.due(length)
        return due is not None and step >= due and not self.done()

    def count(self, site: Site) -> int:
        """See `Asker`."""
        return self.launch.count(site)

    def before_step(self, step: int | None, length: Length) -> None:
        """See `Controller`."""
        self.ranker.before_step(step, length)

    def take_rows(self, rows: Validation) -> bool:
        """See `Controller`: directions are ranked on weights alone."""
        return False

    def plan(self, step: int, length: Length, optimizer: Optimizer) -> Callable[[], Event] | None:
        """Measure and decide if step t has been reached; the function that is returned applies."""
        if not self.is_due(step, length):
            return None
        started = clocks.perf_counter()
        ranked = self.ranker.rank(step, length)
        chosen = [r.first(self.rule, self.count(m.site)) for r, m in zip(ranked, self._members, strict=True)]
        if not any(len(found.index) for found in chosen):
            raise ConfigError(
                f"{self.what} is due after step {self.due(length)}, but no weight has moved (every change rate is 0): train "
                "longer before it, with a larger `after` or a learning rate above 0."
            )
        measured = clocks.perf_counter() - started
        return lambda: self._apply(chosen, ranked, measured)

    def _apply(self, chosen: Sequence[change_rates.Directions], ranked: Sequence[Ranked], measured: float) -> Event:
        started, told = clocks.perf_counter(), {}
        short = [m.name for m, f in zip(self._members, chosen, strict=True) if len(f.index) < self.count(m.site)]
        for member, found, site in zip(self._members, chosen, ranked, strict=True):
            with whole(member.site) as stands_for:
                applied = self.launch.apply(member.site, found, site.largest)
                fresh, resting = ([stands_for.get(id(p), p) for p in each] for each in (applied.fresh, applied.resting))
            for parameter in fresh:
                forget_moments(parameter)
            for parameter in resting:
                held_by(parameter).grad = None
                forget_moments(parameter, rests=True)
            told[member.name] = {
                "index": found.index.tolist(),
                "sigma": found.sigma.tolist(),
                "rate": found.rate.tolist(),
                **applied.told,
                "ranked_on": member.source,
                "seconds": site.seconds,
            }
        _warn(short, f"have fewer moved directions than {self.launch.gap()}.")
        _warn(
            [member.name for member in self._members if member.source == "dequantised"],
            "ranked their directions on a dequantised base, whose rounding noise dominates the small singular values: "
            "give the unquantised "
            "checkpoint with weftlora.attach(model, original=...) before training.",
        )
        return {"event": self.launch.event, "seconds": measured + clocks.perf_counter() - started, "sites": told}


def forget_moments(parameter: nn.Parameter, *, rests: bool = False) -> None:
    """Let a parameter start fresh: moments of what it was before would shape, or stretch, its first steps.

    That of an expert is a part of its batch's, all experts of which start at once. Where an optimiser's first state is known, its
    state is set to that, so that a checkpoint before the next step has it; else, and where the parameter `rests`, it is dropped.
    """
    parameter = held_by(parameter)
    for optimizer in schedule.owners(parameter):
        if parameter in optimizer.state and (rests or not begin_anew(optimizer.state[parameter], parameter)):
            del optimizer.state[parameter]


def _warn(names: list[str], sentence: str) -> None:
    if names:
        warnings.warn(f"{len(names)} modules such as {names[0]} {sentence}", stacklevel=3)
