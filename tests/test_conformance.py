"""Every built-in term passes through the door that other packages' terms pass: `weftlora.testing.check_term`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import weftlora
from weftlora.terms.axes import AXES
from weftlora.testing import check_processes, check_term

METHODS = Path(__file__).parents[1] / "docs" / "methods"
WHEN = 2
TERMS: dict[str, tuple[Any, str | None]] = {
    "plain": (weftlora.Plain(), "lora.md"),
    "hydra": (weftlora.Hydra(heads=2), "hydralora.md"),
    "tied": (weftlora.Tied(group="shape"), "tied_lora.md"),
    "kaiming": (weftlora.Kaiming(), None),
    "directions": (weftlora.Directions(after=WHEN), "lora_tsd.md"),
    "dash": (weftlora.Dash(directions=2, after=WHEN), "lora_dash.md"),
    "uniform": (weftlora.Uniform(), None),
    "reallocate": (weftlora.Reallocate(first=WHEN, every=1, max_rounds=2, move=1, rows=4), "alora.md"),
    "all": (weftlora.All(), None),
    "only": (weftlora.Only([1]), None),
    "search": (
        weftlora.Search(select="top_k", top_k=1, outer_batches=2, val_size=4, steps=2),
        "flexora.md",
    ),
}
"""Name in a config: an instance whose events come within a check's steps, and its page."""


def test_every_built_in_term_is_here() -> None:
    assert TERMS.keys() == {name for axis in AXES for name in AXES[axis]}


@pytest.mark.parametrize("name", TERMS)
def test_a_built_in_term_keeps_the_contract(name: str) -> None:
    term, page = TERMS[name]
    found = check_term(term, processes=False, card=None if page is None else METHODS / page)
    assert found.term == name
    assert ("export" in found.notes) == ("merge" in found.notes) == (name == "hydra")
    assert ("training" in found.notes) == (name == "search")
    happens = {"directions": "start_switch", "dash": "dash_launch", "reallocate": "reallocation"}
    assert found.notes.get("events") == happens.get(name)


@pytest.mark.sharded
def test_every_built_in_term_trains_in_two_processes() -> None:
    check_processes([term for term, _ in TERMS.values()])
