"""The README's plot: a training step and what it saves, of weftlora's methods and of stock peft, from `bench/step.json`.

python scripts/bench_plot.py            writes docs/images/step.svg
python scripts/bench_plot.py --check    says whether it is that of the committed record
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from docs_bench import recipe_of

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "step.json"
PLOT = ROOT / "docs" / "images" / "step.svg"
NAMES = {
    "peft:lora": "stock peft LoRA r=16",
    "peft:lora bf16": "stock peft, bf16 adapters",
    "lora": "LoRA r=16",
    "hydralora": "HydraLoRA N=3 r=8",
    "tied_lora": "Tied-LoRA r=16",
    "lora_dash": "LoRA-Dash r=8 + 8",
    "alora": "ALoRA r=12 of 16",
    "flexora": "Flexora, gated r=16",
}
DTYPE = "bf16"


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per method and dropout: step time and saved bytes over the frozen base's."""
    found = []
    for row in record["cases"]:
        case = row["case"]
        recipe = recipe_of(case)
        kind = recipe if case["adapter"] == "fp32" else f"{recipe} {case['adapter']}"
        if row["dtype"] == DTYPE and kind in NAMES and not case["compiled"] and case["mask"] == "linear":
            by = "stock peft" if recipe == "peft:lora" else "weftlora"
            common = {"method": NAMES[kind], "dropout": f"dropout {case['p']:g}", "by": by}
            ratio = row["ratio"]
            found.append({**common, "what": "step time", **ratio})
            saved = row["saved_ratio"]
            found.append({**common, "what": "saved activations", "median": saved, "low": saved, "high": saved})
    return found


def chart(record: dict[str, Any]) -> dict[str, Any]:
    """The plot as a Vega-Lite specification."""
    order = list(NAMES.values())
    y = {"field": "method", "type": "nominal", "sort": order, "title": None}
    colour = {
        "field": "by",
        "type": "nominal",
        "title": None,
        "scale": {"domain": ["weftlora", "stock peft"], "range": ["#2f6f6b", "#b5654a"]},
        "legend": {"orient": "top"},
    }
    value = {
        "field": "median",
        "type": "quantitative",
        "title": "over the frozen base's step",
        "scale": {"zero": False, "domainMin": 0.9},
    }
    points = {"mark": {"type": "point", "filled": True, "size": 60}, "encoding": {"y": y, "x": value, "color": colour}}
    spread = {
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {"y": y, "x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}, "color": colour},
    }
    one = {"mark": {"type": "rule", "strokeDash": [4, 4], "color": "#888"}, "encoding": {"x": {"datum": 1}}}
    shape = record["setting"]["shape"]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "background": "white",
        "title": {
            "text": f"A training step on a {DTYPE} base, {shape['layers']} layers of width {shape['hidden']}",
            "subtitle": f"medians and quartiles of {record['setting']['rounds']} rounds, one CPU thread; 1 is the frozen base",
        },
        "data": {"values": rows(record)},
        "facet": {
            "row": {"field": "dropout", "type": "nominal", "title": None},
            "column": {"field": "what", "type": "nominal", "title": None, "sort": ["step time", "saved activations"]},
        },
        "spec": {"width": 300, "height": 145, "layer": [one, spread, points]},
        "config": {"font": "sans-serif", "view": {"stroke": "#ddd"}},
    }  # fmt: skip


def digest() -> str:
    """Of the record and of this script: what the plot depends on."""
    return hashlib.sha256(RECORD.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]


def is_current() -> bool:
    """Whether the committed plot is that of the committed record."""
    return PLOT.is_file() and f"made from {digest()}" in PLOT.read_text(encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the plot is not the record's")
    if parser.parse_args().check:
        return 0 if is_current() else 1
    import vl_convert

    svg = vl_convert.vegalite_to_svg(json.dumps(chart(json.loads(RECORD.read_text(encoding="utf-8")))))
    PLOT.parent.mkdir(exist_ok=True)
    PLOT.write_text(f"{svg.rstrip()}\n<!-- made from {digest()} -->\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
