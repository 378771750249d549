"""The built-in recipes, described."""

from __future__ import annotations

from typing import Any

from weftlora.errors import ConfigError, suggest
from weftlora.recipes import RECIPES, own_fields
from weftlora.runs.recipe import BUILTIN, builtin


def catalogue() -> list[dict[str, Any]]:
    """Name, one line, paper and the defaults of each recipe's own fields."""
    return [
        {"name": entry.name, "about": entry.about, "paper": entry.paper, "defaults": _defaults(entry.name)}
        for entry in BUILTIN.values()
    ]


def _defaults(name: str) -> dict[str, Any]:
    """The fields of a recipe, read from its signature, that have a value when only its name is given."""
    if name not in RECIPES:
        return {}
    return {key: value for key, value in own_fields(name).items() if value is not None}


def recipe_file(name: str) -> dict[str, Any]:
    """The recipe behind a name, as a file holds it. Raises ConfigError for an unknown name."""
    if name not in BUILTIN:
        raise ConfigError(f"there is no built-in recipe {name!r}: {suggest(name, BUILTIN)}")
    return builtin(name)
