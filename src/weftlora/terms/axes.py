"""The choices of every axis that weftlora brings, by the name that configs and recipes use; and what does not go together.

This is the only file that sees all of them. A choice from elsewhere needs no row here: it answers for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from weftlora.terms.boost import Boost
from weftlora.terms.boost.dash import Dash
from weftlora.terms.choice import Choice
from weftlora.terms.layers import Layers
from weftlora.terms.layers.every import All
from weftlora.terms.layers.only import Only
from weftlora.terms.layers.search import Search
from weftlora.terms.ranks import Ranks
from weftlora.terms.ranks.reallocate import Reallocate
from weftlora.terms.ranks.uniform import Uniform
from weftlora.terms.start import Start
from weftlora.terms.start.directions import Directions
from weftlora.terms.start.kaiming import Kaiming
from weftlora.terms.structure import Structure
from weftlora.terms.structure.hydra import Hydra
from weftlora.terms.structure.plain import Plain
from weftlora.terms.structure.tied import Tied

Choices = dict[str, type[Choice]]


class Axis(NamedTuple):
    """What one axis is: the protocol of its choices, those that weftlora brings, and the one that a config has unless it says
    otherwise (None: nothing)."""

    protocol: type
    builtin: tuple[type[Choice], ...]
    default: type[Choice] | None


PROTOCOLS: dict[str, Axis] = {
    "structure": Axis(Structure, (Plain, Hydra, Tied), Plain),
    "start": Axis(Start, (Kaiming, Directions), Kaiming),
    "boost": Axis(Boost, (Dash,), None),
    "ranks": Axis(Ranks, (Uniform, Reallocate), Uniform),
    "layers": Axis(Layers, (All, Only, Search), All),
}
AXES: dict[str, Choices] = {name: {kind.kind: kind for kind in axis.builtin} for name, axis in PROTOCOLS.items()}
"""Axis → kind → class."""

MERGE = "merge"
"""Stands in the table of what does not go together for everything that needs one ΔW."""


def refusals(choices: Iterable[type[Choice]]) -> dict[tuple[str, str], str]:
    """Which pairs of these choices do not go together, by their class names, and why, as they say it themselves."""
    given = list(choices)
    found: dict[tuple[str, str], str] = {}
    for one in given:
        for other in given:
            if other.__name__ in one.refuses:
                found[one.__name__, other.__name__] = one.refuses[other.__name__]
            if issubclass(one, Structure) and one.outside and other.equation_only is not None:
                found[one.__name__, other.__name__] = f"it has a forward of its own, and {other.equation_only}"
    for one in given:
        if issubclass(one, Structure) and one.no_closed_form is not None:
            found[one.__name__, MERGE] = one.no_closed_form
    return found


def builtin() -> list[type[Choice]]:
    """All choices that weftlora brings, axis by axis."""
    return [kind for axis in PROTOCOLS.values() for kind in axis.builtin]


def mergeable_structures() -> list[str]:
    """The structures whose update can be added to W."""
    return [
        kind.__name__
        for kind in PROTOCOLS["structure"].builtin
        if issubclass(kind, Structure) and kind.no_closed_form is None
    ]
