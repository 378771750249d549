"""What is exported: an adapted model in memory, a run folder or an adapter folder, brought to one form.

A classifier has parts that its base's checkpoint does not have (a pooler, a head), and loading draws them from the seed of the
moment: an adapter of stock LoRA would then stand on other weights in every process. So these parts leave in full with the adapter,
as what was trained in full does, and an update on one of them is added to its weight.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from weftlora.adapted.experts import WeftExperts
from weftlora.adapted.frozen_weights import Checkpoint
from weftlora.adapted.layer import WeftLayer, WeftLinear
from weftlora.adapted.updates import adapter_names, base_of
from weftlora.data.paths import is_model
from weftlora.disk.ownership import PROMPTS
from weftlora.errors import AdapterError, ConfigError, MergeError, ModelError, WeftError, suggest
from weftlora.export.factors import Pair, Stack
from weftlora.export.live import Batch, seeded_ids
from weftlora.extras import needs
from weftlora.host.attach import warn_of_missing
from weftlora.host.stock_lora import foreign_layers
from weftlora.runs.adapter import write_prompts
from weftlora.runs.base_model import HEADS, resolved
from weftlora.runs.load import Trained, load_adapter, load_run, recipe_of
from weftlora.runs.run import Run, adapter_in
from weftlora.runs.scores import batches as in_batches

ROWS, BATCH = 8, 4
"""How many rows of a run's own data an export is proved on, and how many at a time."""

MEMORY = "memory"
"""The value of `base` that takes the weights in memory instead of those of a folder."""


@dataclass(frozen=True)
class Source:
    """An adapted model and what is known of where it comes from."""

    model: nn.Module
    adapters: tuple[str, ...]
    base: str | None
    """Folder or hub id of the base; None where it is only in memory."""
    run: Run | None = None
    folder: Path | None = None
    """The adapter folder, where it came from one."""
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def is_outcome(self) -> bool:
        """Whether it is what a run ended with, and not one of the run's checkpoints: the run's figures are of its outcome."""
        return self.run is not None and self.folder is not None and self.folder.name == "adapter"

    def say_prompts(self, place: Path) -> None:
        """Say in `place` how prompts were written out in training, where that is known."""
        if self.run is not None:
            write_prompts(place, self.run)
        elif self.folder is not None and (self.folder / PROMPTS).is_file():
            shutil.copyfile(self.folder / PROMPTS, place / PROMPTS)

    @property
    def layers(self) -> list[WeftLayer]:
        """The layers that carry one of the adapters, in the order of the model."""
        found = [m for m in self.model.modules() if isinstance(m, WeftLayer)]
        return [layer for layer in found if any(name in layer.weft_site for name in self.adapters)]


@dataclass(frozen=True)
class Inputs:
    """Batches to run, and in words what they are."""

    batches: list[Batch]
    what: str


def read(source: nn.Module | str | Path, adapter: str | Sequence[str] | None, base: str | Path | None) -> Source:
    """The adapters to export: those named, or else the active ones.

    Raises:
        AdapterError: no weftlora adapter there, a merged one, or one that still waits for its search.
        ModelError: the base is missing or incomplete.
    """
    if isinstance(source, nn.Module):
        compiled = getattr(source, "_orig_mod", None)
        found = _in_memory(compiled if isinstance(compiled, nn.Module) else source, base)
    else:
        if adapter is not None:
            raise ConfigError(
                f"adapter={adapter!r} names an adapter of a model in memory, and {source} is a folder: leave it out."
            )
        found = _in_folder(Path(source), base)
    names, active = adapter_names(found.model)
    wanted = [adapter] if isinstance(adapter, str) else list(adapter or active)
    if unknown := [name for name in wanted if name not in names]:
        raise AdapterError(f"the model has no adapter {unknown[0]!r}: {suggest(unknown[0], names)}")
    if not wanted:
        raise AdapterError(
            "the model has no active adapter to export: name one with adapter=..., or call set_adapter first."
        )
    found = replace(found, adapters=tuple(wanted))
    _check(found)
    for name in wanted:
        warn_of_missing(found.model, name, over=True)
    return found


