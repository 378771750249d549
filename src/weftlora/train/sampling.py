"""Samples during training: the same few prompts, answered at every measurement and at the end, as `weftlora generate` would.

samples.jsonl    a line an answer: its step, the prompt, what the model was given, what it said, and the row's own answer

Answers are greedy and draw nothing, so that a run with samples ends with the adapter of the same run without them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weftlora.data import generation_prompts
from weftlora.data.loading import sample
from weftlora.disk.files import append_json
from weftlora.errors import ConfigError
from weftlora.foreign_text import shortened, visible
from weftlora.progress import Progress, Tick
from weftlora.runs.load import Trained
from weftlora.runs.run import SAMPLES, Run
from weftlora.train import arguments
from weftlora.train.evaluation import complete, room, stop_tokens
from weftlora.train.prepare import Prepared
from weftlora.train.prompting import Prompting, prompt_ids, stop_at_turns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A prompt, the tokens that it becomes, and the answer that its row has; None for a prompt of the user's."""

    prompt: str
    ids: list[int]
    reference: str | None = None


def asked(prepared: Prepared) -> list[Asked]:
    """What `train.samples` asks: its own prompts, or those of so many validation rows.

    Raises:
        ConfigError: a classifier, rows without prompts, no validation rows, or a prompt that the run has no place for.
        ModelError: a prompt that is longer than the model takes.
    """
    wanted, data = prepared.recipe.train.samples, prepared.data
    if not wanted:
        return []
    if prepared.task == "classification":
        raise ConfigError(f"train.samples={wanted!r} asks for answers, and a classifier gives none: leave it out.")
    trained = _trained(prepared)
    if isinstance(wanted, list):
        how = _how(prepared)
        given = [Asked(text, prompt_ids(trained, how.written(text))) for text in wanted]
        room(trained.model, [each.ids for each in given])
        return given
    if data.format == "text":
        raise ConfigError(
            f"train.samples={wanted} takes prompts from validation rows, and rows of plain text have none: give some, as in "
            "train.samples=['Once upon a time']."
        )
    if data.validation is None or not len(data.validation):
        raise ConfigError(
            f"train.samples={wanted} takes prompts from validation rows, and the data has none: set data.validation_fraction=0.1, or "
            "give prompts, as in train.samples=['What is the capital of Mali?']."
        )
    drawn = sample(len(data.validation), wanted, prepared.recipe.train.seed)  # the first rows of a file are often alike
    rows = generation_prompts(data.validation.select(drawn))
    return [Asked(_last_turn(prepared, row.prompt, row.input_ids), row.input_ids, row.reference) for row in rows]


def _last_turn(prepared: Prepared, prompt: str, ids: list[int]) -> str:
    """The prompt of a row as people know it; of a conversation what stands in its chat template."""
    return prompt if prepared.data.format != "chat" else prepared.base.tokenizer.decode(ids)


def _how(prepared: Prepared) -> Prompting:
    rows = prepared.recipe.data
    return Prompting(prepared.data.format, rows.prompt_template, rows.system == "fold")


def _trained(prepared: Prepared) -> Trained:
    return Trained(prepared.base, prepared.model, prepared.task)


class Sampler(TrainerCallback):
    """Asks at every step at which the validation loss is measured, or would be, and at the end; the main process writes."""

    def __init__(self, run: Run, prepared: Prepared, progress: Progress, samples: Sequence[Asked]) -> None:
        self.run, self.prepared, self.progress = run, prepared, progress
        self.asked, self.form = samples, prepared.data.format
        self.every = arguments.eval_interval(prepared.recipe.train, run.steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._ask(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.best_model_checkpoint is None:  # which was asked when it was measured
            self._ask(state)

    def _ask(self, state: TrainerState) -> None:
        step, main = state.global_step, state.is_world_process_zero
        if any(row["step"] == step for row in self.run.samples()):
            return  # before a kill
        trained = _trained(self.prepared)
        tokenizer, most = self.prepared.base.tokenizer, self.prepared.recipe.train.sample_tokens
        self.progress(Tick("samples", 0, len(self.asked)))
        with _stopping(trained, self.form), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            answers = complete(trained.model, tokenizer, [each.ids for each in self.asked], most)
            ends = stop_tokens(trained.model, tokenizer)
        if not main:
            return
        self.run.check_there()
        for each, answer in zip(self.asked, answers, strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            row = {
                "step": step,
                "prompt": each.prompt,
                "given": tokenizer.decode(each.ids),
                "text": text,
                "finished": bool(answer) and answer[-1] in ends,
                **({} if each.reference is None else {"reference": each.reference}),
            }
            append_json(self.run.folder / SAMPLES, row)
            log.info("step %d: %s → %s", step, _line(each.prompt), _line(text) or "(nothing)")


def _line(text: str) -> str:
    return shortened(visible(" ".join(text.split())), 160)


@contextmanager
def _stopping(trained: Trained, form: str) -> Iterator[None]:
    """Answers end where turns do, as those of a finished run; the model's own settings come back."""
    settings: Any = getattr(trained.model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    stop_at_turns(trained, form)
    try:
        yield
    finally:
        if settings is not None:
            settings.eos_token_id = own
