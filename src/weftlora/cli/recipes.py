"""The built-in recipes, described."""

from __future__ import annotations

from typing import Any

from weftlora.errors import ConfigError, suggest
from weftlora.recipes import RECIPES, own_fields
from weftlora.runs.rates import ENCODER, FACTORS, SOURCE, of_width
from weftlora.runs.recipe import BUILTIN, builtin, on_the_demo, own


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


def recipe_file(name: str) -> dict[str, dict[str, Any]]:
    """The recipe behind a name, as files hold it: as it runs on the demo, and on a model and rows of one's own.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in BUILTIN:
        raise ConfigError(f"there is no built-in recipe {name!r}: {suggest(name, BUILTIN)}")
    return {"demo": on_the_demo(builtin(name), name), "own": own(name)}


def recipe_text(name: str, record: dict[str, dict[str, Any]]) -> str:
    """Both as one file: the demo's, which runs as it stands, and below it the other one as comments, to put in its place."""
    rates = ", ".join(f"{of_width(width, factor=FACTORS.get(name, 1.0)):g} at {width:,}" for width in WIDTHS)
    return "\n".join(
        [
            f"# On the demo, as `weftlora train {name}` runs it:",
            _yaml(record["demo"]),
            "",
            f"# On a model and rows of your own, as `weftlora train {name} model=path/to/model data.train=rows.jsonl` runs it:",
            *(f"# {line}" for line in _yaml(record["own"]).splitlines()),
            f"# train.lr, if you name none: by the method and the hidden size of the model ({SOURCE}): {rates};",
            f"#   {ENCODER:g} for encoders. What was taken is said when training begins, and kept in run.json.",
        ]
    )


WIDTHS = (576, 2048, 4096)
"""Hidden sizes to name a rate for: a small model, one of 1 B parameters, one of 7 B."""


def _yaml(record: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(record, sort_keys=False).rstrip()
