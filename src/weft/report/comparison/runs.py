"""All runs, one row each, and the exact recipe and commands of every method."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from weft.compare.record import Comparison, Outcome
from weft.report.comparison.evidence import Evidence
from weft.report.comparison.parts import Cell, Column, of_method
from weft.report.comparison.results import other_metrics
from weft.report.comparison.spread import score
from weft.report.comparison.wording import figures, is_frozen, metric, rate


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
    runs = [evidence.runs[o.folder] for o in found.of(name) if o.folder in evidence.runs]
    ids = of_method(found, name, "recipe"), name, of_method(found, name, "runs")
    if not runs:
        return Recipe(*ids, "No run of it has left a recipe.", "", "", "")
    file = f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower() or 'method'}.yaml"
    first = runs[0].recipe
    if is_frozen(found, name):
        commands = [f"weft eval {file} --adapter none"]
    else:
        commands = [_command(file, changes(first, run.recipe)) for run in runs]
    about = f"Relative paths in it count from {runs[0].base_dir}."
    return Recipe(*ids, about, "\n".join(commands), file, yaml.safe_dump(first, sort_keys=False, allow_unicode=True))


def _command(file: str, changed: Mapping[str, Any]) -> str:
    return shlex.join(["weft", "train", file, *(f"{key}={_value(value)}" for key, value in changed.items())])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def changes(first: Mapping[str, Any], other: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """What must be set over one recipe to have the other, by dotted key.

    >>> changes({"train": {"seed": 0, "lr": 1}, "out": "a"}, {"train": {"seed": 1, "lr": 1}, "out": "b"})
    {'train.seed': 1, 'out': 'b'}
    """
    found: dict[str, Any] = {}
    for key in dict.fromkeys([*first, *other]):
        before, after = first.get(key), other.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= changes(before, after, f"{under}{key}.")
        elif before != after:
            found[f"{under}{key}"] = after
    return found
