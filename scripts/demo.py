"""`make demo`: the frozen base, LoRA, HydraLoRA and Tied-LoRA on the embedded model and tasks, side by side.

    python scripts/demo.py [--out runs/demo] [--steps N] [--rows N]

Each method is trained, evaluated on the test rows, which no training has seen, and asked one question. The same as
`weft train NAME`, `weft eval` and `weft generate` by hand; the runs stay in the folder.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import weft
from weft.cli.display import watching
from weft.cli.output import calling
from weft.data.demo import demo_rows

if TYPE_CHECKING:
    from weft.train.evaluation import Evaluation

METHODS = {"lora": "LoRA", "hydralora": "HydraLoRA", "tied_lora": "Tied-LoRA"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--steps", type=int, help="optimiser steps; each recipe's own by default")
    parser.add_argument("--rows", type=int, default=256, help="test rows to measure on")
    given = parser.parse_args()
    began, console, question = time.monotonic(), Console(), demo_rows("test")[0]
    settings = [f"data.test_limit={given.rows}"]
    if given.steps is not None:
        settings.append(f"train.steps={given.steps}")
    table = Table("adapter", "trained", "seconds", "loss", "exact match", f"{question['prompt']} ?", highlight=False)

    def add(name: str, trained: str, seconds: str, found: Evaluation, answer: str) -> None:
        scores = found.scores
        table.add_row(name, trained, seconds, f"{scores.loss:.3f}", f"{scores.exact_match:.1%}", answer)

    with calling(as_json=False, quiet=False), watching(True) as progress:
        warnings.simplefilter("ignore")
        console.print(f"frozen base: {given.rows} test rows of the demo tasks")
        add("none", "0", "", weft.evaluate("none", settings[0], adapter="none", progress=progress), "")
        for recipe, title in METHODS.items():
            console.print(f"{title}: weft train {recipe} out={given.out}/{recipe}")
            run = weft.train(recipe, f"out={given.out}/{recipe}", *settings, overwrite=True, progress=progress)
            answer = weft.generate(run, question["prompt"], max_new_tokens=24).text.strip()
            seconds = f"{run.time['train_seconds']:.1f}"
            found = weft.evaluate(run, progress=progress)
            add(title, f"{run.parameters['trainable']:,}", seconds, found, answer)
    console.print(table)
    console.print(f"The answer is {question['completion'].strip()}. Loss in nats per answer token.")
    console.print(f'{time.monotonic() - began:.0f} s in all. Next: weft generate {given.out}/hydralora "..."')


if __name__ == "__main__":
    main()
