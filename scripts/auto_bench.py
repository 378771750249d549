"""What `weftlora auto` chooses, against the defaults and against a grid, and whether its budget holds, into bench/auto.json.

    python scripts/auto_bench.py default --folder FOLDER --out bench/auto.json [--budget 30m] [--steps 60] [--seeds 5]
    python scripts/auto_bench.py regret  --folder FOLDER --out bench/auto.json [--budget 8m] [--steps 40] [--seeds 5] [--least]
    python scripts/auto_bench.py rates   --folder FOLDER --out bench/auto.json [--steps 40] [--task T]
    python scripts/auto_bench.py budget  --folder FOLDER --out bench/auto.json [--budget 4m] [--steps 20] [--searches 4]

All on the bundled model. `default`: a search on the bundled task; then the chosen method at its rate, and plain LoRA at the rate
that `weftlora train` takes where none is named, at equal trainable parameters and steps, on seeds that the search has not seen.
`regret`: on three tasks that the search was not made on (--task for some of them), the same, and beside it the best of a full grid
of methods and rates, by validation loss, of as many optimiser steps as the whole search has taken. With --least the search has the
smallest size that there is, whatever the budget has room for: where other work loads the machine, timing would choose at random.
`rates`: plain LoRA and HydraLoRA at a rate and at twice that, after a third of a run, where halving decides, and after all of it.
`budget`: searches one after the other, and what each took of its budget; the last is stopped once it has planned and goes on with a
third of the time that it needs, so that the clock ends it. What was searched and measured already in the folder is taken from there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import weftlora
from weftlora.auto import Found
from weftlora.auto import plan as planning
from weftlora.auto.candidates import EARLY
from weftlora.auto.plan import AutoPlan
from weftlora.auto.running import Standing, trained
from weftlora.compare import workers
from weftlora.compare.plan import TUNING_SEED, make
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Interval
from weftlora.compare.statistics import interval
from weftlora.data.demo import ARROW, DEMO_TASKS, LETTERS, apply_chain, demo_model_path, split_of
from weftlora.disk.files import read_json, write_json, write_text
from weftlora.runs import rates
from weftlora.runs.run import Run

FIRST_SEED = 500
METHODS: list[Any] = ["lora", {"recipe": "lora_dash", "after": EARLY}, "alora", "hydralora"]
TASKS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "crew, six rules": DEMO_TASKS["crew"],
    "house, four rules of two skills": {
        "house": {
            "carry": ("upper", "left"),
            "clean": ("sort", "double"),
            "turn": ("next", "reverse"),
            "mark": ("swap", "curtail"),
        }
    },
    "river and boat, one word with two rules": {
        "river": {"turn": ("left",), "fold": ("double", "reverse"), "trim": ("behead", "upper")},
        "boat": {"turn": ("right", "upper"), "fold": ("sort",), "trim": ("previous",)},
    },
}
ROWS = {"train": 2048, "validation": 256, "test": 512}
TWO_RATES, R = [0.0061, 0.012], 8
"""What `rates` tries: what a search found for plain LoRA, and about twice that; at the rank that a search takes for these rows."""
SPAN = 4.0
"""How far the grid's rates reach from the default, either way: as far as the first rates of a search."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("default", "regret", "rates", "budget"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default=None, help="of a search; 30m, 8m or 4m")
    parser.add_argument("--steps", type=int, default=None, help="of a full run; 60, 40 or 20")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--searches", type=int, default=4)
    parser.add_argument("--least", action="store_true", help="search at the smallest size; for regret")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this one; repeatable; for regret")
    given = parser.parse_args()
    budget, steps = {"default": ("30m", 60), "regret": ("8m", 40), "rates": ("", 40), "budget": ("4m", 20)}[given.part]
    given.budget, given.steps = given.budget or budget, given.steps or steps
    more = f"--budget {given.budget} " * (given.part != "rates") + f"--steps {given.steps}"
    more += {"budget": f" --searches {given.searches}", "rates": ""}.get(given.part, f" --seeds {given.seeds}")
    more += " --least" * given.least + "".join(f' --task "{name}"' for name in given.task or ())
    if given.least:
        planning.SIZES = planning.SIZES[-1:]
    made = {
        "command": f"python scripts/auto_bench.py {given.part} --folder FOLDER --out bench/auto.json {more}",
        "machine": f"{platform.machine()}, shared with other work",
        **{"default": against_the_default, "regret": regret, "rates": by_rate, "budget": budgets}[given.part](given),
    }
    content = read_json(given.out) if given.out.is_file() else {}
    write_json(given.out, content | {given.part + "_at_the_least" * given.least: made})


