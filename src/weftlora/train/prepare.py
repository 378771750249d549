"""Everything that must be right before a run folder exists: recipe, base, data, adapter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, set_seed

from weftlora.adapter.spec import WeftConfig
from weftlora.data import Collator, Loaded
from weftlora.data import load as load_data
from weftlora.data.loading import sample
from weftlora.data.paths import resolve_path
from weftlora.errors import ConfigError
from weftlora.host.attach import attach, schedules
from weftlora.host.optimizer import param_groups
from weftlora.host.versions import why_no_sft
from weftlora.runs import base_model, rates
from weftlora.runs.adapter import adapt, adapter_config, as_begun, saved_selection
from weftlora.runs.base_model import Fingerprint, fingerprint
from weftlora.runs.identity import Weights, check_files
from weftlora.runs.load import put_in
from weftlora.runs.recipe import Recipe, Task, TrainConfig
from weftlora.runs.run import Run, adapter_in, check_source
from weftlora.runs.scores import evaluating
from weftlora.scoring.rows import Rows, tokens_of
from weftlora.terms.axes import AXES
from weftlora.train import arguments

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Prepared:
    """A recipe made real: rows in tokens and a model on its device, adapted unless the recipe says `none`."""

    recipe: Recipe
    base: base_model.Base
    data: Loaded
    task: Task
    model: PeftModel | PreTrainedModel
    adapter: PeftConfig | None
    fingerprint: Fingerprint
    collator: Collator
    """Of batches that are measured, and of those that are trained on where no rows are packed."""
    steps: int
    """Optimiser steps of the whole run."""
    measured_on: Dataset | None = None
    """The rows whose loss is measured during training and at its end: the validation rows, or some of them; None without any."""
    defaults: tuple[str, ...] = ()
    """What the recipe did not say, and was therefore taken, in words."""
    weights: Weights | None = None
    """The weights of the base, being looked at; None where nobody asked."""
    flat: bool = False
    """Whether batches that are trained on have no padding (`takes_flat_rows`)."""

    @property
    def measured_domains(self) -> list[str]:
        """The domain of each of the rows that are measured; "" of a row without one."""
        if self.measured_on is None:
            return []
        named = "domain" in self.measured_on.column_names
        return [str(name or "") for name in self.measured_on["domain"]] if named else [""] * len(self.measured_on)

    @property
    def training_collator(self) -> Collator:
        """Of the batches that are trained on."""
        return dataclasses.replace(self.collator, flat=self.flat)

    def name_weights(self, run: Run) -> bool:
        """Put the digests of the base's weights into a run's record, and whether they were not there yet.

        Raises:
            AdapterError: they are not those that the run was started on.
        """
        if self.weights is None or "weights" in run.base:
            return False
        run.base["weights"] = self.weights.verified()  # in place: every copy of the record shares it
        return True


def prepare(recipe: Recipe, begun: Mapping[str, Any] | None = None, begins: int = 0) -> Prepared:
    """Load and adapt what `recipe` names; writes nothing.

    Args:
        begun: the adapter's config in the record of the run that is continued.
        begins: the last step of the run that is extended.

    Raises:
        ConfigError, DataError, ModelError, TargetError: whatever in the recipe cannot work.
    """
    arguments.check(recipe.train)
    if recipe.train.from_adapter is not None:
        locate_adapter(recipe)
    if recipe.train.trainer == "sft" and (reason := why_no_sft()):
        raise ConfigError(f"train.trainer=sft cannot train: {reason}. Use trainer: auto, or another version of trl.")
    selection = saved_selection(recipe.adapter, recipe.base_dir)
    # refuse what cannot work before anything is read
    adapter_config(recipe.adapter, recipe.train.steps or 10**6, selection, recipe.from_folder)
    if recipe.train.num_threads:
        torch.set_num_threads(recipe.train.num_threads)
    base = base_model.find(recipe.model, recipe.base_dir)
    data = load_data(recipe.data, base.tokenizer, base_dir=recipe.base_dir, task=base.wants)
    task = data.task
    if recipe.train.trainer == "sft" and task != "causal":
        raise ConfigError(f"train.trainer=sft trains causal models, and this task is {task}: use trainer: auto.")
    set_seed(recipe.train.seed)
    plain = base_model.load(base, task, data.labels)
    base_model.check_ids(base, plain, data)
    base_model.check_places(plain, data.train, data.validation, data.test)
    if recipe.data.packing:
        check_packing(plain, base)
    mark = fingerprint(plain)
    steps = arguments.total_steps(recipe.train, len(data.train), int(os.environ.get("WORLD_SIZE", "1")))
    defaults = _defaults(recipe, steps, len(data.train))
    if recipe.model.dtype is None:
        recipe = recipe.with_dtype(base.precision.dtype)
        defaults += (f"weights in {base.precision.dtype} {base.precision.why}",) if base.precision.why else ()
    if recipe.train.lr is None:
        chosen = rates.rate(recipe.adapter.get("recipe"), base.settings, base_model.is_encoder(base.settings))
        recipe = recipe.with_train(lr=chosen.lr)
        defaults += (f"learning rate {chosen.lr:g} {chosen.why}",)
    if recipe.train.group_by_length is None:
        padded = 0.0 if recipe.data.packing else padding(data.train, recipe.train.batch_size)
        recipe = recipe.with_train(group_by_length=padded >= MOST_PADDING)
        if recipe.train.group_by_length:
            defaults += (f"rows of like length together (at random {padded:.0%} of the tokens would be padding)",)
    config = as_begun(adapter_config(recipe.adapter, steps, selection, recipe.from_folder), begun)
    if selection is not None:
        selection.check(plain)
    _check_measures(recipe, data)
    if config is not None:
        base_model.check_end(base, plain, data, getattr(config, "modules_to_save", None) or ())
    _check_by_role(recipe, config)
    if config is None or recipe.train.from_adapter is None:
        adapted = plain if config is None else adapt(plain, config, task)
    else:
        adapted = go_on(plain, config, locate_adapter(recipe), begun_from(recipe), base, mark)
        config = adapted.peft_config["default"]
    if isinstance(config, WeftConfig) and (recipe.train.lora_plus_ratio or recipe.train.freeze_down):
        _by_role(adapted, recipe)
    per_epoch = arguments.steps_per_epoch(recipe.train, len(data.train), int(os.environ.get("WORLD_SIZE", "1")))
    collator = Collator(base.tokenizer.pad_token_id)
    rows = _scored_on(config, data, collator)
    if isinstance(config, WeftConfig):  # what cannot happen in this run is an error now
        per_step = tokens_per_step(recipe, data)
        attach(
            adapted,
            total_steps=taken(adapted) + steps,
            steps_per_epoch=per_epoch,
            validation=rows,
            tokens_per_step=per_step,
            begins=begins if begins < steps else None,  # which `extending.point` refuses
        )
    _ready_for_checkpointing(plain, recipe)
    measured = rows_to_measure(recipe.train, data, steps)
    flat = recipe.data.packing and takes_flat_rows(plain)
    return Prepared(recipe, base, data, task, adapted, config, mark, collator, steps, measured, defaults, flat=flat)


def _defaults(recipe: Recipe, steps: int, rows: int) -> tuple[str, ...]:
    """The lengths that the recipe left open, as they are taken; a recipe that comes from a folder says everything."""
    said: list[str] = []
    train = recipe.train
    if "max_length" not in recipe.data.model_fields_set:
        said.append(f"rows of up to {recipe.data.max_length} tokens")
    if train.steps is None and train.epochs is None:
        said.append(f"1 epoch of {rows:,} rows ({steps:,} steps)")
    if "batch_size" not in train.model_fields_set:
        said.append(f"batches of {train.batch_size} rows")
    return tuple(said)


MOST_PADDING, LONG = 0.15, 128
"""Share of padding above which rows are grouped by length, where one of them has so many tokens."""


def padding(rows: Dataset, size: int, drawn: int = 200) -> float:
    """The share of padding in random batches of `size` rows; 0 where all rows are short, which is not worth a thought."""
    import pyarrow.compute as pc

    chunks = rows.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"].chunks
    lengths = [length for chunk in chunks for length in pc.list_value_length(chunk).to_pylist()]
    if size < 2 or len(lengths) <= size or max(lengths) < LONG:
        return 0.0
    draw = Random(0)
    batches = [draw.sample(lengths, size) for _ in range(drawn)]
    return 1 - sum(map(sum, batches)) / sum(size * max(batch) for batch in batches)


MOST_MEASURED = 512
"""Validation rows that are measured at a time, where the recipe does not say how many."""


def rows_to_measure(train: TrainConfig, data: Loaded, steps: int) -> Dataset | None:
    """The validation rows whose loss is measured, drawn as `train.eval_rows` says; their order stays.

    By default as many as `MOST_MEASURED`, but no more than all measurements together have half of the tokens that are trained on:
    a forward pass alone is less than half of a training step, so that they cost at most a quarter of the training. One batch is
    measured in any case.
    """
    rows = data.validation
    if rows is None or train.eval_rows == "all":
        return rows
    if train.eval_rows is not None:
        return rows.select(sample(len(rows), train.eval_rows, train.seed))
    every = arguments.eval_interval(train, steps)
    times = 1 + (steps // every if every else 0)
    seen = steps * train.batch_size * train.accumulation * _tokens(data, "train")
    count = int(0.5 * seen / times / max(_tokens(data, "validation"), 1e-9))
    return rows.select(sample(len(rows), min(MOST_MEASURED, max(count, train.batch_size)), train.seed))


def _tokens(data: Loaded, split: str) -> float:
    """Tokens a row, on average."""
    counts = data.counts[split]
    return counts.tokens / counts.rows


def tokens_per_step(recipe: Recipe, data: Loaded) -> float | None:
    """Tokens that an optimiser step of all processes is taken on, on average; None where rows have none."""
    length = tokens_of(data.train)
    rows = recipe.train.batch_size * recipe.train.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    return None if length is None else rows * length


def check_packing(model: PreTrainedModel, base: base_model.Base) -> None:
    """Refuse packed rows where the model lets them see each other, by asking it. Raises ConfigError."""
    model.config.use_cache = False  # with a cache it takes packed rows for one
    collate = Collator(base.tokenizer.pad_token_id)
    size = int(cast(Any, model.get_input_embeddings()).weight.shape[0])
    rows = [[(7 * at + 3 * row) % size for at in range(5 + row)] for row in range(2)]
    apart = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
    mask = [number for number, ids in enumerate(rows, start=1) for _ in ids]
    together = {"input_ids": [token for ids in rows for token in ids], "attention_mask": mask}
    with evaluating(model), torch.no_grad():
        alone, held = (
            model(**{key: value.to(model.device) for key, value in collate([row]).items()}).logits[0].float()
            for row in (apart[1], together)
        )
    if not torch.allclose(held[len(rows[0]) :], alone, rtol=1e-2, atol=1e-3 * float(alone.abs().max())):
        how = model.config._attn_implementation
        raise ConfigError(
            f"data.packing cannot be used: rows that are packed together see each other in {base.config.path!r} with {how} attention; "
            "leave it out, or try another model.attn_implementation."
        )


def takes_flat_rows(model: PreTrainedModel) -> bool:
    """Whether packed rows are cheapest one behind the other: flash attention takes them apart by their positions, without a mask."""
    return "flash" in str(getattr(model.config, "_attn_implementation", None))


def locate_adapter(recipe: Recipe) -> Path:
    """The adapter folder that `train.from` names. Raises AdapterError."""
    folder = resolve_path(str(recipe.train.from_adapter), recipe.base_dir)
    check_source(folder)
    return adapter_in(folder)


def begun_from(recipe: Recipe) -> Run | None:
    """The run whose adapter `train.from` names; None without one, and for an adapter folder out of its run."""
    if recipe.train.from_adapter is None:
        return None
    folder = locate_adapter(recipe)
    return Run.load(folder.parent) if folder.name == "adapter" and (folder.parent / "run.json").is_file() else None


def go_on(
    plain: PreTrainedModel,
    config: PeftConfig,
    folder: Path,
    before: Run | None,
    base: base_model.Base,
    mark: Fingerprint,
) -> PeftModel:
    """The base with the adapter of a folder in it, to be trained further; it must be what the recipe's adapter section describes.

    Raises:
        AdapterError: another base, a damaged adapter or none.
        ConfigError: it is another adapter than the recipe's.
    """
    if before is not None:  # its weights are looked at while training begins
        base_model.check_same(Fingerprint.of(before.whole().base), mark, str(folder), base.source)
        check_files(before.base, base.settings, base.source, str(folder))
    adapted = put_in(plain, folder, trainable=True)
    saved = adapted.peft_config["default"]
    for name in _DESCRIBES:
        there, asked = (_comparable(getattr(one, name, None)) for one in (saved, config))
        if there != asked and name in {field.name for field in dataclasses.fields(config)}:
            raise ConfigError(
                f"train.from={folder} has {name}={there}, and the recipe's adapter has {name}={asked}: give the recipe the adapter "
                "section of the run that it is from."
            )
    return adapted


_DESCRIBES = ("peft_type", *AXES, "r", "lora_alpha", "use_rslora")
"""Fields of a config that say what an adapter computes, whatever modules it is on."""


def _comparable(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def taken(model: torch.nn.Module) -> int:
    """Optimiser steps that an adapter with something still to come has taken before this run."""
    return max((schedule.steps for schedule in schedules(model).values() if schedule.pending()), default=0)


def _check_measures(recipe: Recipe, data: Loaded) -> None:
    if arguments.keeps_best(recipe.train) and (data.validation is None or not len(data.validation)):
        raise ConfigError(
            "train.best and train.early_stopping use the validation loss, and the data has no validation rows: set "
            "data.validation_fraction=0.1, or name a file with data.validation."
        )


def _check_by_role(recipe: Recipe, config: PeftConfig | None) -> None:
    """Refuse to treat tensors by role in adapters that do not say them."""
    given = {"lora_plus_ratio": recipe.train.lora_plus_ratio, "freeze_down": recipe.train.freeze_down}
    for key, value in given.items():
        if value and config is not None and not isinstance(config, WeftConfig):
            raise ConfigError(
                f"train.{key}={value!r} is for weftlora's adapters, and {recipe.adapter.get('recipe')} is peft's own: use adapter: "
                "lora, which computes what peft:lora does, or leave the key out."
            )


def _by_role(adapted: torch.nn.Module, recipe: Recipe) -> None:
    """Refuse now what the optimiser would refuse later, and freeze what it will not train, so that the run counts what it trains."""
    train = recipe.train
    param_groups(
        adapted, lr=arguments.rate(train), lora_plus_ratio=train.lora_plus_ratio, freeze_down=train.freeze_down
    )


def _scored_on(config: PeftConfig | None, data: Loaded, collator: Collator) -> Rows | None:
    """The validation rows, where the adapter scores its rank slots on some."""
    if not (isinstance(config, WeftConfig) and config.ranks.needs_data):
        return None
    if data.validation is None or not len(data.validation):
        raise ConfigError(
            "this adapter decides on validation rows which modules get rank, and the data has none: set "
            "data.validation_fraction=0.1, or "
            "data.validation to a file."
        )
    return Rows(data.validation.select_columns(["input_ids", "attention_mask", "labels"]), collator)


def _ready_for_checkpointing(plain: Any, recipe: Recipe) -> None:
    if recipe.train.gradient_checkpointing:
        plain.config.use_cache = False
    if recipe.train.gradient_checkpointing == "reentrant":
        plain.enable_input_require_grads()  # or no gradient reaches an adapter behind a frozen embedding
