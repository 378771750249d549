"""The plots of the README and of the method pages, from committed records.

python scripts/plots.py            writes docs/images/comparison.svg, step.svg, measured-METHOD.svg and the maps
python scripts/plots.py --check    says whether they are those of the committed records
python scripts/plots.py --routers  trains HydraLoRA on the demo (a minute) and writes evidence/routers.json

Both are read on a light page and on a dark one: nothing is behind them, and their text is grey.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import evidence_page
from docs_bench import recipe_of

import claims

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
EVIDENCE = ROOT / "evidence"
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
    "padding": {"left": 24, "right": 12, "top": 5, "bottom": 5},
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
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
Draw = Callable[[dict[str, Any]], dict[str, Any]]
"""Makes a Vega-Lite specification of records."""


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
        "$schema": SCHEMA,
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
        "$schema": SCHEMA,
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


WHERE = {"demo": "demo", "e2e": "E2E", "sst2": "SST-2"}
"""What a task is called beside a point."""
CONTROLS = {
    "as many random moves": "random moves",
    "random directions": "random directions",
    "a start along random directions": "random directions",
    "as many random blocks": "random blocks",
    "random blocks": "random blocks",
}
"""What a control that is not plain LoRA is called in a legend."""


def measured(claim: claims.Claim) -> Draw:
    """What draws the differences of a method to plain LoRA and to its random control: a point per row of docs/evidence.md."""

    def draw(records: dict[str, Any]) -> dict[str, Any]:
        found = [evidence_page.judge(contrast, records[contrast.file]) for contrast in claim.contrasts]
        several = len({contrast.setting for contrast in claim.contrasts}) > 1
        values = [
            {
                "where": ", ".join([WHERE[each.contrast.task], *(_setting(each.contrast) if several else [])]),
                "against": CONTROLS.get(each.contrast.control.name, "LoRA"),
                "unit": "nats" if each.metric == "loss" else "points",
                **{at: getattr(each.gap, at) * (1 if each.metric == "loss" else 100) for at in ("low", "mean", "high")},
            }
            for each in found
        ]
        controls = list(dict.fromkeys(value["against"] for value in values))
        panels = [
            _differences([value for value in values if value["unit"] == unit], title, controls)
            for unit, title in (
                ("nats", "difference in loss (nats): left of 0 is better"),
                ("points", "difference in accuracy (points): right of 0 is better"),
            )
            if any(value["unit"] == unit for value in values)
        ]
        n = {each.gap.n for each in found}
        return {
            "$schema": SCHEMA,
            "title": {
                "text": f"{claim.method}: difference to {' and to '.join(controls)}",
                "subtitle": f"paired by seed, n = {', '.join(map(str, sorted(n)))}, intervals of 95%; "
                "one that contains 0 decides nothing",
                "anchor": "start",
            },
            "vconcat": panels,
            "config": CONFIG,
        }

    return draw


def _setting(contrast: claims.Contrast) -> list[str]:
    method = {"init": "Init", "lora_init": "Init", "tsd": "TSD", "lora_tsd": "TSD"}.get(contrast.ours.name)
    setting = contrast.setting.replace("equal trainable parameters", "150 steps").removeprefix("search ")
    return [each for each in (method, setting) if each]


def _differences(values: list[dict[str, Any]], title: str, controls: list[str]) -> dict[str, Any]:
    """A panel: a line per setting, a point with its interval per control."""
    order = list(dict.fromkeys(value["where"] for value in values))
    y = {"field": "where", "type": "nominal", "sort": order, "title": None}
    shared: dict[str, Any] = {
        "y": y,
        "yOffset": {"field": "against", "type": "nominal", "sort": controls},
        "color": {
            "field": "against",
            "type": "nominal",
            "title": "difference to",
            "scale": {"domain": controls, "range": [OURS, STOCK][: len(controls)]},
            "legend": {"orient": "top"} if len(controls) > 1 else None,
        },
    }
    low = {"field": "low", "type": "quantitative", "title": title, "axis": {"tickCount": 6}}
    return {
        "data": {"values": values},
        "width": 420,
        "height": {"step": 26},
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 4], "color": GREY}, "encoding": {"x": {"datum": 0}}},
            {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {**shared, "x": low, "x2": {"field": "high"}}},
            {"mark": {"type": "point", "filled": True, "size": 60}, "encoding": {**shared, "x": {**low, "field": "mean"}}},
        ],
    }  # fmt: skip


def ranks(records: dict[str, Any]) -> dict[str, Any]:
    """Where ALoRA's slots went: the mean final rank of every module, on two tasks."""
    panels = []
    for task, title in (("demo", "demo tasks"), ("e2e", "E2E")):
        [found] = [each for each in records["alora-runs"]["tasks"] if each["task"] == task]
        runs = [dict(run["ranks"]) for run in found["runs"] if run["variant"] == "shortlist"]
        values = []
        for name in runs[0]:
            block, _, kind = name.removeprefix("model.layers.").partition(".")
            values.append(
                {"block": int(block), "module": kind.rpartition(".")[2], "rank": fmean(run[name] for run in runs)}
            )
        panels.append(
            _map(values, "block", "module", "rank", {"text": title, "subtitle": f"mean of {len(runs)} seeds"}, [0, 8])
        )
    return {
        "$schema": SCHEMA,
        "title": {"text": "Final rank of every module, from 4 in each", "anchor": "start"},
        "hconcat": panels,
        "config": CONFIG,
    }


