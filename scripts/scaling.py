"""Every method under every engine, against one process: `evidence/scaling.json`, which docs/scaling.md shows.

    python scripts/scaling.py                       all columns
    python scripts/scaling.py --only fsdp2:4        one of them: what it came to replaces what is there

A column that fails is recorded with what it said. What was not run is not in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "evidence" / "scaling.json"
sys.path[:0] = [str(ROOT / "tests" / "sharding"), str(ROOT / "tests")]

COLUMNS = ("ddp:2", "ddp:4", "fsdp1:2", "fsdp2:2", "fsdp2:4", "tp:2")


def column(engine: str, world: int) -> dict[str, Any]:
    """What every method came to in that world, by method: the largest difference per dtype, and whether it decided the same."""
    from worlds import METHODS

    found = of_methods(engine, world, list(METHODS))
    if "failed" in found:  # which of them it was
        found = {method: _one(engine, world, method) for method in METHODS}
    return found


def _one(engine: str, world: int, method: str) -> dict[str, Any]:
    found = of_methods(engine, world, [method])
    return found if "failed" in found else found[method]


def of_methods(engine: str, world: int, methods: list[str]) -> dict[str, Any]:
    """The same of some methods, one after the other in the same processes; {"failed": what was said} where one fails."""
    from worlds import DTYPES

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "tests/sharding/worlds.py"), str(world), folder, engine, *methods]
        path = os.pathsep.join([str(ROOT / "src"), *sys.path[:2]])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            print(*said[-30:], sep="\n", file=sys.stderr, flush=True)
            return {"failed": said[-1][:300] if said else f"exit code {done.returncode}"}
        found = {method: {kind: measured(Path(folder), world, method, kind) for kind in DTYPES} for method in methods}
    print(f"{engine}:{world} {found}", flush=True)
    return found


def measured(folder: Path, world: int, method: str, kind: str) -> dict[str, Any]:
    """Of all processes against the one."""
    from worlds import decisions, largest_difference

    one, *each = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("alone", *range(world)))
    expected, got = one[method, kind], [found[method, kind] for found in each]
    return {
        "difference": max(largest_difference(expected, mine) for mine in got),
        "same_decisions": all(decisions(mine) == decisions(expected) for mine in got),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    out: Path = given.out
    found = json.loads(out.read_text()) if out.exists() else {"command": "make scaling", "columns": {}}
    for name in given.only:
        engine, world = name.split(":")
        found["columns"][name] = column(engine, int(world))
        found["versions"] = {"torch": torch.__version__}
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
