"""The runs on the page of a comparison: what their folders hold beyond its record, a row for each, and every method's exact recipe."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from weftlora.compare.record import Comparison, Outcome
from weftlora.errors import AdapterError, RunError
from weftlora.foreign_text import shortened
from weftlora.inspection.inspecting import inspect
from weftlora.inspection.record import Inspection
from weftlora.report.comparison.elements import (
    Cell,
    Column,
    Line,
    Part,
    Sheet,
    figures,
    is_frozen,
    kind_of,
    listed,
    metric,
    of_method,
    rate,
    score,
)
from weftlora.report.comparison.results import other_metrics
from weftlora.runs.run import Run, differences


@dataclass(frozen=True)
class Evidence:
    """A comparison with its run folders."""

    found: Comparison
    runs: dict[str, Run] = field(default_factory=dict)
    """By the folder of the outcome; a run that never started has none."""
    looks: dict[str, list[Inspection]] = field(default_factory=dict)
    """What is inside the adapters of each method's complete runs, by seed."""
    routers: dict[str, Inspection] = field(default_factory=dict)
    """The first run of each method with heads, its routers measured; empty unless that was asked for."""
    left_out: list[str] = field(default_factory=list)
    """What could not be looked into and why, a sentence each."""


def gather(found: Comparison, routers: bool = False) -> Evidence:
    """Read the run folders of a comparison.

    Args:
        routers: also measure the routers of one run per method that has heads, over the run's validation rows. This loads the
            base; all else is read from the folders alone.
    """
    evidence = Evidence(found)
    for method in found.methods:
        for outcome in found.of(method.name):
            try:
                run = Run.load(Path(found.folder) / outcome.folder)
            except RunError:  # it never started, or was killed before its first record: its outcome says so
                continue
            evidence.runs[outcome.folder] = run
            if outcome.status == "complete" and (run.adapter_folder / "adapter_config.json").is_file():
                _look(evidence, method.name, run)
                if routers and method.name not in evidence.routers:
                    _route(evidence, method.name, run)
    return evidence


def _look(evidence: Evidence, name: str, run: Run) -> None:
    """Look into the adapter of a run; one that cannot be looked into is named once per method."""
    try:
        found = inspect(run.folder, base=False, spectra=0)
    except AdapterError as error:
        if not any(sentence.startswith(f"Inside {name}: ") for sentence in evidence.left_out):
            evidence.left_out.append(f"Inside {name}: {error}")
    else:
        evidence.looks.setdefault(name, []).append(found)


def _route(evidence: Evidence, name: str, run: Run) -> None:
    """Measure the routers of a run that has heads."""
    if any(look.heads for look in evidence.looks.get(name, [])):
        found = inspect(run.folder, spectra=0)
        evidence.routers[name] = found
        if found.routers is None:
            evidence.left_out.extend(found.left_out)


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


LONGEST = 600
"""Characters of a prompt or an answer that the page shows; the run's folder has all."""


def samples(evidence: Evidence) -> Iterator[Part]:
    """What each method's first run that was asked (`train.samples`) has answered, at first and at last."""
    found, lines = evidence.found, list[Line]()
    kinds = {row.name: kind_of(found, row) for row in found.rows}
    for method in found.methods:
        asked = (evidence.runs[o.folder] for o in found.of(method.name) if o.folder in evidence.runs)
        run, rows = next(((run, rows) for run in asked if (rows := run.samples())), (None, []))
        steps = sorted({row["step"] for row in rows})
        for row in rows:
            if run is not None and row["step"] in (steps[0], steps[-1]):
                texts = (shortened(str(row.get(key, "–")), LONGEST) for key in ("prompt", "text", "reference"))
                cells = [
                    Cell(method.name, link=of_method(found, method.name, "runs")),
                    Cell(str(row["step"]), order=row["step"]),
                ]
                lines.append(Line(method.name, kinds.get(method.name, ""), [*cells, *map(Cell, texts)]))
    if not lines:
        return
    heads = [Column(title, number=False) for title in ("prompt", "answer", "the row's own answer")]
    lead = (
        "Greedy answers to train.samples by the first run of each method that was asked, at its first and its last measurement; "
        "samples.jsonl in its folder has those in between."
    )
    columns = [Column("method", number=False), Column("step"), *heads]
    yield Part("samples", "What they answer", lead, sheet=Sheet("What they answer", columns, lines))


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
        return Recipe(*ids, "None of its runs has left a recipe.", "", "", "")
    first, file = runs[0], _file(name)
    commands = "\n".join(_command(file, differences(first.recipe, run.recipe, "")) for run in runs)
    about = f"Relative paths in it start from {first.base_dir}.{_rates(found, name)}"
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