def _map(
    values: list[dict[str, Any]], x: str, y: str, field: str, title: Any, domain: list[float], digits: str = ".1f"
) -> dict[str, Any]:
    """A map of cells with their numbers; the colours are readable on a light page and on a dark one."""
    across = {"field": x, "type": "ordinal", "axis": {"labelAngle": 0}}
    down = {"field": y, "type": "nominal", "title": None, "sort": list(dict.fromkeys(value[y] for value in values))}
    scale = {"domain": domain, "range": ["#f3d9c9", "#e7f0ef", "#1f6f69"] if domain[0] == 0 else ["#e7f0ef", "#1f6f69"]}
    text = {"condition": {"test": f"datum.{field} > {domain[-1] * 0.72}", "value": "white"}, "value": "#222"}
    cell = {"field": field, "type": "quantitative"}
    return {
        "title": title,
        "data": {"values": values},
        "height": {"step": 24},
        "width": {"step": 44},
        "layer": [
            {"mark": "rect", "encoding": {"x": across, "y": down, "color": {**cell, "scale": scale, "legend": None}}},
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {"x": across, "y": down, "text": {**cell, "format": digits}, "color": text},
            },
        ],
    }  # fmt: skip


def selected(records: dict[str, Any]) -> dict[str, Any]:
    """Which blocks Flexora selected on the demo: seed by seed, at the training's rate and at a tenth of it."""
    [found] = [each for each in records["flexora-runs"]["tasks"] if each["task"] == "demo"]
    panels: list[dict[str, Any]] = []
    scale = {"domain": ["selected", "left out"], "range": [OURS, "#80808020"]}
    for kind, title in (("block", "search at the training's rate"), ("block-slow", "at a tenth of it")):
        searches = [each for each in found["searches"] if each["kind"] == kind]
        values = [
            {
                "block": block,
                "seed": str(each["seed"]),
                "state": "selected" if block in each["layers"]["flexora"] else "left out",
            }
            for each in searches
            for block in range(len(each["groups"]))
        ]
        panels.append(
            {
                "title": title,
                "data": {"values": values},
                "width": {"step": 40},
                "height": {"step": 24},
                "mark": {"type": "rect", "stroke": GREY, "strokeWidth": 1},
                "encoding": {
                    "x": {"field": "block", "type": "ordinal", "axis": {"labelAngle": 0}},
                    "y": {"field": "seed", "type": "ordinal"},
                    "color": {"field": "state", "type": "nominal", "title": None, "scale": scale},
                },
            }
        )  # fmt: skip
    return {
        "$schema": SCHEMA,
        "title": {"text": "Blocks that the search selects, demo tasks", "anchor": "start"},
        "hconcat": panels,
        "config": CONFIG,
    }


