"""`make soak`: `weftlora train` killed by SIGKILL at random moments, over and over, and resumed until it is complete.

    python scripts/soak.py [--minutes 10] [--seed 0] [--out evidence/soak.json]

Every recipe trains on the embedded model. Moments are drawn from 1.3 times the length of an uninterrupted run, so a kill
comes wherever the process happens to be. A run that is complete in the end must have the adapter of the uninterrupted one,
byte for byte, and no kill may cost a complete checkpoint. Lives are forked from one process that has imported everything: importing
is most of a short life, and there is no run yet to be harmed. Exits 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import weftlora
import weftlora.train.loop  # imported once, before the first fork
from weftlora.cli import main as cli
from weftlora.data.demo import demo_model_path
from weftlora.runs.run import Run
from weftlora.train import checkpoint

RECIPES = {
    "lora": [],
    "hydralora": [],
    "tied_lora": [],
    "lora_dash": ["adapter.after=12"],
    "lora_init": ["adapter.after=12"],
    "lora_tsd": ["adapter.after=12"],
    "alora": ["adapter.first=8", "adapter.every=4", "adapter.max_rounds=2", "adapter.rows=4"],
    "flexora": ["adapter.steps=8", "adapter.val_size=32", "adapter.outer_batches=2"],
}
LENGTH = "train.steps=24 train.batch_size=8 train.save_every=4 train.logging_every=1 train.num_threads=1"
SETTINGS = [*LENGTH.split(), "train.schedule=constant", "adapter.lora_dropout=0.1", "data.validation_limit=16"]


@dataclass
class Tally:
    """What happened to the runs of one recipe."""

    complete: int = 0
    identical: int = 0
    kills: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Of the uninterrupted run."""


def life(recipe: str, out: Path, deadline: float | None) -> tuple[int, float]:
    """One process of `weftlora train`; after `deadline` seconds it is killed. Its exit code and the seconds it lived."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            resume = ["--resume"] if (out / "run.json").is_file() else []
            cli(["train", recipe, f"out={out}", *SETTINGS, *RECIPES[recipe], *resume, "--quiet"])
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            os._exit(code)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        lived = time.monotonic() - began
        if found:
            return os.waitstatus_to_exitcode(status), lived
        if deadline is not None and lived >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.001)


def phase(out: Path) -> str:
    """Where a kill came, read from what it left behind."""
    if not (out / "run.json").is_file():
        return "before run.json"
    if Run.load(out).status == "complete":
        return "after the end"
    if any(out.glob(".adapter.weft-*")) or out.joinpath("adapter").exists():
        return "writing the adapter or run.json"
    every = checkpoint.folders(out / "checkpoints")
    if any(not checkpoint.is_marked(path) for path in every):
        return "writing a checkpoint"
    events = out / "events.jsonl"
    if events.exists() and '"dash_launch"' in events.read_text(encoding="utf-8"):
        return "training, after a launch"
    return "training" if every or (out / "metrics.jsonl").exists() else "before the first step"


def newest(out: Path) -> int:
    last = checkpoint.newest(out / "checkpoints")
    return checkpoint.step_of(last) if last else 0


def weights(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def one_run(recipe: str, out: Path, whole: bytes, tally: Tally, draw: random.Random) -> None:
    """Kill a run at random moments until it is complete before its moment comes, and compare."""
    before = 0
    while True:
        code, _ = life(recipe, out, draw.uniform(0, 1.3 * tally.seconds))
        if code != -signal.SIGKILL:
            break
        tally.kills += 1
        tally.phases[phase(out)] += 1
        if newest(out) < before:
            tally.failures.append(f"{out.name}: a kill cost checkpoint {before}")
        before = newest(out)
    if code != 0:
        tally.failures.append(f"{out.name}: exit code {code}: {out.with_suffix('.log').read_text()[-500:]}")
        return
    tally.complete += 1
    if weights(out) == whole:
        tally.identical += 1
    else:
        tally.failures.append(f"{out.name}: another adapter than the uninterrupted run's")


def soak(folder: Path, seconds: float, seed: int) -> dict[str, Tally]:
    """Runs, each of the recipe that has been killed least, for about so many seconds."""
    end, tallies, wholes = time.monotonic() + seconds, {}, {}
    for recipe in RECIPES:
        code, lived = life(recipe, folder / f"{recipe}-whole", None)
        if code:
            sys.exit((folder / f"{recipe}-whole.log").read_text())
        tallies[recipe], wholes[recipe] = Tally(seconds=lived), weights(folder / f"{recipe}-whole")
    while time.monotonic() < end:
        recipe, tally = min(tallies.items(), key=lambda item: item[1].kills)
        out = folder / f"{recipe}-{tally.complete}"
        one_run(recipe, out, wholes[recipe], tally, random.Random(f"{seed} {out.name}"))
        shutil.rmtree(out, ignore_errors=True)
        print(f"{out.name}: {tally.kills} kills, {tally.identical}/{tally.complete} identical", flush=True)
    return tallies


def record(tallies: dict[str, Tally], seed: int, seconds: float) -> dict[str, object]:
    """What evidence/soak.json holds."""
    return {
        "command": "python " + shlex.join(["scripts/soak.py", *shown(sys.argv[1:])]),
        "versions": f"weftlora {weftlora.__version__}, torch {torch.__version__}, {platform.machine()}",
        "seed": seed,
        "settings": SETTINGS,
        "seconds": round(seconds),
        "kills": sum(tally.kills for tally in tallies.values()),
        "complete": sum(tally.complete for tally in tallies.values()),
        "identical": sum(tally.identical for tally in tallies.values()),
        "failures": sum(len(tally.failures) for tally in tallies.values()),
        "recipes": {
            recipe: {**asdict(tally), "phases": dict(sorted(tally.phases.items())), "seconds": round(tally.seconds, 1)}
            for recipe, tally in tallies.items()
        },
    }


def shown(arguments: Sequence[str]) -> list[str]:
    """Arguments without those that only name a folder of this machine."""
    kept: list[str] = []
    for argument in arguments:
        if argument.startswith("/"):
            kept.pop()
        elif "=/" not in argument:
            kept.append(argument)
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("evidence/soak.json"))
    given = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    AutoModelForCausalLM.from_pretrained(demo_model_path())
    AutoTokenizer.from_pretrained(demo_model_path())
    with tempfile.TemporaryDirectory(prefix="weft-soak-") as folder:
        tallies = soak(Path(folder), 60 * given.minutes, given.seed)
    found = record(tallies, given.seed, time.monotonic() - began)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
