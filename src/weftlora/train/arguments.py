"""From the `train` section to transformers' TrainingArguments (trl's SFTConfig with `trainer: sft`)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from weftlora.errors import ConfigError, suggest
from weftlora.foreign_text import shortened
from weftlora.host.attach import schedules
from weftlora.host.versions import grouped, named
from weftlora.redaction import secrets_in
from weftlora.runs.recipe import TrainConfig
from weftlora.schedule.rank_slots import check_optimizer
from weftlora.schedule.reallocate import ReallocateController

OWNED = {
    "output_dir": "out",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "learning_rate": "train.lr",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "optim": "train.optimizer",
    "seed": "train.seed",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "logging_steps": "train.logging_every",
    "report_to": "train.report_to",
    "resume_from_checkpoint": "--resume",
}
"""Arguments that a key of ours already sets; `train.args` may not set them a second time."""


def check(config: TrainConfig) -> None:
    """Refuse what transformers would refuse later, or silently change.

    Raises:
        ConfigError: an unknown schedule, optimizer or argument name; fp16 without a GPU.
    """
    for key, value, kind in (
        ("schedule", config.schedule, SchedulerType),
        ("optimizer", config.optimizer, OptimizerNames),
    ):
        names = [str(member.value) for member in kind]
        if value not in names:
            raise ConfigError(f"train.{key}={value!r} is not known to transformers: {suggest(value, names)}")
    _check_loggers([config.report_to] if isinstance(config.report_to, str) else config.report_to)
    valid = {field.name for field in dataclasses.fields(arguments_class(config)) if field.init}
    for name in config.args:
        if name in OWNED:
            raise ConfigError(f"train.args.{name} is already set by {OWNED[name]}: use that.")
        if name not in valid:
            raise ConfigError(f"train.args has no key {name!r}: {suggest(name, valid)}")
    for name in secrets_in(config.args, "train.args"):
        raise ConfigError(
            f"{name} holds a token, key or password, which a run folder would keep: leave it out, and set the variable that its "
            "library reads, such as HF_TOKEN, or log in with that library's own command."
        )
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision=fp16 needs a GPU: use bf16 or fp32 on this machine.")


def _check_loggers(names: list[str]) -> None:
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in ("none", "all", *INTEGRATION_TO_CALLBACK):
            raise ConfigError(
                f"train.report_to={name!r} is not a logger: {suggest(name, ['none', 'all', *INTEGRATION_TO_CALLBACK])}"
            )
        if name not in ("none", "all", *installed):
            raise ConfigError(
                f"train.report_to={name!r} needs the package of that name, which is not installed: pip install it."
            )


def arguments_class(config: TrainConfig) -> type[TrainingArguments]:
    """The argument class of the trainer that `config.trainer` names."""
    if config.trainer == "sft":
        from trl import SFTConfig

        return SFTConfig
    return TrainingArguments


def device() -> str:
    """What runs train on: the GPU's name, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def rate(config: TrainConfig) -> float:
    """The peak learning rate, which a recipe has once its model is known (`weftlora.train.prepare`)."""
    if config.lr is None:
        raise ConfigError("train.lr is chosen by the model, which is not loaded yet: set it to a number.")
    return config.lr


def total_steps(config: TrainConfig, rows: int, processes: int = 1) -> int:
    """Optimiser steps of the whole run over `rows` training rows."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(steps_per_epoch(config, rows, processes) * (config.epochs or 1.0)))


def steps_per_epoch(config: TrainConfig, rows: int, processes: int = 1) -> int:
    """Optimiser steps of one pass over `rows` training rows."""
    batches = math.ceil(rows / (config.batch_size * processes))
    return max(1, math.ceil(batches / config.accumulation))


MEASURED = 10
"""How often a run is measured whose best checkpoint is kept, where it does not say how often."""


def keeps_best(config: TrainConfig) -> bool:
    """Whether a run ends with the checkpoint of its lowest validation loss."""
    return config.best or config.early_stopping is not None


def eval_interval(config: TrainConfig, steps: int) -> int | None:
    """Optimiser steps between validation losses; None for one at the end."""
    if config.eval_every is None and keeps_best(config):
        return config.save_every or max(1, math.ceil(steps / MEASURED))
    return config.eval_every


def save_interval(config: TrainConfig, steps: int) -> int:
    """Optimiser steps between checkpoints; 0 for none."""
    if config.save_every is None and keeps_best(config):
        return eval_interval(config, steps) or 1
    return max(1, math.ceil(steps / 5)) if config.save_every is None else config.save_every


def arguments(config: TrainConfig, checkpoints: Path, steps: int, validate: bool, before: int = 0) -> TrainingArguments:
    """The trainer's arguments: quiet, deterministic, writing nowhere but below `checkpoints`.

    `before` steps of the run are those of the one that it extends: a fraction is of the others.

    Raises:
        ConfigError: a value in `train.args` that transformers refuses.
    """
    every, measured = save_interval(config, steps), eval_interval(config, steps)
    values: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "max_steps": steps,
        "learning_rate": rate(config),
        "lr_scheduler_type": config.schedule,
        # a fraction of the run is worked out here: transformers before 5 takes whole steps only
        "warmup_steps": int(config.warmup) if config.warmup >= 1 else math.ceil((steps - before) * config.warmup),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optimizer,
        "seed": config.seed,
        "bf16": config.precision == "bf16",
        "fp16": config.precision == "fp16",
        "eval_strategy": "steps" if validate and measured else "no",
        "eval_steps": measured,
        "save_strategy": "steps" if every else "no",
        "save_steps": every or 500,
        "logging_steps": config.logging_every,
        "logging_first_step": True,
        "report_to": config.report_to,
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "include_num_input_tokens_seen": "non_padding",
        "label_names": ["labels"],
        **grouped(arguments_class(config), bool(config.group_by_length)),
        **_checkpointing(config),
        **(_BEST if keeps_best(config) else {}),
        **config.args,
    }
    kind = arguments_class(config)
    if config.trainer == "sft":
        values = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None, **values}
    try:
        return kind(**named(kind, values))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"transformers refuses the train section: {' '.join(str(error).split())}") from None


def check_made(args: TrainingArguments, model: Any) -> None:
    """Refuse an optimiser and a schedule that cannot be made: a package is missing, or an argument that they need; and an optimiser
    that keeps what cannot move with rank slots, where slots move.

    Raises:
        ConfigError: what the libraries say of it.
    """
    try:
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"train.optimizer={OptimizerNames(args.optim).value} cannot be made: {_one_line(error)}"
        ) from None
    pending = (controller for schedule in schedules(model).values() for controller in schedule.pending())
    if any(isinstance(controller, ReallocateController) for controller in pending):
        check_optimizer(lambda parameters: kind(parameters, **keywords))
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            probe,
            num_warmup_steps=args.get_warmup_steps(args.max_steps),
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        name = SchedulerType(args.lr_scheduler_type).value
        raise ConfigError(
            f"train.schedule={name} cannot be made: {_one_line(error)}; what it needs goes into train.args.lr_scheduler_kwargs, as "
            "in {min_lr: 1e-5}."
        ) from None


def _one_line(error: BaseException) -> str:
    return shortened(" ".join(str(error).split()), 400).rstrip(".")


_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}


def _checkpointing(config: TrainConfig) -> dict[str, Any]:
    if config.gradient_checkpointing is False:
        return {"activation_checkpointing": False}  # trl's own default is on
    reentrant = config.gradient_checkpointing == "reentrant"
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
