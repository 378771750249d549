"""Methods of weftlora as a line in the file of another trainer: a module per host, which that host alone imports.

    axolotl         found by itself; `adapter: weft` and a section `weft:` in its YAML
    ms_swift        `--external_plugins FILE --tuner_type hydralora`, where FILE imports `weftlora.integrations.ms_swift`
    llamafactory    `import weftlora.integrations.llamafactory`, then `name: weft` in the peft_config of its v1

What the hosts share is here: the config of a recipe, from what the user wrote under our name and under the host's own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weftlora.errors import ConfigError

if TYPE_CHECKING:
    from weftlora.adapter.spec import WeftConfig


def config_for(
    section: Mapping[str, Any], given: Mapping[str, tuple[str, Any]], host: str, task_type: str = "CAUSAL_LM"
) -> WeftConfig:
    """The config of one adapter that a host is to train.

    Args:
        section: what the user wrote for weftlora: `recipe`, and fields as in the `adapter:` section of a recipe file.
        given: field of the config → the host's name of it and its value, for what the host has names of its own for. None and an empty
            list stand for nothing said, and then the recipe's own default holds.
        host: what messages call the host.
        task_type: of peft.

    Raises:
        ConfigError: an unknown recipe or field; a field said twice, with two values; a recipe that this way cannot train.
    """
    from weftlora.recipes import RECIPES, SEARCHING
    from weftlora.runs.adapter import adapter_config

    ours = sorted(name for name in RECIPES if not name.startswith("peft:") and name not in SEARCHING)
    recipe = section.get("recipe")
    if recipe in SEARCHING:
        raise ConfigError(
            f"{recipe} searches its layers before training, which {host} has no place for: run weftlora search, and train what it "
            "selects with recipe lora and layers=[...]."
        )
    if recipe == "none" or str(recipe).startswith("peft:"):
        raise ConfigError(f"recipe {recipe} is not weftlora's: use {host}'s own adapter, or one of {', '.join(ours)}.")
    fields = dict(section)
    for name, (called, value) in given.items():
        if value is None or value == [] or value == {}:
            continue
        if name in fields and fields[name] != value:
            raise ConfigError(
                f"weft.{name}={fields[name]!r} and {called}={value!r} both say what {name} is: leave one of them out."
            )
        fields[name] = value
    config: Any = adapter_config(fields)
    config.task_type = task_type
    return config


def rows_to_score_on(model: Any, rows: Any) -> Any:
    """`rows` for `weftlora.Callback(validation=...)` where an adapter of `model` measures on them, else None."""
    from weftlora.adapter.spec import WeftConfig

    configs = (getattr(model, "peft_config", None) or {}).values()
    return rows if any(isinstance(each, WeftConfig) and each.ranks.needs_data for each in configs) else None
