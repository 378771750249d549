"""All runs, one row each, and the exact recipe and commands of every method."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from weftlora.compare.record import Comparison, Outcome
from weftlora.report.comparison.evidence import Evidence
from weftlora.report.comparison.parts import Cell, Column, of_method
from weftlora.report.comparison.results import other_metrics
from weftlora.report.comparison.spread import score
from weftlora.report.comparison.wording import figures, is_frozen, listed, metric, rate
from weftlora.train.run import differences


@dataclass(frozen=True)
class RunLine:
    """A run."""

    id: str
    status: str
    cells: list[Cell]
    problem: str


@dataclass(frozen=True)
class RunGroup:
    """The runs of a method."""

    id: str
    name: str
    recipe: str
    """The id of its recipe."""
    lines: list[RunLine]


@dataclass(frozen=True)
class Recipe:
    """How the runs of a method are made again."""

    id: str
    name: str
    runs: str
    """The id of its runs."""
    about: str
    commands: str
    file: str
    content: str
    """Of the recipe file; empty where no run has kept one."""


def columns(found: Comparison) -> list[Column]:
    """Of the table of runs."""
    scores = [Column(metric(name).title) for name in (found.metric, *other_metrics(found))]
    return [
        Column("seed"), Column("status", number=False), *scores, Column("learning rate"), Column("training, s"),
        Column("folder", number=False),
    ]  # fmt: skip


def groups(found: Comparison) -> list[RunGroup]:
    """The runs of every method, in the order of the comparison."""
    made = []
    for method in found.methods:
        runs = of_method(found, method.name, "runs")
        lines = [
            RunLine(f"{runs}-{outcome.seed}", outcome.status, list(_cells(found, outcome)), outcome.problem)
            for outcome in found.of(method.name)
        ]
        made.append(RunGroup(runs, method.name, of_method(found, method.name, "recipe"), lines))
    return made


def _cells(found: Comparison, outcome: Outcome) -> Iterator[Cell]:
    yield Cell(str(outcome.seed))
    yield Cell(outcome.status, mark=outcome.status)
    for name in (found.metric, *other_metrics(found)):
        value = score(outcome, name)
        yield Cell("–" if value is None else metric(name).text(value))
    lr = found.method(outcome.method).lr
    yield Cell("–" if lr is None else rate(lr))
    seconds = figures([outcome], "train_seconds")
    yield Cell(f"{seconds[0]:,.1f}" if seconds else "–")
    yield Cell(outcome.folder)


def recipes(evidence: Evidence) -> list[Recipe]:
    """The recipe of every method: that of its first run as a file, those of the others as what they change in it."""
    return [_recipe(evidence, method.name) for method in evidence.found.methods]


def _recipe(evidence: Evidence, name: str) -> Recipe:
    found = evidence.found
    ids = of_method(found, name, "recipe"), name, of_method(found, name, "runs")
    if is_frozen(found, name):
        command = shlex.join(["weftlora", "eval", _file(found.baseline), "--adapter", "none"])
        return Recipe(*ids, f"The model as it is, measured on the rows of {found.baseline}'s recipe.", command, "", "")
    runs = [evidence.runs[o.folder] for o in found.of(name) if o.folder in evidence.runs]
    if not runs:
        return Recipe(*ids, "No run of it has left a recipe.", "", "", "")
    first, file = runs[0], _file(name)
    commands = "\n".join(_command(file, differences(first.recipe, run.recipe, "")) for run in runs)
    about = f"Relative paths in it count from {first.base_dir}.{_rates(found, name)}"
    return Recipe(*ids, about, commands, file, yaml.safe_dump(first.recipe, sort_keys=False, allow_unicode=True))


def _file(name: str) -> str:
    """What the recipe of a method is saved as."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower() or 'method'}.yaml"


def _rates(found: Comparison, name: str) -> str:
    """How its learning rate was chosen."""
    tried = [
        f"{rate(each.lr)} diverged"
        if each.validation_loss is None
        else f"{rate(each.lr)} gave {each.validation_loss:.4f}"
        for each in found.method(name).rates
    ]
    return (
        f" Its learning rate was chosen by validation loss, with seeds that are not reported: {listed(tried)}."
        if tried
        else ""
    )


def _command(file: str, changed: Iterable[tuple[str, tuple[Any, Any]]]) -> str:
    """Training from a recipe file with what a run has other than it."""
    return shlex.join(["weftlora", "train", file, *(f"{key}={_value(after)}" for key, (_, after) in changed)])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