def _check(source: Source) -> None:
    for adapter, config in getattr(source.model, "peft_config", {}).items():
        if adapter in source.adapters and getattr(config, "trainable_token_indices", None) is not None:
            raise AdapterError(
                f"adapter {adapter!r} trains embeddings of single tokens beside its matrices (trainable_token_indices), which servers "
                "do not read from a LoRA and an export does not carry: serve it with peft, after import weftlora."
            )
        if adapter in source.adapters and getattr(config, "bias", "none") != "none":
            raise AdapterError(
                f"adapter {adapter!r} trains biases of the base (bias={config.bias!r}), which servers do not read from a LoRA and an "
                "export does not carry: put it into the base with model.merge_and_unload() and save that."
            )
    if foreign := foreign_layers(source.model):
        raise AdapterError(
            f"{foreign[0]} has an adapter of another method, and exports are for weftlora adapters: stock LoRA needs none, "
            "save it with save_pretrained."
        )
    for layer in source.layers:
        if layer.merged:
            raise AdapterError(
                f"{layer.module_name} has its adapter merged, so the original W is not available: call model.unmerge_adapter() first."
            )
        for name in source.adapters:
            if name in layer.weft_site and layer.site(name).awaits_search:
                raise AdapterError(
                    f"adapter {name!r} searches its layers and has selected none yet: call weftlora.search_layers and train with what "
                    "it selects, then export that."
                )


def _in_memory(model: nn.Module, base: str | Path | None) -> Source:
    if not any(isinstance(m, WeftLayer) for m in model.modules()) and not foreign_layers(model):
        raise AdapterError(
            "the model has no adapter to export: give one made with get_peft_model or load_adapter, or a folder."
        )
    named = str(getattr(base_of(model), "name_or_path", "") or "")
    there = Path(named).is_dir() or not Path(named).is_absolute()  # a folder that is gone leaves what is in memory
    place = named if named and there else None
    if base is not None:
        place = None if str(base) == MEMORY else resolved(str(base), Path.cwd()) if is_model(base) else str(base)
    return Source(model, (), place)


def _in_folder(folder: Path, base: str | Path | None) -> Source:
    if base == MEMORY:
        raise ConfigError(
            f"base={MEMORY!r} means the weights of a model in memory, and {folder} is a folder: name the folder of its base."
        )
    inside = Path(os.path.abspath(adapter_in(folder)))
    holder = next((p for p in (inside.parent, inside.parent.parent) if (p / "run.json").is_file()), None)
    place = None if base is None else str(base)
    if holder is not None and inside == holder / "adapter":
        run = Run.load(holder).whole()
        if str(run.recipe["adapter"].get("recipe", "weftlora")).startswith("peft:"):
            raise AdapterError(f"{folder} holds a stock peft adapter, which needs no export: copy {inside}.")
        return _loaded(load_run(run, place), inside, run)
    if not (inside / "adapter_config.json").is_file():
        raise AdapterError(f"{folder} is not an adapter: give a run folder or a folder with an adapter_config.json.")
    return _loaded(load_adapter(inside, place), inside, None if holder is None else Run.load(holder).whole())


def _loaded(trained: Trained, folder: Path, run: Run | None) -> Source:
    return Source(trained.model, (), trained.base.source, run, folder, trained.base.tokenizer)


# ---------------------------------------------------------------------- what it is run on


def inputs_of(source: Source, given: Iterable[Mapping[str, Any]] | None) -> Inputs:
    """The batches to prove an export on: those given, else rows of the run's own data, else numbers drawn from a seed.

    Raises:
        ConfigError: `given` holds something else than batches of tensors.
        AdapterError: the model has no vocabulary to draw from.
    """
    if given is not None:
        return Inputs(checked(given), "the inputs that were given")
    if source.run is not None and source.tokenizer is not None:
        try:
            return _rows(source.run, source.tokenizer)
        except (WeftError, OSError) as error:
            # the reason names folders of this machine, and what inputs are called goes into the card
            why = " ".join(str(error).split()).rstrip(".")
            warnings.warn(
                f"the run's data cannot be read, so the export is measured on random token ids: {why}.", stacklevel=2
            )
            drawn = "random token ids (seed 0) (the run's own data could not be read)"
            return Inputs([*seeded_ids(source.model)], drawn)
    return Inputs([*seeded_ids(source.model)], "random token ids (seed 0)")


def checked(given: Iterable[Mapping[str, Any]]) -> list[Batch]:
    """The batches as they were given. Raises ConfigError where they are none."""
    found = [given] if isinstance(given, Mapping) else list(given)
    for batch in found:
        if not (isinstance(batch, Mapping) and batch and all(isinstance(value, Tensor) for value in batch.values())):
            raise ConfigError(
                "inputs must be batches, each a mapping of tensors that the model's forward takes, such as what a tokenizer "
                "returns with return_tensors='pt'."
            )
    if not found:
        raise ConfigError("inputs=[] proves nothing: give at least one batch, or leave it out.")
    return [{str(key): value for key, value in batch.items()} for batch in found]


