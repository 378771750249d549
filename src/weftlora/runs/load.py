"""A trained run back from its folder: its base, its adapter, ready to evaluate or generate."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from weftlora.disk.files import check_regular
from weftlora.errors import AdapterError, DivergedError, RunError, WeftError
from weftlora.extras import needs
from weftlora.foreign_text import from_json
from weftlora.runs import base_model
from weftlora.runs.base_model import Fingerprint, check_same, fingerprint
from weftlora.runs.identity import Weights, check_files
from weftlora.runs.run import Run

if TYPE_CHECKING:
    from weftlora.data import Task
    from weftlora.runs.recipe import Recipe

_TASK_OF = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classification"}


@dataclass(frozen=True)
class Trained:
    """A base with a trained adapter in it, or without one to measure the base."""

    base: base_model.Base
    model: PeftModel | PreTrainedModel
    task: Task


def load_run(
    run: Run,
    base: str | None = None,
    adapted: bool = True,
    at_the_start: Callable[[PreTrainedModel], None] = lambda plain: None,
) -> Trained:
    """The model of a run.

    Args:
        base: stands in for the path the run was trained on, and must be the same model.
        at_the_start: called with the base without an adapter, torch's random state being that in which the run drew its own.

    Raises:
        AdapterError: no adapter, a newer format, or another base than it was trained on.
        ModelError: the base is missing or incomplete.
    """
    wanted = _wanted(run.whole())
    if base:
        wanted = dataclasses.replace(wanted, path=base)
    found = base_model.find(wanted, Path.cwd() if base else Path(run.base_dir))
    task = cast("Task", run.task)
    known = run.base.get("weights")
    weights = Weights(found.source, known, str(run.adapter_folder)) if isinstance(known, dict) and known else None
    with _drawing(run.seed):  # a classification head that no adapter brings is drawn as it was in training
        plain = base_model.load(found, task, run.data["labels"])
        trained = Fingerprint.of(run.base)
        check_same(trained, fingerprint(plain), str(run.adapter_folder), found.source)
        check_files(run.base, found.settings, found.source, str(run.adapter_folder))
        at_the_start(plain)
    if weights is not None:
        weights.verified()
    if not adapted:
        return Trained(found, plain.eval(), task)
    if not run.adapter_folder.is_dir():
        raise AdapterError(f"{run.folder} has no adapter: the run is {run.status}; finish it with --resume.")
    return Trained(found, put_in(plain, run.adapter_folder).eval(), task)


def load_adapter(folder: Path, base: str | None = None, labels: Sequence[str] = ()) -> Trained:
    """A bare adapter folder, as peft saves it, on the base it names or on `base`; `labels` name the classes of a classifier.

    Raises:
        AdapterError: an unreadable or newer adapter, or one that does not fit the base.
        ModelError: the base is missing or incomplete.
    """
    found = load_base(folder, base, labels)
    return Trained(found.base, put_in(cast(PreTrainedModel, found.model), folder).eval(), found.task)


def load_base(folder: Path, base: str | None = None, labels: Sequence[str] = ()) -> Trained:
    """The base that a bare adapter folder names, or `base`, without the adapter.

    Raises:
        AdapterError: an unreadable or newer adapter, or one that names no base.
        ModelError: the base is missing or incomplete.
    """
    config = _read_config(folder)
    path = base or config.base_model_name_or_path
    if not path:
        raise AdapterError(f"the adapter {folder} names no base model: give it with --base.")
    found = base_model.find(base_model.Wanted(path), Path.cwd())
    task = cast("Task", _TASK_OF.get(str(getattr(config.task_type, "value", config.task_type)), "causal"))
    with _drawing(0):
        plain = base_model.load(found, task, _labels(folder, found, labels) if task == "classification" else None)
    return Trained(found, plain.eval(), task)


def load_model(found: base_model.Base) -> Trained:
    """A model without an adapter, to be talked to.

    Raises:
        ModelError: it is incomplete, or generates no text.
    """
    task: Task = "seq2seq" if found.settings.is_encoder_decoder else "causal"
    return Trained(found, base_model.load(found, task).eval(), task)


def _wanted(run: Run) -> base_model.Wanted:
    """The base that a run names. Raises RunError where its record is damaged."""
    section = run.recipe.get("model")
    fields = {field.name for field in dataclasses.fields(base_model.Wanted)}
    if not isinstance(section, dict) or not isinstance(section.get("path"), str):
        raise RunError(
            f"{run.folder}/run.json names no base model: it is damaged; train again, or use the adapter folder."
        )
    return base_model.Wanted(**{key: value for key, value in section.items() if key in fields})


def recipe_of(run: Run, *overrides: str) -> Recipe:
    """The recipe of a run, its rows held to the length that training held them to, which its base may have shortened."""
    with needs("train", "reading the rows of a run"):
        from weftlora.runs.recipe import Recipe
    recipe = Recipe.read(run.recipe, *overrides, base_dir=Path(run.base_dir), from_folder=True)
    if "max_length" not in run.data or any(text.startswith("data.max_length") for text in overrides):
        return recipe
    data = recipe.data.model_copy(update={"max_length": run.data["max_length"]})
    return recipe.model_copy(update={"data": data})


_HEAD = re.compile(r"(score|classifier)(\.out_proj)?\.weight")


def _labels(folder: Path, base: base_model.Base, known: Sequence[str]) -> list[str]:
    """The names of the classes: those known, the base's own, or their numbers where the head that the adapter brings has another."""
    own = [base.settings.id2label[number] for number in sorted(base.settings.id2label)]
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return list(known) or own
    with safe_open(file, "pt") as saved:
        heads = [key for key in saved.keys() if _HEAD.fullmatch(key.removeprefix("base_model.model."))]  # noqa: SIM118
        count = saved.get_slice(max(heads, key=len)).get_shape()[0] if heads else len(own)
    if known and count == len(known):
        return list(known)
    return own if count == len(own) else [f"LABEL_{number}" for number in range(count)]


