"""Which blocks are adapted, and how strongly: a scalar per block in g.

Where the blocks are searched (`SearchedLayers`), one scalar α_i per group is trained on held-out rows before the adapter is:

    for t in range(T):   K optimiser steps on θ, α standing still;   g = ∂R_val/∂α;   α ← OPT(α, g);   gates ← gates(α)
    then                 choose(what was found), and the adapter is trained on that

`weftlora.search` runs it for every such choice; the choice says what gates, gradient, optimiser and selection are.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, final

from torch import Tensor
from torch.optim import Optimizer

from weftlora.errors import ConfigError, TargetError
from weftlora.terms.choice import Choice
from weftlora.terms.events import Controller, Timeline


class Blocks(Protocol):
    """The transformer blocks of a model (`weftlora.adapted.targets`)."""

    @property
    def model_name(self) -> str:
        """Class of the model, for sentences."""
        ...

    @property
    def modules(self) -> Set[str]:
        """Names of all modules."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Names of the blocks, in order."""
        ...

    @property
    def number(self) -> Mapping[str, int]:
        """The number of a block, by name."""
        ...

    def of(self, module_name: str) -> str | None:
        """The block that a module is in, by name; None outside of all blocks."""
        ...


class Layers(Choice):
    """Which of the targeted modules get a site, and whether a gate stands on it."""

    axis: ClassVar[str] = "layers"
    gated: bool = False
    """Whether every site has a layer gate, 1 at first."""
    untrained: ClassVar[str | None] = None
    """Why training cannot start with it, as a sentence that says what comes first; None where it can."""
    source: ClassVar[str]
    """Who said which blocks carry the adapter, for reports: "all that are targeted"."""

    @property
    @abstractmethod
    def named(self) -> tuple[int | str, ...] | None:
        """The blocks that it names, if it names them."""

    @property
    @abstractmethod
    def search(self) -> SearchedLayers | None:
        """The search that chooses the blocks before training; None where nothing is searched."""

    @abstractmethod
    def adapts(self, blocks: Blocks, module_name: str) -> bool:
        """Whether a targeted module gets a site."""

    @abstractmethod
    def check(self, blocks: Blocks, targeted: Sequence[str]) -> None:
        """Raise `TargetError` if it adapts nothing, or an entry of it does not; `targeted` would be adapted with All()."""


@dataclass(frozen=True)
class Weighed:
    """What a search has found of its N groups."""

    alpha: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    """Mean ‖∇θ‖ of what a group has to itself, over the steps on θ."""
    step: float = 0.0
    """How far the last step moved an α: what is nearer to its threshold than that is flagged."""

    def __post_init__(self) -> None:
        if not self.alpha or not all(math.isfinite(a) for a in self.alpha):
            raise ConfigError(
                f"the layer gates α={list(self.alpha)} are not finite, so the search has diverged: lower its learning rate."
            )


@dataclass(frozen=True)
class Chosen:
    """Indices of groups in increasing order. `distance`: how far every group is above (selected) or below its threshold.

    `filled`: those that the rule did not select and a smallest number did. `near`: those that one more step could turn.
    """

    selected: tuple[int, ...]
    distance: tuple[float, ...]
    filled: tuple[int, ...] = ()
    near: tuple[int, ...] = ()

    @property
    def margin(self) -> float:
        """The smallest distance of all."""
        return min(abs(d) for d in self.distance)