def _rows(run: Run, tokenizer: PreTrainedTokenizerBase) -> Inputs:
    recipe = recipe_of(run)
    with needs("train", "reading the rows of a run"):
        from weftlora.data import load

        data = load(
            recipe.data, tokenizer, base_dir=recipe.base_dir, task=cast(Any, run.task), labels=run.data["labels"]
        )
    for split in ("validation", "test", "train"):
        rows = getattr(data, split)
        if rows is not None and len(rows):
            chosen = rows.select(range(min(ROWS, len(rows))))
            return Inputs(collated(chosen, tokenizer), f"{len(chosen)} rows of the run's {split} data")
    return Inputs([], "")


def collated(rows: Any, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Tokenised rows as batches of tensors."""
    from weftlora.data import Collator

    collate = Collator(cast(int, tokenizer.pad_token_id))
    plain = rows.select_columns(["input_ids", "attention_mask", "labels"])
    return [cast(Batch, collate(batch)) for batch in in_batches(plain, BATCH)]


def data_of(source: Source, path: str, limit: int) -> Inputs:
    """The first rows of a data file, read as the run reads its own; for measuring gates.

    Raises:
        AdapterError: the source is a model in memory, which has no tokenizer.
        DataError: a missing file or a row that cannot be used.
    """
    if source.tokenizer is None:
        raise AdapterError(f"data={path!r} needs the tokenizer of a run or adapter folder: give batches instead.")
    with needs("train", f"reading the rows of {path}"):
        from weftlora.data import DataConfig, load

        config, task, labels = DataConfig.parse(path), None, None
        if source.run is not None:
            run = source.run
            config = recipe_of(run).data
            task, labels = cast(Any, run.task), run.data["labels"]
        alone = {"train": path, "validation": None, "test": None, "validation_fraction": 0.0, "test_fraction": None}
        loaded = load(config.model_copy(update=alone), source.tokenizer, base_dir=Path.cwd(), task=task, labels=labels)
    rows = loaded.train.select(range(min(limit, len(loaded.train))))
    return Inputs(collated(rows, source.tokenizer), f"{len(rows)} rows of {Path(path).name}")


PARTS = frozenset({*HEADS, "pooler"})


def check_linear(source: Source) -> None:
    """Refuse adapters on embeddings, convolutions and attentions as a whole, whose updates are no pair of matrices of a linear module.

    Raises:
        MergeError: names the first such module.
    """
    for layer in source.layers:
        other = layer.reading is not None or layer.within is not None
        if other and any(name in layer.weft_site for name in source.adapters):
            kind = "MultiheadAttention" if layer.within is not None else type(layer.get_base_layer()).__name__
            raise MergeError(
                f"{layer.within or layer.module_name} is a {kind}; weftlora writes adapters of linear modules alone: "
                "put the update into the model with model.merge_and_unload(), or leave such modules out of target_modules."
            )


def drawn_parts(source: Source) -> dict[str, nn.Module]:
    """{name: base module} of the modules with weights that the checkpoint lacks, or is not known to have; classifiers only."""
    base = base_of(source.model)
    if not type(base).__name__.endswith("Classification"):
        return {}
    stored = _stored(source)
    found: dict[str, nn.Module] = {}
    above: list[str] = []  # what is inside of these is a part of them
    for name, module in base.named_modules():
        if PARTS.isdisjoint(name.split(".")) or any(name.startswith(f"{top}.") for top in above):
            continue
        if isinstance(module, (ModulesToSaveWrapper, WeftLinear, WeftExperts)):
            above.append(name)
        if isinstance(module, ModulesToSaveWrapper):
            continue
        plain = module.get_base_layer() if isinstance(module, WeftLinear) else module
        if any(True for _ in plain.parameters(recurse=False)) and not _has(stored, f"{name}.weight"):
            found[name] = plain
    return found


def _stored(source: Source) -> set[str]:
    """The names in the checkpoint; none where it cannot be looked into."""
    try:
        return set() if source.base is None else set(Checkpoint(Path(source.base)).where)
    except ModelError:
        return set()


def _has(stored: set[str], wanted: str) -> bool:
    return any(key == wanted or wanted.endswith(f".{key}") or key.endswith(f".{wanted}") for key in stored)


def in_full(drawn: dict[str, nn.Module], pairs: dict[str, Pair | Stack]) -> dict[str, Tensor]:
    """{name in the base model: value} of the drawn parts, with the update of those that carry one; they leave `pairs`."""
    values: dict[str, Tensor] = {}
    for name, module in drawn.items():
        values |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        if (pair := pairs.pop(name, None)) is not None:
            w = values[f"{name}.weight"]
            delta = pair.delta().T if isinstance(module, Conv1D) else pair.delta()
            values[f"{name}.weight"] = (w.detach().cpu().double() + delta).float()
    return values