@contextmanager
def borrowed(base: nn.Module) -> Iterator[nn.Module]:
    """A model of its own modules around the very tensors of `base`, to put an adapter in; `base` stays as it was."""
    trained = [(p, p.requires_grad) for p in base.parameters()]
    try:
        yield copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})
    finally:
        for p, required in trained:
            p.requires_grad_(required)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Loading draws tensors that the files then overwrite: it must not move the caller's random state."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def put_in(plain: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """Load the adapter in `folder` into `plain`, in place, to be used or trained; peft alone only warns about tensors that do not fit.

    Raises:
        AdapterError: a newer format, missing files, or tensors that are not those of this base.
        DivergedError: values that are no numbers.
    """
    config = _read_config(folder)
    embeddings = _check_vocabulary(plain, folder)
    try:
        with warnings.catch_warnings(), _drawing(0):
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(plain, str(folder), config=config, is_trainable=trainable)
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            saved = set(file.keys())
    except WeftError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise AdapterError(f"the adapter {folder} does not fit its base: {_short(error)}") from None
    if sick := _not_finite(folder):
        raise DivergedError(
            f"the adapter {folder} holds values that are not numbers, such as in {sick}: its training diverged, or "
            "the file is damaged."
        )
    wanted = set(get_peft_model_state_dict(adapted))
    if differing := sorted((saved ^ wanted) - embeddings):
        what = "has no tensor for" if differing[0] in wanted else "has a tensor that this base has no place for,"
        raise AdapterError(f"the adapter {folder} {what} {differing[0]}: give the base it was trained on.")
    return adapted


def _check_vocabulary(plain: PreTrainedModel, folder: Path) -> set[str]:
    """The embeddings that an adapter brings in full, as peft saves them once they were resized.

    Raises:
        AdapterError: they are of another vocabulary than the base's.
    """
    modules = {plain.get_input_embeddings(), plain.get_output_embeddings()} - {None}
    own = {f"base_model.model.{name}.weight": m.weight for name, m in plain.named_modules() if m in modules}
    found: set[str] = set()
    with contextlib.suppress(OSError, SafetensorError), safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = own.keys() & set(file.keys())
        for key in sorted(found):
            saved, here = file.get_slice(key).get_shape()[0], own[key].shape[0]
            if saved != here:
                raise AdapterError(
                    f"the adapter {folder} was saved with a vocabulary of {saved} tokens, and the base has {here}: its model was "
                    "resized (resize_token_embeddings), so give it the base as it was saved after that."
                )
    return found


def _not_finite(folder: Path) -> str:
    """The first tensor of an adapter with a value that is no number; empty if there is none."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return str(key)
    return ""


def _read_config(folder: Path) -> PeftConfig:
    check_regular(folder, AdapterError)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder} has no adapter_config.json: give a run folder or an adapter folder.")
    try:
        if not isinstance(from_json((folder / "adapter_config.json").read_text(encoding="utf-8")), dict):
            raise ValueError("its adapter_config.json holds no settings")
        config = PeftConfig.from_pretrained(str(folder))
    except WeftError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        raise AdapterError(f"the adapter {folder} cannot be read: {_short(error)}") from None
    _check_runs_nothing(config, folder)
    return config


def _check_runs_nothing(config: PeftConfig, folder: Path) -> None:
    """Refuse what peft would import, or load from elsewhere, on the word of an adapter's config. Raises AdapterError."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind == "XLORA":
        raise AdapterError(
            f"{folder} is an adapter of the kind {kind}, which weftlora does not read: load it with peft itself."
        )
    if getattr(config, "megatron_config", None) is not None:
        raise AdapterError(
            f"the adapter {folder} names a Python module (megatron_config), which weftlora does not import: "
            "take that out of adapter_config.json."
        )


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".")[:300] + "."