class SearchedLayers(Layers):
    """Layers that a search chooses before training. Fields that a choice does not have are as they stand here.

    It says of α: `alpha_hat`, `gates`, `gradient`, `optimizer`; of the selection: `check_groups`, `choose`, `selects`, `selecting`.
    """

    gated = True
    source: ClassVar[str] = "not yet searched"
    granularity: Literal["block", "module"] = "block"
    """One scalar per "block" or per "module"."""
    hypergrad: Literal["direct", "unrolled_fd", "unrolled_exact"] = "direct"
    """"direct": ∂R_val/∂α at the trained θ; through inner steps too, "unrolled_fd" by differences, "unrolled_exact" exactly."""
    fd_step: float = 1e-2
    inner_steps: int = 1
    """K: steps on θ before every step on α."""
    unroll_steps: int | None = None
    """How many of the K are differentiated; None is all."""
    inner_lr: float | None = None
    """Rate of θ; None takes the training's."""
    inner_optimizer: Literal["adamw", "sgd", "sign_sgd"] | None = None
    """Of θ; None takes the training's."""
    outer_batches: int = 8
    """Validation micro-batches per step on α."""
    summed: bool = False
    """Whether validation losses are summed over micro-batches, and not averaged over tokens."""
    search_epochs: float = 1.0
    steps: int | None = None
    """Steps on α; None is `search_epochs` passes over the search's training rows."""
    max_share: float | None = None
    """Of the training that follows, in the same run, what a search without `steps` may cost at most, in rows; None is no bound."""
    max_search_samples: int = 5000
    val_size: int = 200
    """Rows held out where no validation rows are given."""
    finetune: Literal["restart", "continue"] = "restart"
    """What comes after it: "restart" a fresh adapter on the selected blocks, or "continue" the searched one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.untrained = (
            f"layers={cls.__name__}() chooses the blocks before training, which this loop does not do: call "
            "weftlora.search_layers first and train with its selection (layers=selection.layers), or use layers=All()."
        )

    @abstractmethod
    def alpha_hat(self, alpha_n: Tensor) -> Tensor:
        """How much every group counts, for the record, [N] → [N]."""

    @abstractmethod
    def gates(self, alpha_n: Tensor) -> Tensor:
        """What the updates of the N groups are multiplied with, [N] → [N] fp64, differentiable; exactly 1 where α = 0."""

    @abstractmethod
    def gradient(self, h_n: Tensor, alpha_n: Tensor) -> Tensor:
        """∂R/∂α [N] fp64 from h_i = gate_i · ∂R/∂gate_i [N]."""

    @abstractmethod
    def optimizer(self, alpha_n: Tensor) -> Optimizer:
        """What takes the steps on α."""

    @abstractmethod
    def check_groups(self, n: int) -> None:
        """Raise `ConfigError` if it could not choose among n groups; asked before the search."""

    @abstractmethod
    def choose(self, found: Weighed) -> Chosen:
        """Which groups are adapted. Raises `RunError` where what was found is no ground to choose on."""

    @property
    @abstractmethod
    def selects(self) -> int | None:
        """How many groups it selects, whatever it finds; None where that is known only after the search."""

    @abstractmethod
    def selecting(self, count: int) -> Self:
        """The same, selecting `count` groups whatever it finds, as a comparison at equal size needs it. Raises `ConfigError` where it
        was told to select by another rule."""

    @property
    @final
    def named(self) -> tuple[int | str, ...] | None:
        """None yet."""
        return None

    @property
    @final
    def search(self) -> SearchedLayers | None:
        """Itself."""
        return self

    @final
    def adapts(self, blocks: Blocks, module_name: str) -> bool:
        """Whether it is in a block, or modules are searched."""
        return blocks.of(module_name) is not None or self.granularity == "module"

    @final
    def check(self, blocks: Blocks, targeted: Sequence[str]) -> None:
        """There are two groups to choose between."""
        groups = {blocks.of(name) if self.granularity == "block" else name for name in targeted} - {None}
        if len(groups) < 2:
            raise TargetError(
                f"layers={self.title}() has {len(groups)} {self.granularity}s of {blocks.model_name} to choose from, with "
                f"{len(targeted)} modules targeted: target modules in at least two, or use layers=All()."
            )
        outside = [name for name in targeted if not self.adapts(blocks, name)]
        if outside:
            warnings.warn(
                f"{len(outside)} targeted modules outside of all blocks, such as {outside[0]}, have no place in a search of blocks "
                "and are not adapted: name them in exclude_modules, or search with granularity='module'.",
                stacklevel=2,
            )

    @final
    def controllers(self, timeline: Timeline) -> list[Controller]:
        """Its gates are moved by `weftlora.search_layers`, before there is a run."""
        return []
