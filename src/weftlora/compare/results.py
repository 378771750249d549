"""What run folders say, as a `Comparison`: those of a comparison, or any that were trained on the same model and rows."""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weftlora.compare.plan import Plan
from weftlora.compare.record import METRICS, Comparison, Method, Outcome, Rate, Status
from weftlora.compare.statistics import rows
from weftlora.compare.workers import PROBLEM, SCORES, status
from weftlora.disk.files import read_json
from weftlora.errors import ConfigError, RunError
from weftlora.runs.run import Run


def read(folder: Path) -> Comparison:
    """The comparison in a folder, as far as it has come.

    Raises:
        RunError: no compare.json, a damaged file, or runs of other rows than the rest.
    """
    plan = Plan.load(folder)
    methods = [with_rate(plan, method, folder) for method in plan.methods]
    outcomes = [_outcome(plan, method, seed, folder) for method in methods for seed in plan.reported_seeds(method)]
    _check_same_rows([folder / outcome.folder for outcome in outcomes])
    return Comparison(
        folder=str(folder),
        model=plan.recipe["model"]["path"],
        data=plan.recipe["data"]["train"],
        task=plan.task,
        metric=plan.metric,
        higher_is_better=plan.higher_is_better,
        baseline=plan.baseline,
        seeds=plan.seeds,
        budget=plan.budget_sentence,
        methods=methods,
        outcomes=outcomes,
        rows=rows(methods, outcomes, plan.metric, plan.higher_is_better, plan.baseline),
        versions=plan.versions,
        machine=_machine(plan),
        complete=all(outcome.status != "missing" for outcome in outcomes),
    )


def with_rate(plan: Plan, method: Method, folder: Path) -> Method:
    """The method with the rates that were tried for it, and the one of the lowest mean validation loss once all have ended.

    A rate that diverged with any seed is out. Of equals the lower one is taken. While a run has failed, nothing is chosen: it is
    tried again, and another choice then would be another method.
    """
    jobs = plan.tuning(method)
    if not jobs:
        return method if method.frozen or method.lr is not None else replace(method, lr=plan.rates[0])
    ended = [job for job in jobs if status(folder / job.folder, tuning=True) != "missing"]
    tried = [Rate(job.lr, job.seed, _validation_loss(folder / job.folder)) for job in ended]
    method = replace(method, rates=tried)
    if len(ended) < len(jobs) or _failed(plan, method, folder):
        return method
    mean = {lr: _mean([rate.validation_loss for rate in tried if rate.lr == lr]) for lr in plan.rates}
    finite = {lr: loss for lr, loss in mean.items() if loss is not None}
    if not finite:
        return method
    lr = min(finite, key=lambda rate: (finite[rate], rate))
    return replace(method, lr=lr, rate_at_edge=lr in (plan.rates[0], plan.rates[-1]))


def _failed(plan: Plan, method: Method, folder: Path) -> str:
    """The place and the problem of a run that was to try a rate and failed; empty if none has."""
    for job in plan.tuning(method):
        if status(folder / job.folder, tuning=True) == "failed":
            return f"{job.folder}: {_problem(folder / job.folder, 'failed')}"
    return ""


def _mean(losses: list[float | None]) -> float | None:
    found = [loss for loss in losses if loss is not None]
    return statistics.fmean(found) if len(found) == len(losses) else None


def _validation_loss(folder: Path) -> float | None:
    if status(folder, tuning=True) != "complete":
        return None
    metrics = Run.load(folder).metrics
    if "validation_loss" not in metrics:
        raise RunError(
            f"{folder} is complete and its run.json has no validation loss, so it was changed: delete the folder."
        )
    return metrics["validation_loss"]


def _outcome(plan: Plan, method: Method, seed: int, top: Path) -> Outcome:
    place = plan.folder(method.name, seed)
    folder, frozen = top / place, method.frozen
    if not frozen and method.lr is None and len(method.rates) == len(plan.tuning(method)):
        if failed := _failed(plan, method, top):
            return Outcome(method.name, seed, place, "failed", problem=f"its rate could not be chosen: {failed}")
        why = "none of the rates that were tried gave a finite validation loss: try lower ones."
        return Outcome(method.name, seed, place, "diverged", problem=why)
    found = status(folder, tuning=False, frozen=frozen)
    if found != "complete":
        return Outcome(method.name, seed, place, found, problem=_problem(folder, found))
    return _measured(method.name, seed, place, folder, frozen)


