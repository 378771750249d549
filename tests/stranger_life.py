"""Every command on runs whose terms another package brings: `stranger_life.py FOLDER`; FOLDER/told.json tells what each command did.

One process imports weftlora and forks a child for each command, so that what one has imported or trusted is none of the next one's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

import weftlora.cli
import weftlora.train.loop

TOP = Path(sys.argv[1])
MARK = TOP / "imported"
"""What the package writes when it is imported."""
told: dict[str, dict[str, Any]] = {}


def command(name: str, *arguments: object, **environment: str) -> None:
    """Run a command in a child and note its exit code, what it said, and whether the package was imported."""
    MARK.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        for descriptor, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(TOP / f"{name}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
        os.environ.update(environment)
        code = 1
        try:
            weftlora.cli.main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = {stream: (TOP / f"{name}.{stream}").read_text() for stream in ("out", "err")}
    told[name] = {"code": code, **said, "imported": MARK.exists()}


class Kill(TrainerCallback):  # type: ignore[misc]
    """Ends the process as `kill -9` does, after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(recipe: Path, out: Path, step: int) -> None:
    """Train until a kill."""
    child = os.fork()
    if not child:
        weftlora.train(recipe, f"out={out}", callbacks=[Kill(step)])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def recipe(name: str, adapter: dict[str, Any]) -> Path:
    """A recipe of eight steps with checkpoints after every second."""
    data = {"train": "rows.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    train = {"steps": 8, "batch_size": 4, "lr": 1e-2, "save_every": 2, "logging_every": 1}
    made = {"model": "base", "data": data, "adapter": adapter, "train": train, "out": str(TOP / name)}
    (TOP / f"{name}.yaml").write_text(yaml.safe_dump(made))
    return TOP / f"{name}.yaml"


def main() -> None:
    torch.set_num_threads(1)
    trusting = ("--trust-terms", "stranger-terms")
    adapters = {
        "top2": {"structure": {"kind": "top2", "after": 4}, "r": 4, "target_modules": ["q_proj", "down_proj"]},
        "trim": {
            "ranks": {"trim": {"at": 4, "slots": 3, "rows": 8}},
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
        },
        "sieve": {
            "layers": {"kind": "sieve", "keep": 1, "steps": 3},
            "r": 4,
            "target_modules": ["q_proj", "down_proj"],
        },
    }
    for name, adapter in adapters.items():
        file = recipe(name, adapter)
        command(f"train {name}", "train", file)
        for step, how in ((3, "recipe"), (5, "folder")):
            out = TOP / f"{name}-killed-{how}"
            killed(file, out, step)
            if how == "recipe":
                command(f"resume {name} by its recipe", "train", file, f"out={out}", "--resume")
            else:
                command(f"resume {name} untrusted", "train", out, "--resume")
                command(f"resume {name} trusted", "train", out, "--resume", *trusting)
    run = TOP / "top2"
    command("override", "train", recipe("plain", {"r": 4}), "adapter.structure={kind: top2, after: 4}", "train.steps=5")
    rows = TOP / "test.jsonl"
    for name, arguments in {
        "eval": ("eval", run),
        "generate": ("generate", run, "ab ->", "--max-new-tokens", 2),
        "inspect": ("inspect", run, "--json"),
        "inspect alone": ("inspect", run, "--no-base", "--json"),
        "directions": ("directions", run),
        "export": ("export", run, "--to", "lora"),
        "merge": ("export", run, "--to", "merged"),
        "adapter folder": ("generate", run / "adapter", "ab ->", "--max-new-tokens", 2, "--base", TOP / "base"),
    }.items():
        command(f"{name} untrusted", *arguments)
        command(f"{name} trusted", *arguments, *trusting)
    command("eval by variable", "eval", run, WEFT_TRUST_TERMS="stranger-terms")
    command("search", "search", TOP / "sieve.yaml", "--out", TOP / "selection.json", "--rows", 16, "--json")
    command("eval sieve", "eval", TOP / "sieve", "--json")
    command("export sieve", "export", TOP / "sieve", "--to", "lora")
    command("export trim", "export", TOP / "trim", "--to", "lora", *trusting)
    command("recipes", "recipes")
    command("doctor", "doctor")
    command("report of runs", "report", run, TOP / "trim", "--out", TOP / "runs.html")
    comparison = {
        "model": str(TOP / "base"),
        "data": {"train": str(TOP / "rows.jsonl"), "validation": str(TOP / "validation.jsonl"), "test": str(rows)},
        "train": {"steps": 6, "batch_size": 4, "lr": 1e-2, "save_every": 0},
        "methods": [
            "lora",
            {"structure": {"kind": "top2", "after": 3}},
            {"ranks": {"kind": "trim", "at": 3, "rows": 8}},
            {"layers": {"kind": "sieve", "steps": 2}},
        ],
        "seeds": 2,
        "out": str(TOP / "comparison"),
    }
    (TOP / "comparison.yaml").write_text(yaml.safe_dump(comparison))
    command("compare", "compare", TOP / "comparison.yaml", "--json")
    command("report", "report", TOP / "comparison", "--out", TOP / "report.html")
    (TOP / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