def routers(records: dict[str, Any]) -> dict[str, Any]:
    """How much of every head a token gets, by the kind of row: the modules whose routers tell kinds apart most."""
    record = records["routers"]
    panels = []
    for name, domains in list(record["modules"].items())[:3]:
        values = [
            {"head": str(head), "rows": domain, "gate": gate}
            for domain, gates in domains.items()
            for head, gate in enumerate(gates)
        ]
        panels.append(
            _map(
                values,
                "head",
                "rows",
                "gate",
                name.removeprefix("model.layers."),
                [0.0, 1 / record["heads"], 1.0],
                ".2f",
            )
        )
    return {
        "$schema": SCHEMA,
        "title": {
            "text": "Mean weight of every head, by kind of row",
            "subtitle": f"{record['rows']} validation rows of the demo, {record['steps']} steps, one seed; "
            f"the {len(panels)} modules that differ most",
            "anchor": "start",
        },
        "hconcat": panels,
        "config": CONFIG,
    }


@dataclass(frozen=True)
class Plot:
    """An image: the committed records it is made of, and what draws it of their contents by name."""

    records: tuple[Path, ...]
    draw: Draw
    code: tuple[Path, ...] = ()
    """What else decides how it looks, beside this script."""


def _alone(draw: Draw) -> Draw:
    return lambda records: draw(next(iter(records.values())))


PLOTS = {
    "step": Plot((ROOT / "bench" / "step.json",), _alone(chart)),
    "comparison": Plot((EVIDENCE / "demo.json",), _alone(comparison)),
    "ranks": Plot((EVIDENCE / "alora-runs.json",), ranks),
    "selected": Plot((EVIDENCE / "flexora-runs.json",), selected),
    "routers": Plot((EVIDENCE / "routers.json",), routers),
    **{
        f"measured-{claim.card}": Plot(
            tuple(EVIDENCE / f"{name}.json" for name in dict.fromkeys(contrast.file for contrast in claim.contrasts)),
            measured(claim),
            (Path(claims.__file__),),
        )
        for claim in claims.CLAIMS
    },
}
"""Name of the image → its records, and what draws it."""


def digest(name: str) -> str:
    """Of the records and of the code: what the plot depends on."""
    plot = PLOTS[name]
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in (*plot.records, *plot.code, Path(__file__)))
    ).hexdigest()[:16]


def is_current(name: str) -> bool:
    """Whether the committed plot is that of the committed record."""
    plot = IMAGES / f"{name}.svg"
    return plot.is_file() and f"made from {digest(name)}" in plot.read_text(encoding="utf-8")


def measure_routers(steps: int = 300) -> None:
    """Train HydraLoRA on the demo's four kinds of rows, and save what its routers give every kind."""
    import tempfile

    import weftlora

    with tempfile.TemporaryDirectory() as folder:
        weftlora.train("hydralora", f"train.steps={steps}", "adapter.r=8", f"out={folder}/run")
        found = weftlora.inspect(f"{folder}/run").record()
    modules = {
        each["site"]: {name: [round(gate, 4) for gate in of["mean"]] for name, of in each["domains"].items()}
        for each in found["routers"]["sites"]
    }
    spread = {name: max(map(_spread, zip(*domains.values(), strict=True))) for name, domains in modules.items()}
    record = {
        "command": "python scripts/plots.py --routers",
        "versions": f"weftlora {weftlora.__version__}",
        "steps": steps,
        "rows": found["routers"]["rows"],
        "heads": len(next(iter(next(iter(modules.values())).values()))),
        "modules": {name: modules[name] for name in sorted(modules, key=lambda name: -spread[name])},
    }
    (EVIDENCE / "routers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _spread(values: tuple[float, ...]) -> float:
    return max(values) - min(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a plot is not its record's")
    parser.add_argument(
        "--routers", action="store_true", help="measure what the routers of a run do, and write that alone"
    )
    given = parser.parse_args()
    if given.check:
        return 0 if all(map(is_current, PLOTS)) else 1
    if given.routers:
        measure_routers()
        return 0
    import vl_convert

    for name, plot in PLOTS.items():
        records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in plot.records}
        svg = vl_convert.vegalite_to_svg(json.dumps(plot.draw(records)))
        (IMAGES / f"{name}.svg").write_text(f"{svg.rstrip()}\n<!-- made from {digest(name)} -->\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
