"""The built-in recipes, described."""

from __future__ import annotations

from typing import Any

from weftlora.errors import ConfigError, suggest
from weftlora.train.adapter import adapter_config
from weftlora.train.builtin import BUILTIN, builtin

_SHOWN = ("r", "target_r", "init_r", "lora_alpha", "lora_dropout", "target_modules")


def catalogue() -> list[dict[str, Any]]:
    """Name, one line, paper and the defaults of each recipe's config."""
    return [
        {"name": entry.name, "about": entry.about, "paper": entry.paper, "defaults": _defaults(entry.name)}
        for entry in BUILTIN.values()
    ]


def _defaults(name: str) -> dict[str, Any]:
    """The fields that a recipe sets when only its name is given."""
    config = adapter_config({"recipe": name}, total_steps=1000)
    if config is None:
        return {}
    values = config.to_dict()
    chosen = {key: values[key] for key in _SHOWN if values.get(key) is not None}
    structure = values.get("structure") or {}
    return chosen | {key: value for key, value in structure.items() if key != "kind" and value is not None}


def recipe_file(name: str) -> dict[str, Any]:
    """The recipe behind a name, as a file holds it. Raises ConfigError for an unknown name."""
    if name not in BUILTIN:
        raise ConfigError(f"there is no built-in recipe {name!r}: {suggest(name, BUILTIN)}")
    return builtin(name)
