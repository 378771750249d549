"""Every method under every engine, against one process: `evidence/scaling.json`, which docs/scaling.md shows.

    python scripts/scaling.py                       all columns
    python scripts/scaling.py --only fsdp2:4        one of them: what it came to replaces what is there

A column that fails is recorded with what it said. What was not run is not in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "evidence" / "scaling.json"
sys.path[:0] = [str(ROOT / "tests" / "sharding"), str(ROOT / "tests"), str(ROOT / "src")]

COLUMNS = ("ddp:2", "ddp:4", "fsdp1:2", "fsdp2:2", "fsdp2:4", "tp:2")


def begun(engine: str, world: int, folder: Path, methods: list[str]) -> list[int]:
    """The processes of a world, forked from this one, at work in a folder."""
    from worlds import DTYPES, be, forked

    return forked(
        world,
        lambda rank: be(rank, world, str(folder), engine, methods, list(DTYPES)),
        lambda rank, error: (folder / f"{rank}.failed").write_text("".join(traceback.format_exception(error))),
    )


def measured(folder: Path, world: int, one: dict[Any, Any], methods: list[str]) -> dict[str, Any]:
    """By method: the largest difference of any process to `one` per dtype, and whether all decided as it did; or what failed."""
    from worlds import DTYPES, decisions, largest_difference

    files = [folder / f"{rank}.pt" for rank in range(world)]
    each = [torch.load(file, weights_only=True) if file.exists() else {} for file in files]
    said = [file.read_text().strip().splitlines()[-1] for file in sorted(folder.glob("*.failed"))]
    found: dict[str, Any] = {}
    for method in methods:
        if not all((method, kind) in got for got in each for kind in DTYPES):
            found[method] = {"failed": said[0][:300] if said else "it did not come to it"}
            break  # what follows was never begun
        found[method] = {
            kind: {
                "difference": max(largest_difference(one[method, kind], got[method, kind]) for got in each),
                "same_decisions": all(decisions(got[method, kind]) == decisions(one[method, kind]) for got in each),
            }
            for kind in DTYPES
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--methods", nargs="+", help="all of them by default; what others came to stays")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    from worlds import DTYPES, METHODS, alone

    methods = given.methods or list(METHODS)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as top:
        worlds: dict[str, tuple[Path, int, list[int]]] = {}
        for name in given.only:
            engine, world = name.split(":")
            folder = Path(top) / name.replace(":", "-")
            folder.mkdir()
            worlds[name] = folder, int(world), begun(engine, int(world), folder, methods)
        one = alone(methods, list(DTYPES))
        found = json.loads(given.out.read_text()) if given.out.exists() else {"command": "make scaling", "columns": {}}
        for name, (folder, world, children) in worlds.items():
            for child in children:
                os.waitpid(child, 0)
            for file in sorted(folder.glob("*.failed")):
                print(name, file.name, file.read_text(), file=sys.stderr, flush=True)
            found["columns"].setdefault(name, {}).update(measured(folder, world, one, methods))
            found["versions"] = {"torch": torch.__version__}
            given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            print(name, found["columns"][name], flush=True)


if __name__ == "__main__":
    main()
