"""transformers' Trainer and trl's SFTTrainer, with our loss on validation rows and our record of the run."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weftlora.adapted.routing import routing
from weftlora.adapter.spec import WeftConfig
from weftlora.disk.files import append_json
from weftlora.errors import ConfigError
from weftlora.host.attach import attach
from weftlora.host.optimizer import param_groups
from weftlora.progress import Progress, Tick, ignore
from weftlora.runs.adapter import write_prompts
from weftlora.runs.head_loss import answer_loss, head_of, is_the_models_own
from weftlora.runs.run import Run
from weftlora.runs.scores import mean_loss
from weftlora.train import checkpoint
from weftlora.train.callback import Finished, finish
from weftlora.train.costs import Stopwatch, announce_measuring, measuring_seconds, timed
from weftlora.train.extending import Extended
from weftlora.train.following import following, is_routed
from weftlora.train.prepare import Prepared
from weftlora.train.sampling import Asked, Sampler
from weftlora.train.sharded import Sharded, check_wrapper

log = logging.getLogger(__name__)
_COLUMNS = ["input_ids", "attention_mask", "labels"]
_NAMES = {"learning_rate": "lr", "num_input_tokens_seen": "tokens", "eval_loss": "validation_loss"}
_DROPPED = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second"}


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, marks and rotates checkpoints, and reports progress; only the main process writes."""

    def __init__(self, run: Run, prepared: Prepared, progress: Progress) -> None:
        self.run, self.prepared, self.progress = run, prepared, progress
        self.keep = prepared.recipe.train.keep
        self.loss: float | None = None
        self.rate: float | None = None
        self.since = (time.monotonic(), 0)
        rows = prepared.measured_on
        self.measured_tokens = 0 if rows is None else sum(map(len, rows["input_ids"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.since = (time.monotonic(), state.num_input_tokens_seen)
        state.stateful_callbacks.setdefault(checkpoint.SIGNATURE, {})

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_loss" in logs:  # Trainer's summary; run.json has ours
            return
        row = {
            "step": state.global_step,
            **{_NAMES.get(key, key): value for key, value in logs.items() if key not in _DROPPED},
        }
        if "loss" in logs:
            before, tokens = self.since
            self.since = (time.monotonic(), state.num_input_tokens_seen)
            self.rate = (self.since[1] - tokens) / max(self.since[0] - before, 1e-9)
            self.loss = logs["loss"]
            row["tokens_per_s"] = round(self.rate, 1)
        self.run.check_there()
        append_json(self.run.folder / "metrics.jsonl", row)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if control.should_save:
            self.run.check_there()  # Trainer makes a folder anew where there is none
        self.progress(
            Tick("train", state.global_step, state.max_steps, self.loss, self.rate, self._seconds_left(args, state))
        )

    def _seconds_left(self, args: TrainingArguments, state: TrainerState) -> float | None:
        """Of the steps that are left, as long as those were that are timed, and of the measurements between and after them."""
        sums, left = timed(state), state.max_steps - state.global_step
        if not sums.steps:
            return None
        every = args.eval_steps if args.eval_strategy != "no" else None
        times = bool(self.measured_tokens) * (
            1 + (state.max_steps // every - state.global_step // every if every else 0)
        )
        return left * sums.seconds / sums.steps + times * measuring_seconds(sums, self.measured_tokens)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.run.check_there()
            if self.prepared.name_weights(self.run):  # before the first one counts
                self.run.save()
            write_prompts(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.run)
        finish(args, state, self.keep)
        if not state.is_world_process_zero:
            return
        self.run.event("checkpoint", step=state.global_step)


class EarlyStop(TrainerCallback):
    """Ends a run after so many measurements without a lower loss; what it counts is in the logged losses, which a checkpoint has."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        since = len(losses) - 1 - min(range(len(losses)), key=lambda n: (losses[n], n))
        if since >= self.patience:
            log.info("stopped after step %d: %d measurements without a lower validation loss", state.global_step, since)
            control.should_training_stop = True


class AdaLoraSteps(TrainerCallback):
    """Stock AdaLoRA moves its ranks only when told of every step, before gradients are cleared; Trainer does not tell."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


class _Measured:
    """Mixed into a trainer: the validation loss is a mean over answer tokens, not over batches."""

    prepared: Prepared
    run: Run

    @contextlib.contextmanager
    def follows(self, rows: Any, collate: Any) -> Iterator[Any]:
        """Record what routers do meanwhile, where `train.follow_heads` asks for it."""
        trainer: Any = self
        if not (self.prepared.recipe.train.follow_heads and is_routed(self.prepared.adapter)):
            yield collate
            return
        with following(trainer.model, self.prepared.measured_domains, collate) as heads:
            yield heads.collate
        if trainer.state.is_world_process_zero:
            self.run.event("heads", step=trainer.state.global_step, **heads.figures())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        trainer: Any = self
        rows = trainer.eval_dataset if eval_dataset is None else eval_dataset
        announce_measuring(timed(trainer.state), rows)
        with self.follows(rows, self.prepared.collator) as collate:
            measured = mean_loss(trainer.model, rows, collate, trainer.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_loss": measured.loss}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


class Card:
    """The model card of a run's checkpoints, which peft writes from its template once: the next ones get a copy.

    The template costs peft as much as all the rest of saving a small adapter.
    """

    text: str | None = None

    @contextlib.contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """While checkpoints of `model` are written."""

        def written(folder: str) -> None:
            file = Path(folder) / "README.md"
            if self.text is None or file.exists():
                type(model).create_or_update_model_card(model, folder)
                self.text = file.read_text(encoding="utf-8") if file.exists() else None
            else:
                file.write_text(self.text, encoding="utf-8")

        model.create_or_update_model_card = written
        try:
            yield
        finally:
            del model.create_or_update_model_card


class _Logged:
    """Mixed into a trainer: a loss that is logged is the mean since the last one, also where the run was interrupted in between.

    Trainer itself begins to add up anew when it resumes. What it had added up is in the state that it saves, and comes back with the
    first loss after that, so that the sum is rounded as it would have been.
    """

    _not_logged: torch.Tensor | None = None
    _brought: float | None = None
    _card: Card

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *given: Any, **more: Any) -> Any:
        parent: Any = super()
        self._not_logged = tr_loss  # the sum itself, which logging sets to 0 in place
        return parent._maybe_log_save_evaluate(tr_loss, *given, **more)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        parent: Any = super()
        if self._not_logged is not None:
            mean = trainer.accelerator.gather(self._not_logged.detach()).mean().item()
            kept = {"sum": mean, "since": trainer._globalstep_last_logged}
            trainer.state.stateful_callbacks.setdefault(checkpoint.SIGNATURE, {})[_LOSS] = kept
        with self._card.of(trainer.model):
            parent._save_checkpoint(model, trial)

    def training_step(self, *given: Any, **more: Any) -> torch.Tensor:
        parent: Any = super()
        loss: torch.Tensor = parent.training_step(*given, **more)
        brought, self._brought = self._brought, None
        return loss if brought is None else loss + brought


_LOSS = "loss"
"""Where the losses that are not logged yet lie in what Trainer saves as its state."""


class _GoesOn(TrainerCallback):
    """Brings the losses back that `_Logged` has kept."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = state.stateful_callbacks[checkpoint.SIGNATURE].pop(_LOSS, None)
        if kept is not None and state.global_step > 0:
            self.trainer._brought = kept["sum"]
            self.trainer._globalstep_last_logged = kept["since"]


class _Grouped:
    """Mixed into a trainer of a weftlora adapter: its optimiser has the groups that the papers ask for."""

    def create_optimizer(self, model: Any = None) -> Any:
        trainer: Any = self
        if trainer.optimizer is None:
            args = trainer.args
            kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
            train = trainer.prepared.recipe.train
            groups = param_groups(
                model or trainer.model,
                lr=args.learning_rate,
                weight_decay=args.weight_decay,
                lora_plus_ratio=train.lora_plus_ratio,
                freeze_down=train.freeze_down,
            )
            trainer.optimizer = kind(groups, **options)
        return trainer.optimizer


class _Balanced:
    """Mixed into a trainer where routers have a load-balance term: every micro-batch adds its own, padding left out."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        parent: Any = super()
        mask = inputs.get("attention_mask")
        with routing(model) as routers:
            loss, outputs = parent.compute_loss(model, inputs, True, num_items_in_batch)
        if trainer.model.training:
            summed = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None  # Trainer will not divide
            share = 1 / trainer.current_gradient_accumulation_steps if summed else 1.0
            loss = loss + share * routers.balance_loss(mask)
        return (loss, outputs) if return_outputs else loss


class _OnAnswers:
    """Mixed into a trainer of a model with a large, frozen output layer: logits are made of the learnt tokens alone."""

    head: Any

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        trainer: Any = self
        total, count, outputs = answer_loss(model, self.head, inputs)
        summed = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        loss = total / (num_items_in_batch if summed else max(count, 1))
        return (loss, outputs) if return_outputs else loss


def _head(prepared: Prepared, args: TrainingArguments) -> Any:
    """The output layer, where the loss can be computed on answers alone; else None, and the model computes its own."""
    plain = prepared.recipe.train.trainer != "sft" and prepared.recipe.train.precision == "fp32"
    if prepared.task != "causal" or not plain or args.world_size > 1 or args.n_gpu > 1 or args.label_smoothing_factor:
        return None
    base = prepared.model.get_base_model() if isinstance(prepared.model, PeftModel) else prepared.model
    head = head_of(base)
    return head if head is not None and is_the_models_own(base, head) else None


def make_trainer(
    prepared: Prepared, run: Run, args: TrainingArguments, progress: Progress, extra: Any, samples: Sequence[Asked] = ()
) -> Trainer:
    """The trainer that `train.trainer` names, around a prepared model, which `samples` are asked of."""
    kind: Any = Trainer
    options: dict[str, Any] = {}
    if prepared.recipe.train.trainer == "sft":
        from trl import SFTTrainer

        kind, options = SFTTrainer, {"processing_class": prepared.base.tokenizer}
    own: list[TrainerCallback] = [Finished(), Stopwatch(), Recorder(run, prepared, progress)]
    if prepared.adapter is not None and prepared.adapter.peft_type == PeftType.ADALORA:
        own.append(AdaLoraSteps())
    if samples:
        own.append(Sampler(run, prepared, progress, samples))
    if patience := prepared.recipe.train.early_stopping:
        own.append(EarlyStop(patience))
    mixins: list[type] = [_Measured, _Logged, Sharded]
    added: dict[str, Any] = {"prepared": prepared, "run": run, "_card": Card()}
    if run.extends:
        mixins.insert(0, Extended)
        added["extends_at"] = run.extends["step"]
    if isinstance(prepared.adapter, WeftConfig):
        mixins.append(_Grouped)
        attach(prepared.model, on_event=_recorded(run), on_progress=progress if _main() else ignore)
    if _has_balance(prepared.adapter):
        mixins.append(_Balanced)
    if (head := _head(prepared, args)) is not None:
        mixins.append(_OnAnswers)
        added["head"] = head
    measured = type("Measured" + kind.__name__, (*mixins, kind), added)
    validation = prepared.measured_on
    trainer = measured(
        model=prepared.model,
        args=args,
        train_dataset=prepared.data.train.select_columns(_COLUMNS),
        eval_dataset=validation.select_columns(_COLUMNS) if validation is not None else None,
        data_collator=prepared.training_collator,
        callbacks=[*own, *extra],
        **options,
    )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    check_wrapper(plugin, getattr(trainer.accelerator.state, "deepspeed_plugin", None))
    if plugin is not None and prepared.recipe.train.samples:
        raise ConfigError(
            "train.samples generates on the main process alone, which a model that is split among processes cannot: leave it out."
        )
    trainer.add_callback(_GoesOn(trainer))
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, where --json answers
    return trainer


def _main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _recorded(run: Run) -> Callable[[dict[str, Any]], None]:
    """Writes what a schedule does into events.jsonl, from the main process."""

    def write(event: dict[str, Any]) -> None:
        if _main():
            run.event(event["event"], **{key: value for key, value in event.items() if key != "event"})

    return write


def _has_balance(adapter: Any) -> bool:
    return isinstance(adapter, WeftConfig) and adapter.structure.balance > 0
