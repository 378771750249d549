"""One tree of errors. A message says what was given, why it fails and what to do, in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from weftlora.foreign_text import shortened, visible
from weftlora.redaction import redacted


class _PlainError(Exception):
    """What `WeftError` is made of where peft is not loaded. Python lets a class that is written in Python take the place of another
    among its bases, and not the built-in Exception's."""


class WeftError(_PlainError):
    """Base of every error weftlora raises on purpose; the command line prints it as one line and exits 1.

    Its message is fit to be shown: no secret is in it, control characters are written out, and a huge value is cut. Where peft is
    loaded, and has an error of its own, every one of these is a `peft.PeftError` too.
    """

    def __init__(self, *given: object) -> None:
        super().__init__(
            *(shortened(visible(redacted(each), lines=True)) if isinstance(each, str) else each for each in given)
        )


class ConfigError(WeftError, ValueError):
    """A setting cannot work."""


class CombinationError(ConfigError):
    """Two choices that do not go together (see `weftlora.adapter.compat`)."""


class TargetError(WeftError, ValueError):
    """A module that cannot be adapted, or a target that matches nothing."""


class NoMatchError(TargetError):
    """Targets that match no module of the model; `peft.utils.error.NoMatchingPeftModuleError` too, where peft has it."""


class MergeError(WeftError, ValueError):
    """An adapter that has no weight-space form, or a merge in a state that does not allow it."""


class AdapterError(WeftError, ValueError):
    """A saved adapter that cannot be used: newer format, wrong base, missing or malformed files."""


class DataError(WeftError, ValueError):
    """A data file that is missing or a row that cannot be used; names file and line."""


class ModelError(WeftError, ValueError):
    """A base model that is missing, incomplete, or made for another task."""


class RunError(WeftError, RuntimeError):
    """A run folder that cannot be written, resumed or read."""


class ApartError(WeftError):
    """The processes of a run are no longer at one place, and cannot go on together: what failed on one of them ends all."""


class DivergedError(RunError):
    """A training whose losses or scores are no numbers any more."""


class MissingExtraError(WeftError, ImportError):
    """A package that the call needs is in an extra that is not installed; says the `pip install` line."""


class _TimeIsUpError(Exception):
    """Ends a stage of `weftlora.auto`, where what has ended by then counts; no caller sees it."""


def are_also(host_error: type[Exception], no_match: type[Exception] | None = None) -> None:
    """Make every error of this tree one of the host's too, so that its `except` clauses catch them; once is enough.

    Args:
        host_error: what the host calls the base of its errors.
        no_match: what it raises where an adapter matches no module.
    """
    if not issubclass(WeftError, host_error):
        _give_bases(WeftError, host_error)
    if no_match is not None and not issubclass(NoMatchError, no_match):
        _give_bases(NoMatchError, TargetError, no_match)


def _give_bases(kind: type[Exception], *bases: type[Exception]) -> None:
    kind.__bases__ = bases


def suggest(name: str, valid: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest valid one, or all of them.

    >>> suggest("lora_alpa", ["r", "lora_alpha"])
    "did you mean 'lora_alpha'?"
    """
    names = sorted(valid)
    folded = {valid_name.lower(): valid_name for valid_name in names}
    if near := get_close_matches(name.lower(), folded, n=1, cutoff=0.6):
        return f"did you mean {folded[near[0]]!r}?"
    return f"use one of {', '.join(names)}."


_AS_ELSEWHERE = {
    "train.lr": "learning_rate lora_lr",
    "train.batch_size": "per_device_train_batch_size micro_batch_size train_batch_size per_device_batch_size bs",
    "train.accumulation": "gradient_accumulation_steps gradient_accumulation grad_accum",
    "train.epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "train.steps": "max_steps max_train_steps num_steps iters",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "train.warmup": "warmup_steps warmup_ratio lr_warmup_steps num_warmup_steps",
    "train.optimizer": "optim",
    "train.precision": "bf16 fp16 mixed_precision",
    "train.eval_every": "eval_steps evals_per_epoch steps_per_eval",
    "train.eval_rows": "max_eval_samples eval_sample_size",
    "train.save_every": "save_steps saves_per_epoch",
    "train.keep": "save_total_limit",
    "train.logging_every": "logging_steps",
    "train.best": "load_best_model_at_end",
    "train.early_stopping": "early_stopping_patience",
    "train.from": "lora_model_dir adapter_name_or_path resume_from_adapter",
    "adapter.r": "rank lora_r lora_rank",
    "adapter.lora_alpha": "alpha",
    "adapter.lora_dropout": "dropout",
    "adapter.target_modules": "lora_target_modules lora_target targets",
    "adapter.modules_to_save": "lora_modules_to_save additional_target",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len seq_length model_max_length",
    "data.train": "dataset datasets dataset_path dataset_name train_file data_path",
    "data.validation_fraction": "val_set_size val_size eval_split_ratio",
    "data.limit": "max_samples max_train_samples",
    "model.path": "base_model model_name model_name_or_path pretrained_model_name_or_path model_id",
    "model.dtype": "torch_dtype",
    "model.attn_implementation": "flash_attention flash_attn attn",
    "out": "output_dir save_dir adapter_path",
}
ELSEWHERE = {name: key for key, names in _AS_ELSEWHERE.items() for name in names.split()}
"""What other trainers call a key of a recipe."""
QUANTISED = {"load_in_4bit", "load_in_8bit", "quantization", "quantization_bit", "quantization_config", "qlora"}


def unknown_key(name: str, valid: Iterable[str], where: str) -> ConfigError:
    """The error for a key that `where` does not have: with the one that other trainers mean by it, if they have it."""
    valid = set(valid)
    if name in QUANTISED:
        return ConfigError(
            f"{where} has no key {name!r}: a base in fewer bits is asked for by model.load_in_4bit=true, model.load_in_8bit=true or "
            "model.quantization, with the keys of transformers' quantisation configs."
        )
    if (key := ELSEWHERE.get(name)) is not None:
        own = key.rpartition(".")[2]
        return ConfigError(f"{where} has no key {name!r}: weftlora calls it {own if own in valid else key}.")
    return ConfigError(f"{where} has no key {name!r}: {suggest(name, valid)}")
