"""Which blocks are adapted, and how strongly: a scalar per block in g."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import ClassVar, Protocol

from weftlora.terms.choice import Choice


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
    def search(self) -> Layers | None:
        """The settings of the search that chooses the blocks (`Search`); None where nothing is searched."""

    @abstractmethod
    def adapts(self, blocks: Blocks, module_name: str) -> bool:
        """Whether a targeted module gets a site."""

    @abstractmethod
    def check(self, blocks: Blocks, targeted: Sequence[str]) -> None:
        """Raise `TargetError` if it adapts nothing, or an entry of it does not; `targeted` would be adapted with All()."""
