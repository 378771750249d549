"""The README's plots, from committed records: what a comparison found, and what a training step costs.

python scripts/plots.py            writes docs/images/comparison.svg and step.svg
python scripts/plots.py --check    says whether they are those of the committed records

Both are read on a light page and on a dark one: nothing is behind them, and their text is grey.
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
IMAGES = ROOT / "docs" / "images"
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
COMPARED = {
    "lora": "LoRA", "hydralora": "HydraLoRA", "tied_lora": "Tied-LoRA", "lora_dash": "LoRA-Dash", "lora_init": "LoRA-Init",
    "lora_tsd": "LoRA-TSD", "alora": "Allocating LoRA", "flexora": "Flexora", "peft:lora": "stock peft LoRA",
    "peft:adalora": "stock peft AdaLoRA",
}  # fmt: skip
OURS, STOCK, GREY = "#3d948e", "#c77152", "#808080"
CONFIG = {
    "font": "sans-serif",
    "background": None,
    "view": {"stroke": "#80808060"},
    "title": {"color": GREY, "subtitleColor": GREY},
    "axis": {
        "labelColor": GREY,
        "titleColor": GREY,
        "gridColor": "#80808040",
        "domainColor": GREY,
        "tickColor": GREY,
        "labelLimit": 300,
    },
    "header": {"labelColor": GREY, "titleColor": GREY},
    "legend": {"labelColor": GREY, "titleColor": GREY},
}
DTYPE = "bf16"


def comparison(record: dict[str, Any]) -> dict[str, Any]:
    """Scores of a comparison with their intervals, as a Vega-Lite specification; what is far worse than LoRA is left to the page."""
    found = {row["name"]: row["score"] for row in record["rows"] if row["name"] in COMPARED}
    near = {name: score for name, score in found.items() if score["high"] < 10 * found["lora"]["high"]}
    values = [
        {"method": COMPARED[name], "by": "stock peft" if name.startswith("peft:") else "weftlora", **score}
        for name, score in near.items()
    ]
    left_out = [COMPARED[name] for name in found if name not in near]
    n, level = values[0]["n"], values[0]["level"]
    y = {"field": "method", "type": "nominal", "sort": [*COMPARED.values()], "title": None}
    colour = _colour()
    note = f"; off the chart to the right: {', '.join(left_out)}" if left_out else ""
    spread = {"field": "low", "type": "quantitative", "title": "loss of the answers, lower is better"}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {
            "text": "The same number of trainable parameters, spent in several ways",
            "subtitle": f"the demo's tasks, n = {n} seeds, intervals of {level:.0%}{note}",
        },
        "data": {"values": values},
        "width": 480,
        "layer": [
            {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {"y": y, "x": spread, "x2": {"field": "high"}, "color": colour}},
            {
                "mark": {"type": "point", "filled": True, "size": 70},
                "encoding": {"y": y, "x": {**spread, "field": "mean"}, "color": colour},
            },
        ],
        "config": CONFIG,
    }  # fmt: skip


def _colour() -> dict[str, Any]:
    return {
        "field": "by",
        "type": "nominal",
        "title": None,
        "scale": {"domain": ["weftlora", "stock peft"], "range": [OURS, STOCK]},
        "legend": {"orient": "top"},
    }


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
    colour = _colour()
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
        "config": CONFIG,
    }  # fmt: skip


PLOTS = {"step": (ROOT / "bench" / "step.json", chart), "comparison": (ROOT / "evidence" / "demo.json", comparison)}
"""Name of the image → its record, and what draws it."""


def digest(name: str) -> str:
    """Of the record and of this script: what the plot depends on."""
    return hashlib.sha256(PLOTS[name][0].read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]


def is_current(name: str) -> bool:
    """Whether the committed plot is that of the committed record."""
    plot = IMAGES / f"{name}.svg"
    return plot.is_file() and f"made from {digest(name)}" in plot.read_text(encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a plot is not its record's")
    if parser.parse_args().check:
        return 0 if all(map(is_current, PLOTS)) else 1
    import vl_convert

    for name, (record, draw) in PLOTS.items():
        svg = vl_convert.vegalite_to_svg(json.dumps(draw(json.loads(record.read_text(encoding="utf-8")))))
        (IMAGES / f"{name}.svg").write_text(f"{svg.rstrip()}\n<!-- made from {digest(name)} -->\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
