"""Tables of `docs/performance.md` from the committed records in `bench/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent / "bench"

Row = tuple[str, ...]
RECIPES = {"peft": "peft:lora", "plain": "lora", "hydra": "hydralora", "tied": "tied_lora", "dash": "lora_dash"}
"""What cases were called in records that were made before they had the names of their recipes."""


def record(name: str) -> dict[str, Any]:
    """One committed record."""
    found: dict[str, Any] = json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))
    return found


def cases(name: str, dtype: str) -> tuple[Row, list[Row]]:
    """Head and rows: a row per case of the record on a base of `dtype`."""
    head = ("case", "r", "p", "adapter", "forward + backward", "with AdamW", "saved MiB", "saved", "gradient error")
    rows = []
    for row in record(name)["cases"]:
        if row["dtype"] != dtype:
            continue
        case, agreed = row["case"], row["agreement"]
        error = "" if agreed is None else f"{agreed['error']:.1e}{'' if row['exact'] else ' (not exact)'}"
        speed = (spread(row["ratio"], 3), f"{row['ratio_adamw']['median']:.3f}")
        rows.append((*_named(case), *speed, f"{row['saved_bytes'] / 2**20:.0f}", f"{row['saved_ratio']:.2f}", error))
    return head, rows


def targets(name: str) -> tuple[Row, list[Row]]:
    """Head and rows: a row per target of the record."""
    head = ("base", "target", "measured", "must", "aim", "")
    words = {"aim": "aim reached", "must": "reached", "missed": "**missed**", "": ""}

    def limit(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return head, [
        (g["dtype"], g["name"], spread(g["value"], 3), limit(g["must"]), limit(g["aim"]), words[g["verdict"]])
        for g in record(name)["targets"]
    ]


def dash(name: str) -> tuple[Row, list[Row]]:
    """Head and rows: a launched LoRA-Dash beside plain LoRA of as many slots."""
    rows = []
    for row in record(name)["cases"]:
        case, kind = row["case"], recipe_of(row["case"])
        if kind in ("lora", "lora_dash") and not case["p"] and not case["compiled"]:
            label = "LoRA-Dash, r = 8 and 8 directions" if kind == "lora_dash" else "LoRA, r = 16"
            rows.append((row["dtype"], label, spread(row["ratio"], 3), f"{row['saved_ratio']:.2f}"))
    return ("base", "case", "step / the frozen base's", "saved / the frozen base's"), rows


def training(name: str) -> tuple[Row, list[Row]]:
    """Head and rows: what a training costs a step, beside a plain Trainer with peft."""
    head = ("case", "n", "CPU ms a step", "/ plain Trainer and peft [range]")
    rows = []
    for case, found in record(name)["cases"].items():
        ratio = f"{found['ratio']:.3f} [{found['lowest']:.3f}, {found['highest']:.3f}]"
        rows.append((case, str(len(found["all"])), f"{1000 * found['cpu_per_step']:.1f}", ratio))
    return head, rows


def encoding(name: str) -> tuple[Row, list[Row]]:
    """Head and rows: what rows cost, beside trl's preparation of the same ones."""
    head = ("", "n", "CPU s", "s", "most memory, MB")
    names = {"ours": "weftlora", "theirs": "trl", "ours again": "weftlora, second start"}
    rows = []
    for case, found in record(name)["cases"].items():
        for side, called in names.items():
            rounds = found[side]["rounds"]
            cpu, wall = (f"{found[side][key]:.1f}" for key in ("median_cpu_s", "median_s"))
            memory = f"{max(each['mb'] for each in rounds):.0f}"
            rows.append((f"{called}, {case}" if case != "1 processes" else called, str(len(rounds)), cpu, wall, memory))
    return head, rows


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


def recipe_of(case: dict[str, Any]) -> str:
    """The recipe that a case steps."""
    return RECIPES.get(case["kind"], str(case["kind"]))


def spread(value: dict[str, float], digits: int) -> str:
    """Median and quartiles, such as "1.10 [1.09, 1.12]"."""
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _named(case: dict[str, Any]) -> Row:
    words = [recipe_of(case), *(["one mask per input"] if case["mask"] == "input" else [])]
    words += ["compiled"] if case["compiled"] else []
    numbers = ("", "", "") if case["kind"] == "floor" else (str(case["r"]), f"{case['p']:g}", case["adapter"])
    return (", ".join(words), *numbers)
