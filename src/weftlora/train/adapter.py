"""From the `adapter` section to an adapted model, and back to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from weftlora.errors import ConfigError, TargetError, WeftError
from weftlora.recipes import RECIPES, check_fields
from weftlora.search import Selection
from weftlora.spec import WeftConfig, write_loading_note
from weftlora.train.files import write_folder
from weftlora.train.run import Run

if TYPE_CHECKING:
    from weftlora.data import Task

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
    check_fields(section)
    fields = dict(section)
    name = fields.pop("recipe", None)
    if name == "none":
        return None
    make = WeftConfig if name is None else RECIPES[name]
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
        (folder / "README.md").write_text(_README.format(run=run, method=_method(run)), encoding="utf-8")
        if isinstance(model.active_peft_config, WeftConfig):  # stock peft's own load anywhere
            write_loading_note(folder)

    write_folder(run.adapter_folder, fill)


def _method(run: Run) -> str:
    return run.recipe["adapter"].get("recipe") or "its axes: " + ", ".join(run.recipe["adapter"])


_README = """\
# Adapter {method}

Trained by weftlora {run.versions[weftlora]} for {run.steps} steps on `{run.base[source]}` ({run.base[kind]}), task: {run.task}.
"""
