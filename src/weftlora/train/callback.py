"""For your own Trainer or SFTTrainer: the length of the run is told, and checkpoints are complete or do not count.

    trainer = Trainer(model, args, ..., callbacks=[weftlora.Callback()])
    trainer.train(resume_from_checkpoint=weftlora.train.newest_checkpoint(args.output_dir))

on_train_begin   times in fractions and epochs get their steps; what cannot happen is an error before the first step
on_save          a marker, once every process has written its files; then, not before, old checkpoints are deleted
on_train_end     a warning if the run has stopped before something that its config asks for
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weftlora.adapter.shards import is_sharded
from weftlora.host.attach import attach, schedules, warn_of_missing
from weftlora.scoring.rows import tokens_of
from weftlora.terms.events import Event
from weftlora.train import checkpoint
from weftlora.train.sharded import save as save_sharded

_LIMIT = "weft_save_total_limit"


class Finished(TrainerCallback):
    """Trainer takes a step too many when it resumes at the last one within an epoch; with this it changes nothing.

    No flag keeps it from the forward pass and from `optimizer.step`. So gradients are dropped, which makes the step empty
    (weftlora counts no such step), and what Trainer has counted is put back; nothing is logged, measured or saved.
    """

    counted: tuple[int, float, int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        over = state.global_step >= state.max_steps
        self.counted = (state.global_step, state.epoch, state.num_input_tokens_seen) if over else None

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.counted is not None:
            optimizer.zero_grad()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.counted is not None:
            state.global_step, state.epoch, state.num_input_tokens_seen = self.counted
            control.should_log = control.should_evaluate = control.should_save = False
            control.should_training_stop = True

    on_substep_end = on_epoch_end = on_step_end


class Callback(Finished):
    """A transformers callback that makes a run of your own Trainer safe to kill and knows how long it is.

    It calls `weftlora.attach` when training begins, marks every checkpoint that is complete, for
    `weftlora.train.newest_checkpoint`, and brings back the events of `weftlora.state_dict` on resume. Complete checkpoints of
    steps that the run has not reached yet are another run's, and no longer count once it begins.

    `save_total_limit` holds as before, the best checkpoint included, but deleting waits for the marker: Trainer itself
    deletes the previous checkpoint before anybody knows that the new one is complete. So while training runs, the limit
    is taken out of `args`. Trials of a hyperparameter search are not marked.

    Args:
        on_event: called with every event, on every process, as `weftlora.attach` does.
        original, cache, validation: passed on to `weftlora.attach`.
    """

    def __init__(
        self,
        *,
        on_event: Callable[[Event], None] | None = None,
        original: str | Path | None = None,
        cache: str | Path | None = None,
        validation: Any = None,
    ) -> None:
        self.on_event, self.original, self.cache, self.validation = on_event, original, cache, validation

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raises what `weftlora.attach` raises."""
        super().on_train_begin(args, state, control)
        before, per_epoch = _begin(model, state), _steps_per_epoch(train_dataloader, args.gradient_accumulation_steps)
        options: dict[str, Any] = {
            "on_event": self.on_event,
            "original": self.original,
            "cache": self.cache,
            "validation": self.validation,
        }
        if schedules(model) or any(option is not None for option in options.values()):
            attach(
                model,
                total_steps=before + state.max_steps,
                steps_per_epoch=per_epoch,
                tokens_per_step=_tokens_per_step(train_dataloader, args),
                **options,
            )
        if state.is_hyper_param_search:
            return
        setattr(args, _LIMIT, args.save_total_limit or getattr(args, _LIMIT, None))  # not lost where training failed
        args.save_total_limit = None
        if args.should_save:
            for path in checkpoint.marked(Path(args.output_dir)):
                if checkpoint.step_of(path) > state.global_step:
                    checkpoint.unmark(path)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Raises RunError where the marker cannot be written."""
        if not state.is_hyper_param_search:
            if is_sharded(model):  # beside Trainer's own files the adapter's, which need none of the base
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                save_sharded(model, folder, args.should_save)
            finish(args, state, getattr(args, _LIMIT, None))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Warns if the run has ended, by whatever stopped it, before something that a config asks for."""
        warn_of_missing(model, over=True)
        if not hasattr(args, _LIMIT):
            return
        args.save_total_limit = getattr(args, _LIMIT)
        delattr(args, _LIMIT)
        best = _best(state)
        if best is not None and args.save_total_limit == 1 and args.should_save:  # Trainer's way with a limit of 1
            for path in checkpoint.folders(Path(args.output_dir)):
                if path.resolve() != best.resolve():
                    checkpoint.drop(path)


def finish(args: TrainingArguments, state: TrainerState, keep: int | None) -> None:
    """Mark the checkpoint that Trainer has just written, then delete all but `keep`. Every process must call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # every process writes its own random state
    if args.should_save:
        folder = Path(args.output_dir)
        checkpoint.mark(folder / f"checkpoint-{state.global_step}", state.global_step)
        if keep:
            checkpoint.rotate(folder, keep, _best(state))


def _best(state: TrainerState) -> Path | None:
    best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
    return best if best is not None and best.is_dir() else None


def _begin(model: nn.Module, state: TrainerState) -> int:
    """Optimiser steps that the adapters took before this run; kept, with their events, in what Trainer saves as its state."""
    noted, found = state.stateful_callbacks.get(checkpoint.SIGNATURE) or {}, schedules(model)
    taken = max((schedule.steps for schedule in found.values() if schedule.pending()), default=0)
    before = int(noted.get("steps_before", max(0, taken - state.global_step)))
    for name, schedule in found.items():
        schedule.events = noted.get("events", {}).get(name, schedule.events)
    state.stateful_callbacks[checkpoint.SIGNATURE] = {
        "steps_before": before,
        "events": {name: schedule.events for name, schedule in found.items()},  # the live lists
    }
    return before


def _tokens_per_step(batches: Any, args: TrainingArguments) -> float | None:
    """Tokens of an optimiser step of all processes, on average; None where the rows of a data loader cannot be counted."""
    length = tokens_of(getattr(batches, "dataset", None))
    if length is None:
        return None
    return length * args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _steps_per_epoch(batches: Any, accumulation: int) -> int | None:
    """Optimiser steps of one pass over a data loader, as Trainer counts them; None for one without a length."""
    try:
        return max(1, math.ceil(len(batches) / accumulation))
    except (TypeError, NotImplementedError):
        return None
