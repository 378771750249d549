"""What starting costs: commands that have nothing to compute, and imports, beside those of trl, transformers and peft.

    python scripts/start_bench.py --out bench/start.json

CPU seconds (user and system) of a whole process. Every round runs each case once in a fresh random order; bytecode is kept, as in an
installed package.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

BIN = Path(sys.executable).parent
WEFT = [sys.executable, "-m", "weftlora"]
CASES = {
    "weftlora --help": [*WEFT, "--help"],
    "weftlora --version": [*WEFT, "--version"],
    "weftlora recipes": [*WEFT, "recipes"],
    "weftlora recipes hydralora": [*WEFT, "recipes", "hydralora"],
    "a mistyped command": [*WEFT, "trian", "hydralora"],
    "a mistyped recipe": [*WEFT, "train", "hydralroa"],
    "a wrong path": [*WEFT, "train", "nowhere.yaml"],
    "a wrong key": [*WEFT, "train", "hydralora", "train.step=3"],
    "a wrong key of an adapter": [*WEFT, "train", "hydralora", "adapter.heds=3"],
    "trl --help": [str(BIN / "trl"), "--help"],
    "transformers --help": [str(BIN / "transformers"), "--help"],
    "import weftlora": [sys.executable, "-c", "import weftlora"],
    "import peft": [sys.executable, "-c", "import peft"],
    "import weftlora, peft": [sys.executable, "-c", "import weftlora, peft"],
    "import peft, and a config of weftlora": [
        sys.executable,
        "-c",
        "import peft, weftlora; weftlora.HydraLoraConfig()",
    ],
}


def cost(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """CPU seconds of one process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in CASES}
    order = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPYCACHEPREFIX": f"{folder}/cache",
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for command in CASES.values():  # compiles what is not compiled yet; not counted
            cost(command, Path(folder), environment)
        for _ in range(given.rounds):
            for name in order.sample(list(CASES), len(CASES)):
                found[name].append(round(cost(CASES[name], Path(folder), environment), 3))
    record = {
        "command": "python scripts/start_bench.py" + (f" --rounds {given.rounds}" if given.rounds != 7 else ""),
        "unit": "CPU seconds, user and system, of a whole process",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "peft", "transformers", "trl", "typer")},
        "cases": {
            name: {
                "n": len(values),
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
                "rounds": values,
            }
            for name, values in found.items()
        },
    }
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, case in record["cases"].items():
        print(f"{name:<40} {case['median']:6.2f}  ({case['least']:.2f} to {case['most']:.2f}, n = {case['n']})")


if __name__ == "__main__":
    main()
