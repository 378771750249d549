"""What every choice of every axis is: a frozen dataclass of plain data that answers for itself.

    class Hydra(Structure): heads: int = 3; ...        the config's part, as it is written and saved
    Hydra(heads=3).build(...)                          the tensors of one site, as a thin module

The rest of weftlora asks a choice and never which choice it is. Methods are abstract or final: a choice implements the abstract
ones of its axis and overrides nothing else. What most choices answer alike is no method but a field with a default, which a
choice sets in its body.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self, final

from weftlora.terms.events import Controller, Timeline


class Choice(ABC):
    """One choice of one axis. Subclasses are frozen dataclasses; their fields hold plain data and are checked on construction."""

    axis: ClassVar[str]
    """Of which axis, as the config calls it."""
    kind: ClassVar[str]
    """What recipes and saved configs call it: its class's name in small letters with _ between words (TopGroup is top_group), unless
    the body says otherwise."""
    saves: ClassVar[Mapping[str, str]] = {}
    """Names of the tensors that it may add to a site, and what each is."""
    counts: ClassVar[Mapping[str, str]] = {}
    """Names of the buffers that its controllers keep on the adapter's first site, and what each is."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Class names of choices that it does not go with, each with the reason as a clause."""
    objections: Mapping[str, str] = MappingProxyType({})
    """The same because of what its fields are: a choice sets it when it is made."""
    equation_only: ClassVar[str | None] = None
    """Why it needs a structure inside the equation, as a clause; None where it goes with one outside too."""
    headline: ClassVar[tuple[str, ...] | None] = ()
    """Its fields that a line about the adapter tells. None: it is the default of its axis and goes without saying."""
    earlier: ClassVar[Mapping[int, Mapping[str, Any]]] = {}
    """Format of a config → what fields stand for in one of it or before, where it does not name them: what they were then."""
    takes: ClassVar[tuple[type, ...]] = ()
    """Plain values that stand for it in a config: a list is `Only(list)`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            cls.kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @abstractmethod
    def controllers(self, timeline: Timeline) -> list[Controller]:
        """What happens over time because of it, on one adapter; [] where nothing does."""

    @property
    @final
    def title(self) -> str:
        """What sentences and tables call it: its class's name."""
        return type(self).__name__

    @final
    def label(self) -> str | None:
        """It in a line about the adapter, as "Hydra(heads=3)"; None where it goes without saying."""
        if self.headline is None:
            return None
        told = ", ".join(f"{name}={getattr(self, name)}" for name in self.headline)
        return f"{self.title}({told})" if told else self.title

    @final
    def seeded(self, seed: int) -> Self:
        """It as a run of this seed draws: a choice that draws something has a field `seed`, and 0 there is no wish of the user's."""
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return dataclasses.replace(self, seed=seed) if fields.get("seed") == 0 else self  # type: ignore[type-var]
