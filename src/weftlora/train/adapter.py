"""From the `adapter` section to an adapted model, and back to its folder."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from weftlora.errors import ConfigError, TargetError, WeftError, suggest, unknown_key
from weftlora.foreign import for_markdown, in_code
from weftlora.recipes import RECIPES
from weftlora.search import Selection
from weftlora.spec import AXES, WeftConfig
from weftlora.train.files import write_folder
from weftlora.train.ownership import ADAPTER
from weftlora.train.recipe import Task
from weftlora.train.run import Run

_TASK_TYPE = {"causal": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM, "classification": TaskType.SEQ_CLS}


def adapter_config(
    section: dict[str, Any], total_steps: int | None = None, selection: Selection | None = None
) -> PeftConfig | None:
    """The peft config that an `adapter` section describes; None for `recipe: none`, the frozen base.

    `total_steps` goes to stock AdaLoRA, whose schedule needs the length of the run. `selection` is what
    the section's `layers` names, if that is a file (`saved_selection`).

    Raises:
        ConfigError: an unknown recipe, axis or field, or a value that cannot work.
    """
    fields = dict(section)
    name = fields.pop("recipe", None)
    if name == "none":
        if fields:
            raise ConfigError(f"adapter none takes no fields, but {', '.join(fields)} is given: drop it.")
        return None
    if name is not None and name not in RECIPES:
        raise ConfigError(f"adapter.recipe={name!r} is not known: {suggest(str(name), [*RECIPES, 'none'])}")
    make = WeftConfig if name is None else RECIPES[name]
    _check_fields(name, make, fields)
    if selection is not None:
        fields["layers"] = selection.layers
    if name == "peft:adalora" and total_steps is not None:
        fields.setdefault("total_step", total_steps)
    try:
        return make(**fields)
    except WeftError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the adapter section cannot work: {_sentence(error)}") from None


def saved_selection(section: dict[str, Any], base_dir: Path | None = None) -> Selection | None:
    """The saved selection that the section's `layers` names. Raises ConfigError if that file is none."""
    layers = section.get("layers")
    if not isinstance(layers, str) or not layers.endswith(".json"):
        return None
    return Selection.load((base_dir or Path()) / Path(layers).expanduser())


def _check_fields(name: str | None, make: Callable[..., PeftConfig], fields: dict[str, Any]) -> None:
    """Refuse a field that neither the recipe nor the config has; for stock peft, the rank it would refuse only later."""
    if name is not None and name.startswith("peft:"):
        r = fields.get("r", 1)
        if not isinstance(r, int) or r < 1:
            raise ConfigError(f"adapter {name}: r={r!r} is not a rank: use a whole number from 1 up (8 is usual).")
        return
    own = inspect.signature(make).parameters
    named = {key for key, parameter in own.items() if parameter.kind is not parameter.VAR_KEYWORD} - {"self"}
    axes = set(AXES) - {"layers"} if name is not None else set()
    valid = (named | {field.name for field in dataclasses.fields(WeftConfig)} | {"recipe"}) - _NOT_IN_RECIPES - axes
    if name == "flexora":
        valid -= {"layers"}
        if "layers" in fields:
            raise ConfigError(
                f"adapter flexora searches its layers, and layers={fields['layers']!r} is given too: train a choice with another "
                "recipe, such as lora."
            )
    for key in fields:
        if key not in valid:
            raise unknown_key(str(key), valid, "adapter" if name is None else f"adapter {name}")


_NOT_IN_RECIPES = {
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "format_version", "args", "kwargs"),
}
"""Fields of the config that peft or weftlora fills in."""


def adapt(base: PreTrainedModel, config: PeftConfig, task: Task) -> PeftModel:
    """Put a new adapter into `base`, in place; the head of a classifier is trained and saved with it.

    Raises:
        TargetError: the targets match nothing, or something that cannot be adapted.
    """
    config.task_type = _TASK_TYPE[task]
    try:
        return get_peft_model(base, config)
    except WeftError:
        raise
    except ValueError as error:
        raise TargetError(f"the adapter does not fit the model: {_sentence(error)}") from None


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."


def parameters(model: PeftModel) -> dict[str, int]:
    """How many numbers are trained, and how many there are with the base; a tensor shared by sites counts once."""
    trainable, total = model.get_nb_trainable_parameters()
    return {"trainable": trainable, "total": total}


def write_adapter(model: PeftModel, run: Run) -> None:
    """Save the adapter into the run folder, with a README that says how to load it. Raises RunError."""

    def fill(folder: Path) -> None:
        model.save_pretrained(str(folder))
        (folder / "README.md").write_text(_readme(run), encoding="utf-8")

    write_folder(run.adapter_folder, fill, lambda name: name.as_posix() in ADAPTER)


def _method(run: Run) -> str:
    return run.recipe["adapter"].get("recipe") or "its axes: " + ", ".join(run.recipe["adapter"])


def _readme(run: Run) -> str:
    kind = f"`{in_code(run.base['source'])}` ({for_markdown(run.base['kind'])}), task: {run.task}"
    return _README.format(run=run, method=for_markdown(_method(run)), base=kind)


_README = """\
# Adapter {method}

Trained by weftlora {run.versions[weftlora]} for {run.steps} steps on {base}.

```python
import weftlora  # registers the adapter type with peft
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
