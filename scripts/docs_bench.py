"""Tables of `docs/performance.md` from the committed records in `bench/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent / "bench"

Row = tuple[str, ...]


def record(name: str) -> dict[str, Any]:
    """One committed record."""
    found: dict[str, Any] = json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))
    return found


def cases(name: str) -> tuple[Row, list[Row]]:
    """Head and rows: a row per case of the record."""
    head = ("case", "r", "p", "adapter", "forward + backward", "with AdamW", "saved MiB", "saved", "gradient error")
    rows = []
    for row in record(name)["cases"]:
        case, agreed = row["case"], row["agreement"]
        what = ("floor", "", "", "") if case["kind"] == "floor" else _named(case)
        error = "" if agreed is None else f"{agreed['error']:.1e}{'' if row['exact'] else ' (not exact)'}"
        speed = (spread(row["ratio"], 2), f"{row['ratio_adamw']['median']:.2f}")
        rows.append((*what, *speed, f"{row['saved_bytes'] / 2**20:.0f}", f"{row['saved_ratio']:.2f}", error))
    return head, rows


def targets(*names: str) -> tuple[Row, list[Row]]:
    """Head and rows: a row per target of the records."""
    head = ("base", "target", "measured", "at most", "")
    goals = [goal for name in names for goal in record(name)["targets"]]
    return head, [
        (g["dtype"], g["name"], spread(g["value"], 3), f"{g['limit']:g}", "met" if g["met"] else "**missed**")
        for g in goals
    ]


def setting(*names: str) -> tuple[Row, list[Row]]:
    """Head and rows: rounds, command and versions of each record."""
    head = ("record", "n", "command", "versions")
    rows = []
    for name in names:
        found = record(name)
        versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
        rounds = str(found["setting"]["rounds"])
        rows.append((f"`bench/{name}.json`", rounds, f"`{found['command']}`", versions))
    return head, rows


def spread(value: dict[str, float], digits: int) -> str:
    """Median and quartiles, such as "1.10 [1.09, 1.12]"."""
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _named(case: dict[str, Any]) -> Row:
    return case["kind"], str(case["r"]), f"{case['p']:g}", case["adapter"]
