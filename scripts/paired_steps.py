"""A training step and an import of two versions of the package, side by side: is one slower than the other?

    git worktree add /tmp/before COMMIT
    python scripts/paired_steps.py --before /tmp/before/src:weft --after src:weftlora --out bench/before-after.json

Each version has a process of its own that keeps a model per case; both are asked in turn for one step, before, after, after, before,
so that whatever slows the machine down for a while slows both alike. A pair is one such turn of four:

    ratio = (CPU seconds of the two steps after) / (CPU seconds of the two steps before)

The frozen base is stepped too: its ratio is what the two processes differ by for reasons of their own (where their memory lies), which
has been 3 to 5 % on a machine whose intervals were narrower than that. A case is slower where its ratio is above that of the base.

Reported are the geometric mean over the pairs and its 95 % t-interval on the logarithm. The clock is the process' CPU time. Imports
are whole processes, paired in the same way.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

ROOT = Path(__file__).resolve().parent.parent
FLOOR = "the frozen base"
CASES = {
    FLOOR: (("floor",), 0),
    "LoRA r=16": (("plain", "lora"), 16),
    "LoRA r=16, p=0.05": (("plain", "lora"), 16),
    "HydraLoRA N=3 r=8": (("hydra", "hydralora"), 8),
    "Tied-LoRA r=16": (("tied", "tied_lora"), 16),
    "LoRA-Dash r=8 + 8": (("dash", "lora_dash"), 8),
    "ALoRA r=12 of 16": (("alora",), 12),
    "Flexora, gated r=16": (("flexora",), 16),
}
"""Title → what the bench of either version calls it, and its rank."""
SHAPES = {
    "hidden 64, 2 layers, 2 × 32 tokens": {"hidden": 64, "layers": 2, "vocab": 64, "batch": 2, "seq": 32},
    "hidden 768, 2 layers, 2 × 256 tokens": {"hidden": 768, "layers": 2, "vocab": 2048, "batch": 2, "seq": 256},
}
IMPORTS = {
    "import": "import {0}",
    "import, and a config": "import {0}; {0}.HydraLoraConfig()",
    "import of what trains": "import {0}, {0}.train.loop",
}
TURN = (0, 1, 1, 0)


# ---------------------------------------------------------------------- one version


def serve(package: str) -> None:
    """Be one version: a line in is a shape, a title and how many steps; a line out their CPU seconds."""
    import time

    import torch

    torch.set_num_threads(1)
    cases = importlib.import_module(f"{package}.bench.cases")
    known = {**vars(cases).get("CONFIGS", {}), **vars(cases).get("BENCHED", {})}
    held: dict[tuple[str, str], Any] = {}
    for line in sys.stdin:
        at, title, count = json.loads(line)
        if (at, title) not in held:
            held.clear()  # one model at a time
            torch.manual_seed(0)
            names, r = CASES[title]
            case = cases.Case(
                next(name for name in names if name in known or name == "floor"), r, 0.05 if "p=0.05" in title else 0.0
            )
            shape = cases.Shape(**SHAPES[at])
            base, batch = cases.frozen_base(shape, "fp32"), cases.Batch.draw(shape, "fp32")
            held[at, title] = cases.build(case, base, {}), batch
        model, batch = held[at, title]
        started = time.process_time()
        for _ in range(count):
            batch.loss(model).backward()
        seconds = time.process_time() - started
        for p in model.parameters():
            p.grad = None
        print(json.dumps(seconds), flush=True)


class Version:
    """One version, in a process of its own."""

    def __init__(self, given: str):
        path, _, self.package = given.rpartition(":")
        self.path = Path(path).resolve()
        environment = {**os.environ, "PYTHONPATH": str(self.path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.environment = environment
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", self.package]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def commit(self) -> str:
        """Of its source."""
        told = subprocess.run(
            ["git", "rev-parse", "--short=7", "HEAD"], cwd=self.path, capture_output=True, text=True, check=True
        )
        return told.stdout.strip()

    def step(self, at: str, title: str, count: int) -> float:
        """CPU seconds of `count` steps."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([at, title, count]), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def imported(self, code: str) -> float:
        """CPU seconds of a process that runs this."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", code.format(self.package)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def close(self) -> None:
        """End its process."""
        self.process.communicate()


# ---------------------------------------------------------------------- both


def paired(pairs: int, measure: Any) -> dict[str, Any]:
    """The ratio of two versions over so many turns; measure(0 or 1) → seconds."""
    for which in (0, 1):
        measure(which)  # builds and warms up; not counted
    found: list[list[float]] = []
    for _ in range(pairs):
        found.append([measure(which) for which in TURN])
    logs = [math.log((b + c) / (a + d)) for a, b, c, d in found]
    mean = statistics.fmean(logs)
    half = float(stdtrit(len(logs) - 1, 0.975)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {
        "ratio": round(math.exp(mean), 4),
        "low": round(math.exp(mean - half), 4),
        "high": round(math.exp(mean + half), 4),
        "pairs": len(logs),
        "seconds": [[round(s, 5) for s in turn] for turn in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", metavar="PACKAGE", help=argparse.SUPPRESS)
    parser.add_argument("--before", metavar="PATH:PACKAGE")
    parser.add_argument("--after", metavar="PATH:PACKAGE", default="src:weftlora")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--import-pairs", type=int, default=10)
    parser.add_argument(
        "--steps", type=int, default=1, help="Steps per asking at the larger shape; the smaller takes 10 times as many."
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    if not given.before:
        parser.error(
            "--before is missing: the source folder and the package of the version to compare with, as PATH:PACKAGE"
        )
    versions = Version(given.before), Version(given.after)
    record: dict[str, Any] = {
        "command": f"python scripts/paired_steps.py --before BEFORE/src:{versions[0].package} --after src:{versions[1].package} "
        f"--pairs {given.pairs} --import-pairs {given.import_pairs} --steps {given.steps}",
        "order": "before, after, after, before; seconds are in that order",
        "unit": "CPU seconds of the process; imports: user and system",
        "before": {"package": versions[0].package, "commit": versions[0].commit},
        "after": {"package": versions[1].package, "commit": versions[1].commit},
        "load": None,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "peft", "transformers")},
        "steps": {},
        "imports": {},
    }
    for at, shape in SHAPES.items():
        count = given.steps * (10 if shape["hidden"] < 512 else 1)
        for title in CASES:
            found = paired(given.pairs, lambda which: versions[which].step(at, title, count))  # noqa: B023
            record["steps"].setdefault(at, {})[title] = found
            print(f"{at}: {title:<22} {found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]", flush=True)
    for name, code in IMPORTS.items():
        found = paired(given.import_pairs, lambda which: versions[which].imported(code))  # noqa: B023
        record["imports"][name] = found
        print(f"{name:<22} {found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]", flush=True)
    record["load"] = [round(value, 1) for value in os.getloadavg()]
    for each in versions:
        each.close()
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