def _problem(folder: Path, found: Status) -> str:
    if found == "missing":
        return "it has not ended."
    return str(read_json(folder / PROBLEM).get("problem", "it does not say why."))


def _measured(method: str, seed: int, place: str, folder: Path, frozen: bool = False, scores: str = SCORES) -> Outcome:
    found, domains = _evaluation(folder / scores) if (folder / scores).is_file() else ({}, {})
    outcome = Outcome(method, seed, place, "complete", scores=found, domains=domains)
    if not all(map(math.isfinite, found.values())):
        return replace(outcome, status="diverged", scores={}, problem="its scores on the test rows are not numbers.")
    if frozen:
        return outcome
    run = Run.load(folder)
    return replace(outcome, figures=run.figures, curve=_curve(run))


def _evaluation(file: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The scores of all rows and of each domain. Raises RunError where the file is damaged."""
    content = read_json(file)
    try:
        return _scores(content["scores"]), {name: _scores(part) for name, part in content["domains"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RunError(f"{file} is damaged: delete it, and the run is measured again.") from None


def _scores(found: dict[str, Any]) -> dict[str, float]:
    return {name: float(found[name]) for name in METRICS if found.get(name) is not None}


def _curve(run: Run) -> list[dict[str, float]]:
    kept = ("step", "loss", "validation_loss")
    points = [{key: row[key] for key in kept if key in row} for row in run.history()]
    points = [point for point in points if len(point) > 1]
    last = run.metrics.get("validation_loss")
    if last is not None and not any("validation_loss" in point and point["step"] == run.steps for point in points):
        points.append({"step": run.steps, "validation_loss": last})
    return points


def _check_same_rows(folders: Sequence[Path]) -> None:
    """Refuse runs of other rows or another base than the first. Raises RunError."""
    first: Run | None = None
    for folder in folders:
        if not (folder / "run.json").is_file():
            continue
        run = Run.load(folder).whole()
        first = first or run
        for what, same in (
            ("rows", [*run.data["hashes"].values()] == [*first.data["hashes"].values()]),
            ("base weights", (run.base["shapes"], run.base["values"]) == (first.base["shapes"], first.base["values"])),
        ):
            if not same:
                raise RunError(
                    f"{run.folder} was trained on other {what} than {first.folder}: they cannot be compared."
                )


def _machine(plan: Plan) -> str:
    threads, jobs = plan.recipe["train"]["num_threads"], plan.jobs or [1]
    at_once = f"{min(jobs)}" if len(jobs) == 1 else f"{min(jobs)} to {max(jobs)}"
    return f"{plan.device}, {threads} thread{'s' * (threads > 1)} a run, {at_once} run{'s' * (max(jobs) > 1)} at once"


# ---------------------------------------------------------------------- run folders that no comparison made


def gather(folders: Sequence[Path]) -> Comparison:
    """Plain run folders as a comparison: runs that differ in seed and folder only are one method.

    Raises:
        RunError: a folder without a complete run, or runs of different rows, bases or tasks.
        ConfigError: two runs of one method and seed.
    """
    runs = [Run.load(folder) for folder in folders]
    _check_same_rows(folders)
    top = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    split = _split(folders)
    methods, outcomes = _grouped(runs, top, split)
    first = runs[0]
    metric = "accuracy" if first.task == "classification" else "loss"
    higher = METRICS[metric].higher
    baseline = next((m.name for m in methods if m.adapter.get("recipe") == "lora"), methods[0].name)
    return Comparison(
        folder=str(top),
        model=first.recipe["model"]["path"],
        data=first.recipe["data"]["train"],
        task=first.task,
        metric=metric,
        higher_is_better=higher,
        baseline=baseline,
        seeds=sorted({run.seed for run in runs}),
        budget="Nothing was made equal: these runs are shown as they are.",
        methods=methods,
        outcomes=outcomes,
        rows=rows(methods, outcomes, metric, higher, baseline),
        versions=first.versions,
        machine=f"{first.device}, {first.threads} thread{'s' * (first.threads > 1)} a run",
        complete=all(outcome.status != "missing" for outcome in outcomes),
        split=split,
    )


def _split(folders: Sequence[Path]) -> str:
    """The rows that runs were measured on: test rows, or validation rows where none was measured on test rows."""
    tested = any((folder / SCORES).is_file() for folder in folders)
    return "validation" if not tested and any((folder / VALIDATED).is_file() for folder in folders) else "test"


VALIDATED = "eval-validation.json"
"""What `weftlora eval` writes where a run has no test rows."""


def _grouped(runs: Sequence[Run], top: Path, split: str) -> tuple[list[Method], list[Outcome]]:
    """The methods that runs are of, and what came out of each. Raises ConfigError for two runs of one method and seed."""
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        group = groups.setdefault(_key(run), {})
        if run.seed in group:
            raise ConfigError(f"{group[run.seed].folder} and {run.folder} are the same run: give one of them.")
        group[run.seed] = run
    firsts = [next(iter(group.values())) for group in groups.values()]
    named = list(zip(_names(firsts), groups.values(), strict=True))
    methods = [_plain_method(name, first) for (name, _), first in zip(named, firsts, strict=True)]
    return methods, [_plain_outcome(name, run, top, split) for name, group in named for run in group.values()]


def _key(run: Run) -> str:
    """What runs of one method share: their recipe without seeds and folder."""
    recipe = {key: value for key, value in run.recipe.items() if key != "out"}
    recipe["train"] = {key: value for key, value in recipe["train"].items() if key != "seed"}
    recipe["adapter"] = {key: value for key, value in recipe["adapter"].items() if key != "seed"}
    if run.extends:
        recipe["extends"] = run.extends["step"]  # not the run that so many steps would have been
    return json.dumps(recipe, sort_keys=True)


def _names(runs: Sequence[Run]) -> list[str]:
    """A name for each method: its recipe, with its rank and rate where those tell it from others."""
    adapters = [run.recipe["adapter"] for run in runs]
    plain = [str(a.get("recipe") or " + ".join(k for k in a if isinstance(a[k], (dict, str)))) for a in adapters]
    fuller = [
        f"{name}, r = {adapter.get('r', 8)}, lr = {run.recipe['train']['lr']:g}"
        for name, adapter, run in zip(plain, adapters, runs, strict=True)
    ]
    names: list[str] = []
    for name, full in zip(plain, fuller, strict=True):
        chosen = name if plain.count(name) == 1 else full
        same = sum(other == chosen or other.startswith(f"{chosen} (") for other in names)
        names.append(f"{chosen} ({same + 1})" if same else chosen)
    return names


def _plain_method(name: str, run: Run) -> Method:
    adapter, trained = run.adapter, run.figures.get("trained", run.parameters["trainable"])
    return Method(
        name,
        run.recipe["adapter"],
        rank=adapter.get("target_r") or adapter.get("r"),
        alpha=adapter.get("lora_alpha"),
        parameters=int(trained) if math.isfinite(trained) else None,
        steps=run.steps,
        lr=run.recipe["train"]["lr"],
    )


def quoted(folder: Path) -> str:
    """A folder as a shell takes it."""
    return shlex.quote(str(folder))


def _plain_outcome(method: str, run: Run, top: Path, split: str) -> Outcome:
    place = Path(os.path.relpath(run.folder.resolve(), top)).as_posix()
    if run.status != "complete":
        problem = f"the run is {run.status}: weftlora train {quoted(run.folder)} --resume"
        return Outcome(method, run.seed, place, "missing", problem=problem)
    outcome = _measured(method, run.seed, place, run.folder, scores=SCORES if split == "test" else VALIDATED)
    if outcome.scores:
        return outcome
    same = "" if split == "test" else f" --split {split}"
    return replace(outcome, status="missing", problem=f"it was not measured: weftlora eval {quoted(run.folder)}{same}")
