"""Going on with a run that has ended, for more steps than it was to have: a new run, which names the one that it extends.

    checkpoint   the run's last one, copied, with its optimiser, its random state and what it has logged
    schedule     begins again at that step: the run's own, warm-up included, from the full rate over the added steps alone
    fractions    of the run (`train.warmup`, and times of a method that are still to come) are of the added steps; what has happened
                 stays

It is not the run that would have been, had it been given so many steps from the start: that one's rate would have fallen more slowly.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from weftlora.disk.files import read_lines, write_lines, writing
from weftlora.errors import ConfigError, RunError
from weftlora.runs.recipe import TrainConfig
from weftlora.runs.run import Run
from weftlora.settings import is_number
from weftlora.train import checkpoint

SEARCH = ("selection.json", "search.jsonl", "search/state.pt")
"""What a search of layers has left, which a run that goes on does not repeat."""


def point(before: Run, steps: int) -> Path:
    """The checkpoint to go on from.

    Raises:
        ConfigError: no step would be added.
        RunError: there is none, or the run cannot go on.
    """
    if before.adapter["peft_type"] == "ADALORA":
        raise RunError(
            f"{before.folder} trains peft's AdaLoRA, whose checkpoints lack the importance averages it needs to continue: it "
            "cannot be extended; set train.from to the run instead."
        )
    last = checkpoint.newest(before.checkpoints)
    if last is None:
        raise RunError(
            f"{before.folder} has no checkpoint to extend (train.save_every): set train.from to the run instead, which begins with "
            "its adapter and a new optimiser."
        )
    if steps <= (done := checkpoint.step_of(last)):
        raise ConfigError(f"{before.folder} has {done} steps already: give train.steps more than that.")
    return last


def described(before: Run, last: Path) -> dict[str, Any]:
    """What the record of the new run says of where it comes from."""
    return {"run": str(before.folder.resolve()), "step": checkpoint.step_of(last)}


def take_over(before: Run, run: Run, last: Path) -> None:
    """Put the checkpoint, and what was logged and happened up to it, into the new run's folder. Raises RunError."""
    step = checkpoint.step_of(last)
    with writing(run.folder):
        shutil.copytree(last, run.checkpoints / last.name)
        for name in SEARCH:
            if (before.folder / name).is_file():
                (run.folder / name).parent.mkdir(exist_ok=True)
                shutil.copy2(before.folder / name, run.folder / name)
    run.keep_until(step, before)
    happened = read_lines(before.folder / "events.jsonl")
    kept = [row for row in happened if not is_number(row.get("step")) or row["step"] <= step]
    begun = read_lines(run.folder / "events.jsonl")
    write_lines(run.folder / "events.jsonl", [*(row for row in kept if row.get("event") != "end"), *begun])


def check_schedule(train: TrainConfig) -> None:
    """Refuse a schedule that cannot begin again. Raises ConfigError."""
    if train.schedule in ("reduce_lr_on_plateau", "greedy"):
        raise ConfigError(
            f"train.schedule={train.schedule} follows losses and cannot begin again in an extended run: use another."
        )


def sentence(extends: Mapping[str, Any], train: TrainConfig, steps: int) -> str:
    """What the new run does, for its record and for whoever listens."""
    return (
        f"extends {extends['run']} from step {extends['step']} to {steps} with its optimiser; the {train.schedule} schedule begins "
        f"again at {train.lr:g} over the {steps - extends['step']} added steps, so this is not the run that train.steps={steps} would "
        "have been"
    )


class Extended:
    """Mixed into a trainer: the schedule of the rate is that of the added steps."""

    extends_at: int

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of a run of the added steps, so many steps later."""
        trainer: Any = self
        if trainer.lr_scheduler is None:
            added, args = num_training_steps - self.extends_at, trainer.args
            made = get_scheduler(
                args.lr_scheduler_type,
                optimizer=optimizer or trainer.optimizer,
                num_warmup_steps=args.get_warmup_steps(added),
                num_training_steps=added,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )
            if not isinstance(made, LambdaLR):
                raise ConfigError(
                    f"train.schedule={args.lr_scheduler_type} cannot begin again in an extended run: use linear."
                )
            made.lr_lambdas = [self._later(factor) for factor in made.lr_lambdas]
            trainer.lr_scheduler = made
            trainer._created_lr_scheduler = True
        return trainer.lr_scheduler

    def _later(self, factor: Any) -> Any:
        return lambda step: factor(max(step - self.extends_at, 0))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """The state of the optimiser and of the schedule; the rate of the next step is the new schedule's."""
        parent: Any = super()
        parent._load_optimizer_and_scheduler(checkpoint)
        trainer: Any = self
        schedule = trainer.lr_scheduler
        if checkpoint is None or schedule.last_epoch != self.extends_at:
            return
        rates = [base * f(schedule.last_epoch) for base, f in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
