"""A paper's name is a recipe: a constructor that returns one `WeftConfig` and holds no mechanism.

What a recipe takes is in its signature, which costs nothing to read: torch and peft are loaded when a config is made. What it does
not take itself, `r` and the config's `fields` apart, are the fields of its term by the same names; it hands on what it was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from weftlora.errors import ConfigError, suggest, unknown_key
from weftlora.recipes.alora import AllocLoraConfig
from weftlora.recipes.flexora import FlexoraConfig
from weftlora.recipes.hydralora import HydraLoraConfig
from weftlora.recipes.lora import PlainLoraConfig, peft_adalora, peft_lora
from weftlora.recipes.task_directions import LoraDashConfig, LoraInitConfig, LoraTsdConfig
from weftlora.recipes.tied_lora import TiedLoraConfig

if TYPE_CHECKING:
    from peft import PeftConfig

RECIPES: dict[str, Callable[..., PeftConfig]] = {
    "lora": PlainLoraConfig,
    "hydralora": HydraLoraConfig,
    "tied_lora": TiedLoraConfig,
    "lora_dash": LoraDashConfig,
    "lora_init": LoraInitConfig,
    "lora_tsd": LoraTsdConfig,
    "alora": AllocLoraConfig,
    "flexora": FlexoraConfig,
    "peft:lora": peft_lora,
    "peft:adalora": peft_adalora,
}
"""Recipe name → its constructor; what a recipe file names under `adapter`. The controls of stock peft are here too."""

SEARCHING = frozenset({"flexora"})
"""Recipes that search their layers, so that a choice of them is no field."""

CONFIG_KEYS = frozenset(
    {
        "structure",
        "start",
        "boost",
        "ranks",
        "layers",
        "r",
        "lora_alpha",
        "lora_dropout",
        "dropout_mask",
        "target_modules",
    }
    | {
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "patterns_at_start",
        "modules_to_save",
    }
    | {"target_parameters", "bias", "use_rslora", "trainable_token_indices", "init_lora_weights", "ensure_weight_tying"}
)
"""Fields of `WeftConfig` that a recipe file may set; the others are filled in by peft and weftlora."""
_FIXED = {"structure", "start", "boost", "ranks"}
"""Axes that a recipe's name decides."""


def own_fields(name: str) -> dict[str, Any]:
    """The fields of a recipe of its own and their defaults."""
    parameters = inspect.signature(RECIPES[name]).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}


def check_fields(section: Mapping[str, Any]) -> None:
    """Refuse an unknown recipe, and a field that neither it nor the config has, before anything heavy is loaded.

    Of stock peft the rank is checked, which it would refuse only later; its own fields are checked where its config is made.

    Raises:
        ConfigError: names the nearest valid name.
    """
    fields = {key: value for key, value in section.items() if key != "recipe"}
    name = section.get("recipe")
    if name == "none":
        if fields:
            raise ConfigError(f"adapter none takes no fields, but {', '.join(fields)} is given: drop it.")
        return
    if name is not None and (not isinstance(name, str) or name not in RECIPES):
        raise ConfigError(f"adapter.recipe={name!r} is not known: {suggest(str(name), [*RECIPES, 'none'])}")
    if name is not None and name.startswith("peft:"):
        r = fields.get("r", 1)
        if not isinstance(r, int) or r < 1:
            raise ConfigError(f"adapter {name}: r={r!r} is not a rank: use a whole number from 1 up (8 is usual).")
        return
    valid = CONFIG_KEYS | {"recipe"} if name is None else {*(CONFIG_KEYS - _FIXED), *own_fields(name), "recipe"}
    if name in SEARCHING:
        valid -= {"layers"}
        if "layers" in fields:
            raise ConfigError(
                f"adapter {name} searches its layers, and layers={fields['layers']!r} is given too: leave it out, or give layers "
                "to another recipe, such as lora."
            )
    for key in fields:
        if key not in valid:
            if others := [other for other in RECIPES if name and key in own_fields(other)]:
                raise ConfigError(f"adapter {name} has no key {key!r}, which is of {', '.join(others)}: leave it out.")
            raise unknown_key(str(key), valid, "adapter" if name is None else f"adapter {name}")


__all__ = [
    "RECIPES",
    "AllocLoraConfig",
    "FlexoraConfig",
    "HydraLoraConfig",
    "LoraDashConfig",
    "LoraInitConfig",
    "LoraTsdConfig",
    "PlainLoraConfig",
    "TiedLoraConfig",
    "peft_adalora",
    "peft_lora",
]
