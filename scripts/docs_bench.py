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


def quantisers() -> tuple[Row, list[Row]]:
    """Head and rows: a quantiser each, what was executed on it and what came out."""
    found = record("quantisers")
    head = (
        *(
            "base",
            "train and reload",
            "resume",
            "rank, on the base",
            "rank, on the original",
            "checkpointing",
            "export",
        ),
        *("merge, quantised again", "merge, bfloat16", "merge, original", "evaluated: stock / here"),
    )
    rows = []
    for name, row in found["rows"].items():
        trained = {key.removeprefix("train "): row[key] for key in row if key.startswith("train ")}
        if "loss" not in trained["lora"]:
            rows.append((_base(name, row), f"refused: {_why(trained['lora'])}", *["no base"] * (len(head) - 2)))
            continue
        failed = [f"{method}: {_why(each)}" for method, each in trained.items() if "loss" not in each]
        methods = ", ".join(f"{method}" for method, each in trained.items() if "loss" in each)
        methods += f" (off by at most {max(each.get('off', 0.0) for each in trained.values()):.0e})"
        checked = [row[f"checkpointing {kind}"] for kind in ("reentrant", "non_reentrant")]
        rows.append(
            (
                _base(name, row),
                "; ".join([methods, *failed]),
                _cell(row["resume"], lambda each: "bit for bit" if each["same"] else "**differs**"),
                *(
                    _cell(row[f"rank on {on}"], lambda each: f"{each['shared']:.0%} shared")
                    for on in ("memory", "original")
                ),
                " / ".join(_cell(each, lambda one: f"{one['off']:.0e}" if one["off"] else "0") for each in checked),
                _cell(row["export"], lambda each: f"{each['error']:.0e}"),
                _cell(row["merge as it is"], lambda each: f"{each['lost']:.0%}"),
                *(_cell(row[f"merge {way}"], lambda each: f"{each['lost']:.1%}") for way in ("bfloat16", "original")),
                _cell(row["evaluated"], lambda each: f"{each['stock']:.2g} / {each['weftlora']:.2g}"),
            )
        )
    return head, rows


def _base(name: str, row: dict[str, Any]) -> str:
    """The name of a row, what its base is kept as, and its sides where it is not the bundled model."""
    sides = row.get("sides")
    own = f"random weights, {sides['hidden_size']} and {sides['intermediate_size']} wide" if sides else ""
    said = ", ".join(filter(None, (row.get("form"), own)))
    return f"`{name}`" + (f": {said}" if said else "")


def _cell(found: dict[str, Any], shown: Any) -> str:
    return f"refused: {_why(found)}" if {"refused", "fault"} & found.keys() else str(shown(found))


def _why(found: dict[str, Any]) -> str:
    """The sentence of a refusal; what is no sentence of ours is marked."""
    return str(found["refused"]) if "refused" in found else f"**fault**: {found.get('fault')}"


def qlora() -> tuple[Row, list[Row]]:
    """Head and rows: QLoRA training on the real model, stock peft's and ours."""
    cases = record("qlora")["cases"]
    rows = []
    for name, kept in cases.items():
        stock = cases[name.replace("weftlora", "stock")]
        rows.append(
            (
                f"`{name}`",
                f"{kept['peak_rss'] / 2**30:.2f} GiB",
                f"{kept['peak_rss'] / stock['peak_rss']:.2f}",
            )
        )
    return ("case", "peak RSS", "of stock's"), rows
