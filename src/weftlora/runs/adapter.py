"""From the `adapter` section to an adapted model, and back to its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from weftlora.adapter.spec import WeftConfig, decode_choice, write_loading_note
from weftlora.disk.files import write_folder
from weftlora.disk.ownership import ADAPTER, PROMPTS
from weftlora.errors import ConfigError, TargetError, WeftError
from weftlora.foreign_text import for_markdown, in_code
from weftlora.recipes import RECIPES, check_fields
from weftlora.runs.run import Run
from weftlora.search import Selection
from weftlora.terms.axes import AXES
from weftlora.terms.trust import from_folder

if TYPE_CHECKING:
    from weftlora.data import Task

_TASK_TYPE = {"causal": TaskType.CAUSAL_LM, "seq2seq": TaskType.SEQ_2_SEQ_LM, "classification": TaskType.SEQ_CLS}


def adapter_config(
    section: dict[str, Any],
    total_steps: int | None = None,
    selection: Selection | None = None,
    saved: bool = False,
) -> PeftConfig | None:
    """The peft config that an `adapter` section describes; None for `recipe: none`, the frozen base.

    `total_steps` goes to stock AdaLoRA, whose schedule needs the length of the run. `selection` is what
    the section's `layers` names, if that is a file (`saved_selection`). `saved`: the section comes from a folder, so that the
    terms of other packages in it need trust (`weftlora.trust_terms`).

    Raises:
        ConfigError: an unknown recipe, axis or field, or a value that cannot work.
        AdapterError: a saved section names a term of a package that is not trusted.
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
        with from_folder() if saved else nullcontext():
            return make(**fields)
    except WeftError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the adapter section cannot work: {_sentence(error)}") from None


def as_begun(config: PeftConfig | None, begun: Mapping[str, Any] | None) -> PeftConfig | None:
    """`config` with what the run that it continues was started with: `begun` is the config in that run's record.

    A recipe says only what its user wrote; what it leaves to a default (the rule of moving ranks, how long a search is) is what the
    default was when the run began.
    """
    if begun is not None and isinstance(config, WeftConfig):
        for axis in ("ranks", "layers"):
            said = begun.get(axis)
            if isinstance(said, Mapping) and said.get("kind") == getattr(config, axis).kind:
                setattr(config, axis, decode_choice(axis, said, int(begun.get("format_version", 1))))
    return config


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


def write_adapter(model: PeftModel, run: Run, tensors: dict[str, Tensor] | None = None) -> None:
    """Save the adapter into the run folder, with a README that says how to load it. Raises RunError.

    `tensors` are the adapter's, by name, of a model that is split among processes.
    """

    def fill(folder: Path) -> None:
        model.save_pretrained(str(folder), **({} if tensors is None else {"state_dict": tensors}))
        (folder / "README.md").write_text(_readme(run), encoding="utf-8")
        write_prompts(folder, run)
        if isinstance(model.active_peft_config, WeftConfig):  # stock peft's own load anywhere
            write_loading_note(folder, _packages(run))

    write_folder(run.adapter_folder, fill, lambda name: name.as_posix() in ADAPTER)


def write_prompts(folder: Path, run: Run) -> None:
    """Say in the folder what the rows were that its adapter was trained on, for whoever asks it without its run."""
    rows = data if isinstance(data := run.recipe.get("data"), dict) else {}
    said = {
        "format": run.data.get("format"),
        "prompt_template": rows.get("prompt_template"),
        "system": rows.get("system", "keep"),
        "max_length": run.data.get("max_length"),
        "labels": run.data.get("labels"),
    }
    (folder / PROMPTS).write_text(json.dumps(said, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")


def _method(run: Run) -> str:
    return run.recipe["adapter"].get("recipe") or "its axes: " + ", ".join(run.recipe["adapter"])


def _readme(run: Run) -> str:
    kind = f"`{in_code(run.base['source'])}` ({for_markdown(run.base['kind'])}), task: {run.task}"
    return _README.format(
        run=run, method=for_markdown(_method(run)), base=kind, rows=_ROWS.get(str(run.data.get("format")), "")
    )


def _packages(run: Run) -> list[str]:
    """The packages whose terms the adapter needs."""
    choices = [run.adapter.get(axis) for axis in AXES]
    return sorted({str(choice["package"]) for choice in choices if isinstance(choice, dict) and choice.get("package")})


_ROWS = {
    "chat": "\nIt answers conversations: write prompts in the chat template of the base.\n",
    "prompt_completion": "\nIt answers prompts as they are, without a chat template.\n",
    "text": "\nIt continues plain text.\n",
}

_README = """\
# Adapter {method}

Trained by weftlora {run.versions[weftlora]} for {run.steps} steps on {base}.
{rows}"""
