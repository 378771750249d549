"""The two searches, by Optuna: plain LoRA's rate with a Gaussian process, then methods and their rates by successive halving.

Optuna asks and is told; nothing is kept in its memory between two starts. What a run came to is in its folder, so whoever goes on
tells the same losses in the same order, and since every proposal is drawn with a seed of its own number, is asked the same again.
The journal beside the runs (`journal.log`, for optuna-dashboard and the like) is written again each time.

Runs of one rung do not depend on each other and may be side by side; whether a trial goes on is asked in the order of trials,
whichever ended first. Successive halving is Optuna's: asynchronous, so a trial is measured by those before it, and the first,
which is plain LoRA at its tuned rate, always goes on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import GPSampler, RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from weftlora.auto.plan import ETA, AutoPlan, rungs
from weftlora.auto.record import Tried
from weftlora.compare.plan import TUNING_SEED, Job, Plan
from weftlora.disk.files import writing

JOURNAL = "journal.log"
SPREAD = 16.0
"""Rates are searched up to this factor below and above the one where the search begins."""
FIRST = (1.0, 0.25, 4.0)
"""Over the rate where the search begins: the first three that are tried."""
AROUND = (1.0, 2.0, 0.5)
"""Over a method's own start: the rates that every method is tried at, the first of them first for all."""

Losses = Mapping[str, float | None]
"""The validation loss of runs by their folder; None where one diverged or failed."""
CarryOut = Callable[[list[Job]], Losses]
Problem = Callable[[str], str]


def figures(lr: float) -> float:
    """A rate to two figures: more is not known of it, and equal ones are one run."""
    return float(f"{lr:.2g}")


@contextlib.contextmanager
def journal(folder: Path) -> Iterator[JournalStorage]:
    """A new journal in the folder of a search, which nobody else writes. Raises RunError."""
    path = folder / JOURNAL
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with writing(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Optuna calls experimental: the versions in use are pinned
            for name in (path, path.with_name(f"{JOURNAL}.lock")):  # a kill leaves Optuna's lock
                name.unlink(missing_ok=True)
            yield JournalStorage(JournalFileBackend(str(path)))
    finally:
        optuna.logging.set_verbosity(verbosity)


class Search:
    """The two studies of a plan, over runs of the comparison `runs`."""

    def __init__(
        self, plan: AutoPlan, runs: Plan, carry_out: CarryOut, problem: Problem, storage: JournalStorage
    ) -> None:
        self.plan, self.runs, self.carry_out, self.problem, self.storage = plan, runs, carry_out, problem, storage

    def job(self, method: str, lr: float, steps: int) -> Job:
        """A run of the search: all have one seed, which no reported run has."""
        slug = self.runs.slugs[method]
        return self.runs.trial(
            self.runs.of(method), TUNING_SEED, lr, steps, f"search/{slug}/n{steps}-lr{lr:g}-s{TUNING_SEED}"
        )

    def rates(self, method: str) -> list[Tried]:
        """Full runs of plain LoRA at so many rates as the size says, in the order in which they were proposed."""
        study = optuna.create_study(storage=self.storage, study_name="rates", direction="minimize")
        count, steps = self.plan.size.rates, self.plan.steps
        for factor in FIRST[:count]:
            study.enqueue_trial({"lr": self.plan.lr * factor})
        tried: list[Tried] = []
        while len(tried) < count:
            asked = []
            for number in range(len(tried), len(FIRST) if not tried and count >= len(FIRST) else len(tried) + 1):
                study.sampler = GPSampler(
                    seed=number, n_startup_trials=len(FIRST), independent_sampler=RandomSampler(number)
                )
                asked.append(study.ask())
            low, high = self.plan.lr / SPREAD, self.plan.lr * SPREAD
            jobs = [self.job(method, figures(trial.suggest_float("lr", low, high, log=True)), steps) for trial in asked]
            losses = self.carry_out(jobs)
            for trial, job in zip(asked, jobs, strict=True):
                found = self._tried("rates", job, {steps: losses[job.folder]})
                tried.append(found)
                self._tell(study, trial, found, losses[job.folder])
        return tried

    def methods(self, lr: float) -> list[Tried]:
        """Every method at its rates around plain LoRA's `lr`, as far as successive halving lets each go."""
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=ETA)
        study = optuna.create_study(
            storage=self.storage, study_name="methods", direction="minimize", sampler=RandomSampler(0), pruner=pruner
        )
        names = list(self.plan.methods)[: self.plan.size.methods]
        factors = AROUND[: self.plan.size.tries]
        for factor in factors:
            for name in names:
                study.enqueue_trial({"method": name, "factor": factor})
        trials = [study.ask() for _ in range(len(names) * len(factors))]
        chosen = []
        for trial in trials:
            name = trial.suggest_categorical("method", names)
            factor = trial.suggest_categorical("factor", list(factors))
            chosen.append((name, figures(lr * self.plan.starts[name] * factor)))
        losses: list[dict[int, float | None]] = [{} for _ in trials]
        alive, done = list(range(len(trials))), dict[int, Tried]()
        lengths = rungs(self.plan.steps)
        for rung, steps in enumerate(lengths):
            jobs = {number: self.job(*chosen[number], steps) for number in alive}
            found = self.carry_out(list(jobs.values()))
            going = []
            for number in alive:
                loss = losses[number][steps] = found[jobs[number].folder]
                if loss is not None and rung < len(lengths) - 1:
                    trials[number].report(loss, ETA**rung)
                    if not trials[number].should_prune():
                        going.append(number)
                        continue
                    study.tell(trials[number], state=TrialState.PRUNED)
                    done[number] = self._tried("methods", jobs[number], losses[number], "stopped")
                else:
                    done[number] = self._tried("methods", jobs[number], losses[number])
                    self._tell(study, trials[number], done[number], loss)
            alive = going
        return [done[number] for number in sorted(done)]

    def _tell(self, study: optuna.Study, trial: optuna.Trial, found: Tried, loss: float | None) -> None:
        if found.problem:
            trial.set_user_attr("problem", found.problem)
        if loss is None:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, loss)

    def _tried(self, stage: Any, job: Job, losses: Mapping[int, float | None], state: Any = "complete") -> Tried:
        failed = None in losses.values()
        return Tried(
            stage,
            job.method,
            job.lr,
            {str(steps): loss for steps, loss in losses.items()},
            "failed" if failed else state,
            self.problem(job.folder) if failed else "",
        )


def best(tried: list[Tried], steps: int) -> Tried | None:
    """The one of the lowest loss at this length, the first of equals; None where none has one."""
    known = [(loss, number) for number, each in enumerate(tried) if (loss := each.losses.get(str(steps))) is not None]
    return tried[min(known)[1]] if known else None


def ranking(tried: list[Tried], steps: int) -> list[Tried]:
    """The best of every method, lowest loss first: of those that were trained to the full length, then of the others."""
    order: list[tuple[tuple[int, float], Tried]] = []
    for length in reversed(rungs(steps)):
        for each in sorted({each.method for each in tried}):
            found = best([t for t in tried if t.method == each], length)
            loss = None if found is None else found.losses[str(length)]
            if found is not None and loss is not None and each not in {t.method for _, t in order}:
                order.append(((-length, loss), found))
    return [each for _, each in sorted(order, key=lambda pair: pair[0])]
