"""What happens over time: what a choice's controllers are, and what they are given to work with.

    measure    reads and changes nothing
    decide     a function of plain numbers
    apply      the only place that edits weights

A choice answers `controllers(timeline)`. The schedule of the adapter counts optimiser steps and asks each controller whether it is
due. All that must survive a restart is in buffers: of the choice's own tensors, or `counts` on the adapter's first site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from weftlora import change_rates
from weftlora.errors import ConfigError
from weftlora.kernel import Factors
from weftlora.settings import Time

Event = dict[str, Any]
"""What happened, in plain numbers: "event", and whatever there is to tell."""


@dataclass
class Length:
    """How long the run is, where that is known: optimiser steps in all, and per pass over the data; tokens of a step.

    Times in fractions are of the steps after `begins`: of a run that goes on with another, those that it adds.
    """

    total_steps: int | None = None
    steps_per_epoch: float | None = None
    tokens_per_step: float | None = None
    begins: int = 0


class StructureView(Protocol):
    """The tensors of a site's structure, as far as an event needs them."""

    def factors(self, scale: float) -> Factors:
        """The letters of the equation; A and B are the parameters themselves."""
        ...


class BoostView(Protocol):
    """The tensors of a site's boost, as far as an event needs them."""

    def rest(self) -> list[nn.Parameter]:
        """Let what was learned return to its start; the parameters that did."""
        ...


class SiteView(Protocol):
    """One site as an event sees it."""

    scale: float
    mask: Tensor | None

    @property
    def structure(self) -> StructureView:
        """Who owns A and B."""
        ...

    @property
    def boost(self) -> BoostView | None:
        """Extra slots, if there are some."""
        ...

    @property
    def start(self) -> nn.Module | None:
        """What the choice of the axis `start` keeps there, if anything."""
        ...

    def live(self) -> list[int]:
        """The structure's live slots, ascending."""
        ...

    def register_counter(self, name: str, value: Tensor) -> None:
        """Keep a buffer of the adapter as a whole on this site, its first."""
        ...


class MemberView(Protocol):
    """One site of the adapter: the name of its module, how to read W [out, in], and which W that is."""

    @property
    def name(self) -> str:
        """Full name of the module."""
        ...

    @property
    def site(self) -> Any:
        """A `SiteView`."""
        ...

    @property
    def weight(self) -> Callable[[], Tensor]:
        """Reads W [out, in]."""
        ...


class Validation(Protocol):
    """The rows that `weftlora.attach(model, validation=...)` was given, and the model to measure on them."""

    @property
    def count(self) -> int:
        """How many rows there are."""
        ...

    @property
    def tokens(self) -> float | None:
        """Of a row, on average over some; None where they cannot be counted."""
        ...

    def draw(self, count: int, seed: str) -> Mapping[str, Tensor]:
        """`count` rows (all, if there are fewer) chosen by `seed` alone, as one batch on the model's device."""
        ...

    def loss(self, batch: Mapping[str, Tensor]) -> float:
        """The model's loss on a batch as things are now: in evaluation mode, without a graph; nothing in the model changes."""
        ...

    def slots(self, choice: SlotScoring) -> Any:
        """What scores rank slots on these rows by the rule of `choice`: a `weftlora.schedule.rank_slots.Scorer`."""
        ...


class Controller(Protocol):
    """One thing that happens over time.

    All controllers that are due after the same step have measured and decided before the first of them applies.
    """

    @property
    def what(self) -> str:
        """How sentences call it: "the launch of Dash"."""
        ...

    def due(self, length: Length) -> int | None:
        """The step after which it acts; None while the length of the run is needed and unknown."""
        ...

    def done(self) -> bool:
        """Whether nothing is left to do."""
        ...

    def check(self, length: Length) -> None:
        """Raise `ConfigError` if what it is to do cannot happen in a run of this length, or the length is missing."""
        ...

    def plan(self, step: int, length: Length, optimizer: Optimizer) -> Callable[[], Event] | None:
        """Measure and decide if it is time. The function that is returned applies, and says what happened in plain numbers."""
        ...

    def before_step(self, step: int | None, length: Length) -> None:
        """Get ready for what step + 1 needs measured in its forward passes; `step` are taken so far, None if unknown."""
        ...

    def take_rows(self, rows: Validation) -> bool:
        """Keep the validation rows to measure on; False where it has no use for any."""
        ...


