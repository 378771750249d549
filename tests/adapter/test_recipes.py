"""A recipe takes the fields of its terms by their names and hands on what it was given."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from weftlora.recipes import RECIPES, own_fields
from weftlora.terms.boost.dash import Dash
from weftlora.terms.layers.search import Search
from weftlora.terms.ranks.reallocate import Reallocate
from weftlora.terms.start.directions import Directions
from weftlora.terms.structure.hydra import Hydra
from weftlora.terms.structure.tied import Tied

TERMS: dict[str, dict[str, type[Any]]] = {
    "lora": {},
    "hydralora": {"structure": Hydra},
    "tied_lora": {"structure": Tied},
    "lora_dash": {"boost": Dash},
    "lora_init": {"start": Directions},
    "lora_tsd": {"start": Directions, "boost": Dash},
    "alora": {"ranks": Reallocate},
    "flexora": {"layers": Search},
}
BY_AXIS = {"hydralora": {"router_init", "router_gain"}}
"""Fields that only the axis takes: no paper that the recipe names speaks of them."""
GIVEN = {
    "hydralora": {"heads": 4, "router_input": "Ax", "per_head_dropout": True, "balance": 0.5},
    "tied_lora": {"train": ["A", "B"], "group": "fused_qkv", "zero": "A", "init": "normal"},
    "lora_dash": {"directions": 3, "after": 7, "eps": 1e-3, "select": "top", "seed": 5},
    "lora_init": {
        "after": 7,
        "mode": "directions",
        "eps": 1e-3,
        "guard": 1e-4,
        "kappa": 0.5,
        "select": "top",
        "seed": 5,
    },
    "alora": {"first": 0.5, "every": 0.25, "max_rounds": 2, "move": 3, "score": "taylor", "rows": 16, "seed": 5},
    "flexora": {"granularity": "module", "inner_lr": 0.5, "alpha_lr": 0.5, "top_k": 2, "select": "top_k", "steps": 9},
}


def test_every_recipe_of_ours_is_here() -> None:
    assert TERMS.keys() == {name for name in RECIPES if not name.startswith("peft:")}


@pytest.mark.parametrize("name", TERMS)
def test_a_recipe_takes_every_field_of_its_terms_and_no_other(name: str) -> None:
    fields = {field.name for term in TERMS[name].values() for field in dataclasses.fields(term) if field.init}
    assert own_fields(name).keys() == fields - BY_AXIS.get(name, set()) | {"r"}


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_recipe_is_given_reaches_its_term(name: str) -> None:
    ((axis, term),) = TERMS[name].items()
    config = RECIPES[name](r=4, lora_dropout=0.1, **GIVEN[name])
    assert getattr(config, axis) == term(**GIVEN[name])
    assert (config.r, config.lora_dropout) == (4, 0.1)
