"""Comparisons small enough for a test: tiny bases, a few rows, a handful of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_bases as tiny


def recipe(top: Path, base: str = "llama", **more: Any) -> dict[str, Any]:
    """A comparison of plain LoRA and HydraLoRA in `top`/out, over two seeds of four steps, at one rate."""
    folder = top / base
    if not folder.exists():
        getattr(tiny, base)(folder)
    rows = tiny.classified() if base == "bert" else tiny.answers()
    data = {
        "train": str(tiny.write_rows(top / f"{base}-train.jsonl", rows[:40])),
        "validation": str(tiny.write_rows(top / f"{base}-validation.jsonl", rows[40:48])),
        "test": str(tiny.write_rows(top / f"{base}-test.jsonl", rows[48:])),
    }
    train = {"steps": 4, "batch_size": 4, "lr": 1e-2, "save_every": 2, "logging_every": 1} | more.pop("train", {})
    plain = {
        "model": str(folder),
        "data": data,
        "train": {key: value for key, value in train.items() if value is not None},
        "methods": ["lora", {"recipe": "hydralora", "heads": 2}],
        "budget": {"equal": "parameters", "r": 4},
        "seeds": 2,
        "out": str(top / "out"),
    }
    return plain | more


def quality(record: dict[str, Any]) -> str:
    """What must not depend on kills, folders or the number of runs at once: everything but times, memory and places."""
    kept = {key: value for key, value in record.items() if key not in ("folder", "machine")}
    kept["outcomes"] = [
        {key: value for key, value in outcome.items() if key != "figures"} for outcome in record["outcomes"]
    ]
    kept["rows"] = [{key: value for key, value in row.items() if key != "step_ratio"} for row in record["rows"]]
    return json.dumps(kept, sort_keys=True)