class LaunchEffect(NamedTuple):
    """What a launch did at one site."""

    told: dict[str, Any]
    """Plain numbers for the record of events."""
    fresh: Iterable[nn.Parameter]
    """What starts fresh: an optimiser's moments of what it was before are dropped."""
    resting: Iterable[nn.Parameter] = ()
    """What is trained no more: it gets no gradient from now on, and the one it has would be stepped along again."""


class LaunchSettings(Protocol):
    """What the config says of when, and by which rule directions of W are ranked."""

    @property
    def after(self) -> Time: ...
    @property
    def eps(self) -> float: ...
    @property
    def select(self) -> str: ...
    @property
    def seed(self) -> int: ...


class Launch(Protocol):
    """What is done once with the directions of W that a site's update moved most, and how it is spoken of."""

    @property
    def what(self) -> str:
        """In sentences: "the launch of Dash"."""
        ...

    @property
    def event(self) -> str:
        """In the record of events: "dash_launch"."""
        ...

    @property
    def choice(self) -> LaunchSettings:
        """Its part of the config."""
        ...

    def flag(self, site: SiteView) -> Tensor:
        """The site's buffer [] that says whether it has happened there."""
        ...

    def count(self, site: SiteView) -> int:
        """How many directions it has room for there."""
        ...

    def apply(self, site: SiteView, found: change_rates.Directions, largest: float) -> LaunchEffect:
        """Put the directions in, σ_max of W being `largest`."""
        ...

    def gap(self) -> str:
        """What becomes of slots that no direction is left for, as the end of a sentence."""
        ...


class SlotScoring(Protocol):
    """What the config says of how rank slots are scored on validation rows; fields as in `weftlora.Reallocate`."""

    @property
    def title(self) -> str: ...
    @property
    def score(self) -> str: ...
    @property
    def way(self) -> str: ...
    @property
    def terms(self) -> Literal["both", "last_in", "first_in"]: ...
    @property
    def rows(self) -> int: ...
    @property
    def chunk_tokens(self) -> int | None: ...


class SlotMoves(SlotScoring, Protocol):
    """What it says of rounds that score slots and move them; fields as in `weftlora.Reallocate`."""

    @property
    def first(self) -> Time: ...
    @property
    def every(self) -> Time: ...
    @property
    def max_rounds(self) -> int: ...
    @property
    def move(self) -> Literal["types", "modules"] | int: ...
    @property
    def all_lost(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def resample(self) -> bool: ...
    @property
    def shortlist_factor(self) -> int: ...
    @property
    def grace_rounds(self) -> int: ...
    @property
    def revive(self) -> bool: ...
    @property
    def check(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def needs_data(self) -> bool: ...
    @property
    def auto(self) -> bool: ...
    def decided(self, way: str) -> SlotMoves: ...


class Timeline(Protocol):
    """One adapter over time, as its choices see it when they are asked for their controllers."""

    @property
    def members(self) -> Sequence[MemberView]:
        """The adapter's sites, in the order of the model."""
        ...

    def launch(self, launch: Launch) -> Controller:
        """A controller that ranks the directions of every W after the step `launch.choice` names, and applies."""
        ...

    def move_slots(self, choice: SlotMoves) -> Controller:
        """A controller that scores rank slots in rounds, decides, and moves them between sites, as `choice` says."""
        ...

    def forget(self, parameter: nn.Parameter) -> None:
        """Drop what optimisers keep about a parameter, which starts fresh."""
        ...


def check_possible(due: int | None, length: Length, what: str, time: Any) -> None:
    """Raise `ConfigError` if an event due after step `due` cannot happen, or when it is due cannot be known."""
    if due is None:
        in_epochs = not isinstance(time, (int, float))
        need = "steps_per_epoch" if length.steps_per_epoch is None and in_epochs else "total_steps"
        raise ConfigError(
            f"{what} is due at {time!r}, which needs the length of the run: call weftlora.attach(model, {need}=...) before training, "
            "or give your Trainer callbacks=[weftlora.Callback()]."
        )
    if length.total_steps is not None and due >= length.total_steps:
        raise ConfigError(
            f"{what} is due after step {due}, but the run ends after {length.total_steps}: it would silently stay without it; "
            "make the run longer, or choose an earlier step."
        )