def default_rate() -> float:
    """What `weftlora train` takes on the bundled model where no rate is named."""
    width = json.loads((demo_model_path() / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    return rates.of_width(width)


def plain(found: Interval | None) -> dict[str, float | int | None] | None:
    return None if found is None else vars(found)


def said(found: Found, folder: Path) -> dict[str, Any]:
    """What is kept of a search."""
    plan = read_json(folder / "auto.json")
    keys = ("method", "lr", "why", "ended", "budget", "spent", "stages", "runs", "seeds", "export_error")
    return {key: getattr(found, key) for key in keys} | {"size": plan["size"], "estimate": plan["estimate"]}


# ---------------------------------------------------------------------- against the default, on the bundled task


def against_the_default(given: argparse.Namespace) -> dict[str, Any]:
    search = {"model": "demo", "data": "demo", "budget": given.budget, "serve": "vllm", "train": {"steps": given.steps}}
    found = weftlora.auto(search | {"out": str(given.folder / "search")})
    plan = read_json(given.folder / "search" / "auto.json")
    compared = weftlora.compare(
        {
            "model": "demo",
            "data": plan["recipe"]["data"],
            "train": {"steps": plan["steps"], "batch_size": plan["recipe"]["train"]["batch_size"]},
            "methods": [
                {"recipe": "lora", "name": "default", "lr": default_rate()},
                plan["methods"][found.method] | {"name": "chosen", "lr": found.lr},
            ],
            "baseline": "default",
            "budget": {"equal": "parameters", "r": plan["r"]},
            "seeds": list(range(FIRST_SEED, FIRST_SEED + given.seeds)),
            "answers": False,
            "metric": "loss",
            "out": str(given.folder / "against-the-default"),
        }
    )
    row = {row.name: row for row in compared.rows}
    return {
        "versions": compared.versions,
        "search": said(found, given.folder / "search"),
        "tried": [vars(each) for each in found.tried],
        "default_lr": default_rate(),
        "chosen_loss": plain(row["chosen"].score),
        "default_loss": plain(row["default"].score),
        "difference": plain(row["chosen"].gap),
        "verdict": row["chosen"].verdict.sentence,
    }


# ---------------------------------------------------------------------- against a grid, on other tasks


def rows(name: str, split: str) -> Iterable[dict[str, str]]:
    """Rows of one of `TASKS`, the same on every machine; no payload is in two splits."""
    rng = Random(crc32(f"{name}/{split}".encode()))
    rules = [(domain, word, chain) for domain, words in TASKS[name].items() for word, chain in words.items()]
    drawn: dict[str, str] = {}
    while len(drawn) < ROWS[split]:
        domain, word, chain = rules[int(rng.random() * len(rules))]
        letters = [LETTERS[int(rng.random() * len(LETTERS))] for _ in range(3 + int(rng.random() * 4))]
        payload = "".join(letters)
        if split_of(payload) == split and len(set(letters)) == len(letters):
            drawn.setdefault(f"{domain} {word} {payload}{ARROW}", f" {apply_chain(chain, payload)}")
    return [{"prompt": prompt, "completion": completion} for prompt, completion in drawn.items()]


def subject_of(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """The part of a recipe that says which model, rows and length; the rows are in the folder then."""
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"max_length": 64}
    for split in ROWS:
        data[split] = str(folder / f"{split}.jsonl")
        write_text(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows(name, split)))
    return {"model": "demo", "data": data, "train": {"steps": steps, "batch_size": 16}}


def searched(
    name: str, folder: Path, budget: str, steps: int, watch: Callable[[Standing], None] | None = None
) -> tuple[Found, dict[str, Any]]:
    """A search on a task, and the part of a recipe that all that is compared with it shares."""
    subject = subject_of(name, folder, steps)
    asked = subject | {"methods": METHODS, "budget": budget, "out": str(folder / "search")}
    return weftlora.auto(asked, watch=watch), subject


def regret(given: argparse.Namespace) -> dict[str, Any]:
    made: dict[str, Any] = {}
    losses: dict[str, list[list[float]]] = {"default": [], "chosen": [], "grid": []}
    for name in given.task or TASKS:
        top = given.folder / name.split(",")[0].replace(" ", "-")
        found, subject = searched(name, top, given.budget, given.steps)
        plan = read_json(top / "search" / "auto.json")
        subject |= {"budget": {"equal": "parameters", "r": plan["r"]}, "metric": "loss", "answers": False}
        trained = steps_of(top / "search")
        grid = the_grid(top, subject, plan, trained)
        best = min(grid, key=lambda each: each["validation_loss"])
        entries = {
            "default": {"recipe": "lora", "lr": default_rate()},
            "chosen": plan["methods"][found.method] | {"lr": found.lr},
            "grid": plan["methods"][best["method"]] | {"lr": best["lr"]},
        }
        compared = weftlora.compare(
            subject
            | {
                "methods": [entry | {"name": label} for label, entry in entries.items()],
                "baseline": "grid",
                "seeds": list(range(FIRST_SEED, FIRST_SEED + given.seeds)),
                "out": str(top / "compared"),
            }
        )
        for label, of_tasks in losses.items():
            of_tasks.append([run.scores["loss"] for run in compared.of(label)])
        made[name] = {
            "search": said(found, top / "search"),
            "tried": [vars(each) for each in found.tried],
            "search_steps": trained,
            "grid_steps": len(grid) * given.steps,
            "grid": grid,
            "grid_best": best,
            "losses": {label: of_tasks[-1] for label, of_tasks in losses.items()},
            "regret": plain(interval(differences(losses["chosen"][-1], losses["grid"][-1]))),
            "minus_default": plain(interval(differences(losses["chosen"][-1], losses["default"][-1]))),
        }

    def over_tasks(other: str) -> dict[str, float | int | None] | None:
        """Of the mean over tasks, paired by seed."""
        of_tasks = [differences(ours, theirs) for ours, theirs in zip(losses["chosen"], losses[other], strict=True)]
        return plain(interval([statistics.fmean(each) for each in zip(*of_tasks, strict=True)]))

    return {
        "versions": compared.versions,
        "default_lr": default_rate(),
        "tasks": made,
        "regret": over_tasks("grid"),
        "minus_default": over_tasks("default"),
    }


def differences(ours: list[float], theirs: list[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def steps_of(search: Path) -> int:
    """Optimiser steps of every run of a search: those that were timed, tried, and trained in the end."""
    return sum(Run.load(folder).steps for folder in trained(search))


def the_grid(top: Path, subject: dict[str, Any], plan: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Every method at every rate, with one seed, in no more optimiser steps than `steps`; their validation losses."""
    methods, full = list(plan["methods"].values()), subject["train"]["steps"]
    count = max(2, steps // (full * len(methods)))
    middle = default_rate()
    tried = [float(f"{middle * SPAN ** (2 * k / (count - 1) - 1):.3g}") for k in range(count)]
    return losses_at(top, subject, methods, tried, [full])


def losses_at(
    top: Path, subject: dict[str, Any], methods: list[Any], tried: list[float], lengths: list[int]
) -> list[dict[str, Any]]:
    """Every method at every rate and length, with one seed: the validation losses of those that end in one."""
    asked = {
        "methods": [method | {"lr": default_rate()} for method in methods],
        "seeds": 1,
        "out": str(top / "unused"),
    }
    runs, full = make(CompareRecipe.read(subject | asked)), subject["train"]["steps"]
    jobs = {
        (method.name, lr, steps): runs.trial(
            method,
            TUNING_SEED,
            lr,
            steps,
            f"grid/{runs.slugs[method.name]}/lr{lr:g}{'' if steps == full else f'-n{steps}'}",
        )
        for method in runs.methods
        for lr in tried
        for steps in lengths
    }
    left = iter([job for job in jobs.values() if workers.status(top / job.folder, True) == "missing"])
    workers.InThisProcess(top).run(lambda: next(left, None), lambda job, tick: None)
    found = []
    for (method, lr, steps), job in jobs.items():
        complete = workers.status(top / job.folder, True) == "complete"
        loss = Run.load(top / job.folder).metrics["validation_loss"] if complete else math.inf
        length = {} if lengths == [full] else {"steps": steps}
        found.append({"method": method, "lr": lr, **length, "validation_loss": loss})
    return [each for each in found if math.isfinite(each["validation_loss"])]


def by_rate(given: argparse.Namespace) -> dict[str, Any]:
    """What a rate and twice that come to, after a third of a run and after all of it."""
    methods = [{"recipe": name} for name in ("lora", "hydralora")]
    made = {}
    for name in given.task or TASKS:
        top = given.folder / name.split(",")[0].replace(" ", "-")
        subject = subject_of(name, top, given.steps) | {"budget": {"equal": "parameters", "r": R}, "metric": "loss"}
        made[name] = losses_at(top, subject, methods, TWO_RATES, planning.rungs(given.steps))
    return {"tasks": made}


# ---------------------------------------------------------------------- budgets


def budgets(given: argparse.Namespace) -> dict[str, Any]:
    """Searches of one budget, on the tasks in turn; each in seconds of wall time around the call."""
    found = []
    for number in range(given.searches):
        name = list(TASKS)[number % len(TASKS)]
        folder = given.folder / f"budget-{number}"
        file = folder / "took.json"
        if not file.is_file():
            before, budget = 0.0, given.budget
            if number == given.searches - 1:
                before, budget = planned_only(name, folder, given.budget, given.steps)
            began = time.monotonic()
            search, _ = searched(name, folder, budget, given.steps)
            took = round(before + time.monotonic() - began, 3)
            write_json(file, {"task": name, "took": took, **said(search, folder / "search")})
        found.append(read_json(file))
    return {"searches": found, "largest_share": max(each["took"] / each["budget"] for each in found)}


def planned_only(name: str, folder: Path, budget: str, steps: int) -> tuple[float, str]:
    """Seconds that a search takes to its plan, where it is stopped, and a budget in which a third of what it plans fits."""

    def stop(standing: Standing) -> None:
        if standing.stage == "rates":
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        searched(name, folder, budget, steps, stop)
    spent = read_json(folder / "search" / "clock.json")["spent"]
    plan = AutoPlan.load(folder / "search")
    return spent, f"{spent + plan.profile.ending + plan.estimate / 3:.0f}s"


if __name__ == "__main__":
    main()
