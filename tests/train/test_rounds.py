"""Rounds of moving ranks in a Trainer of the user's own: when they happen, and with which ranks a run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from allocating import HELD_OUT, bare, events, ranks, scorer
from dashing import sites
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

import weftlora
from weftlora.host.attach import schedules


def trainer(
    folder: Path, model: Any, kind: type[Trainer] = Trainer, rows: int = 24, more: Any = (), **fields: Any
) -> Any:
    given = {"per_device_train_batch_size": 2, "learning_rate": 2e-2, "save_strategy": "no", **fields}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    callbacks = [weftlora.Callback(validation=HELD_OUT), *more]
    args = TrainingArguments(str(folder), **given, **quiet)
    return kind(model, args, train_dataset=HELD_OUT[:rows], eval_dataset=HELD_OUT, callbacks=callbacks)


@pytest.mark.parametrize(
    ("rows", "accumulation", "expected", "batches"),
    [
        (13, 2, [4, 5, 6], [7, 9, 11]),  # 7 batches an epoch in windows of 2, 2, 2, 1: 4 steps
        (13, 4, [2, 3, 4], [7, 11, 14]),  # windows of 4 and 3: 2 steps, so quarters of an epoch are closer than steps
        (2, 1, [1, 2, 3], [1, 2, 3]),  # an epoch of one step
    ],
    ids=["4 steps", "2 steps", "1 step"],
)
def test_rounds_of_epochs_lie_between_windows_of_accumulation(
    rows: int, accumulation: int, expected: list[int], batches: list[int], tmp_path: Path
) -> None:
    """Steps, and training batches seen by then, after 1, 1¼ and 1½ epochs; in short epochs one step apart."""
    model = bare(first=weftlora.epochs(1), every=weftlora.epochs(0.25), max_rounds=3)
    seen, told = 0, list[tuple[int, int]]()

    def count(*_: Any) -> None:
        nonlocal seen
        seen += next(iter(sites(model).values())).training

    next(iter(sites(model).values())).register_forward_hook(count)
    mine = trainer(tmp_path, model, rows=rows, gradient_accumulation_steps=accumulation, num_train_epochs=5)
    mine.add_callback(weftlora.Callback(on_event=lambda event: told.append((event["step"], seen))))
    mine.train()
    assert told == list(zip(expected, batches, strict=True))


@pytest.mark.parametrize("best", [2, 3])
def test_stopped_early_between_rounds_it_has_the_ranks_of_its_best_checkpoint(best: int, tmp_path: Path) -> None:
    """Two rounds after steps 3 and 5; evaluations without progress end the run after step 4."""

    class Rigged(Trainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_loss": float(abs(self.state.global_step - best))}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    model, told = bare(), list[Any]()
    weftlora.attach(model, on_event=told.append)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    ends = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "max_steps": 9}
    mine = trainer(tmp_path, model, Rigged, more=[EarlyStoppingCallback(2 if best == 2 else 1)], **evaluated, **ends)
    with pytest.warns(UserWarning, match="is still without moving ranks"):
        mine.train()
    assert mine.state.global_step == 4
    [first] = told
    [schedule] = schedules(model).values()
    assert schedule.steps == best
    assert ranks(model) == (first["ranks"] if best == 3 else dict.fromkeys(ranks(model), 2))
    assert events(model) == ([first] if best == 3 else [])


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing_rounds_are_those_without(reentrant: bool, tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        model = bare(score="taylor", max_rounds=1)
        mine = trainer(
            tmp_path,
            model,
            max_steps=4,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        mine.train()
        [event] = events(model)
        ends.append((event["pruned"], event["added"]))
        assert scorer(model).model.training
    for one, other in zip(*(pruned for pruned, _ in ends), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2], abs=1e-6)
    assert ends[0][1] == ends[1][1]


def test_in_bf16_autocast_scores_are_finite_and_rounds_happen(tmp_path: Path) -> None:
    model = bare(max_rounds=2)
    trainer(tmp_path, model, max_steps=6, bf16=True).train()
    assert [event["step"] for event in events(model)] == [3, 5]
    assert sum(ranks(model).values()) == 28
    assert all(torch.isfinite(site.score).all() for site in sites(model).values())
