"""Charts of a comparison as Vega-Lite specifications: plain data in, plain data out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weft.compare.record import Interval
from weft.report import charts
from weft.report.charts import ACCENT, GREY, ROW, WARM, Pick, Rows, Spec, tooltip
from weft.report.comparison.wording import Metric, between

VERDICTS = {"better": ACCENT, "worse": WARM, "not settled": GREY, "no verdict": GREY}
PALETTE = ["#1b9c8c", "#d9733f", "#5a7fd0", "#c15a98", "#b0932a", "#6a8f4d", "#8c6cc8", "#c2564e"]
SHAPES = ["circle", "square", "diamond"]
DASHES = [[1, 0], [6, 3], [2, 2]]
"""A second and a third round of the palette are told apart by these."""
COLUMNS = {"expr": "max(1, floor(width / 165))"}
"""Of a legend, as many as there is room for."""


def forest_rows(
    name: str, kind: str, gap: Interval, seeds: Mapping[int, float], how: Metric, **more: Any
) -> list[dict[str, Any]]:
    """The mean of a method and its seeds, for `forest`."""
    whole = {"name": name, "kind": kind, "value": how.drawn(gap.mean), "said": how.gap(gap.mean), "of": "mean", **more}
    if gap.low is not None and gap.high is not None:
        whole |= {"low": how.drawn(gap.low), "high": how.drawn(gap.high)}
    whole |= {"interval": between(gap, how.gap), "n": gap.n}
    each = [
        {
            "name": name,
            "kind": kind,
            "value": how.drawn(value),
            "said": how.gap(value),
            "of": "seed",
            "seed": seed,
            **more,
        }
        for seed, value in seeds.items()
    ]
    return [whole, *each]


def forest(rows: Rows, title: str, pick: Pick = ([], [])) -> Spec:
    """Differences by `name` around 0: the mean with its interval, and every seed."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    kinds = [kind for kind in VERDICTS if any(row["kind"] == kind for row in rows)]
    colour: Spec = {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": kinds, "range": [VERDICTS[kind] for kind in kinds]},
        "legend": {"symbolOpacity": 1} if len(kinds) > 1 else None,
    }
    y = {"field": "name", "type": "nominal", "sort": names, "title": None}
    x = {"field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 6}, "scale": {"nice": True}}
    says = tooltip(
        ("name", "method", None),
        ("said", "difference", None),
        ("interval", "interval", None),
        ("n", "seeds", "d"),
        ("kind", "verdict", None),
    )
    one = tooltip(("name", "method", None), ("seed", "seed", "d"), ("said", "difference", None))
    bar: Spec = {"type": "rule", "size": 3, "opacity": 0.55}
    drawn: Spec = {"y": y, "color": colour}
    layers: list[Spec] = [
        {"mark": {"type": "rule", "color": GREY, "tooltip": None}, "encoding": {"x": {"datum": 0}}},
        *_where(rows, "low", bar, {**drawn, "x": {**x, "field": "low"}, "x2": {"field": "high"}, "tooltip": says}),
        {
            "transform": [{"filter": "datum.of === 'seed'"}],
            "mark": {"type": "point", "filled": True, "size": 22, "opacity": 0.5},
            "encoding": {**drawn, "x": x, "tooltip": one},
        },
        {
            "transform": [{"filter": "datum.of === 'mean'"}],
            "mark": {"type": "point", "filled": True, "size": 95, "opacity": 1},
            "encoding": {**drawn, "x": x, "tooltip": says},
        },
    ]
    return charts.spec(rows, (ROW + 6) * len(names) + 10, params=pick[0], transform=pick[1], layer=layers)


def _named(names: Sequence[str], baseline: str, channel: str) -> Spec:
    """A scale over methods: a colour each, the baseline grey; `channel` may be shape or strokeDash for further rounds."""
    others = [name for name in names if name != baseline]
    rounds: Sequence[Any] = {"color": PALETTE, "shape": SHAPES, "strokeDash": DASHES}[channel]
    at = {name: n if channel == "color" else n // len(PALETTE) for n, name in enumerate(others)}
    grey = GREY if channel == "color" else rounds[0]
    legend: Spec = {"columns": COLUMNS, "labelLimit": 140, "symbolOpacity": 1}
    if channel == "strokeDash":
        legend |= {"symbolType": "stroke", "symbolStrokeWidth": 2}
    return {
        "field": "name",
        "type": "nominal",
        "title": None,
        "scale": {
            "domain": list(names),
            "range": [grey if n == baseline else rounds[at[n] % len(rounds)] for n in names],
        },
        "legend": legend,
    }


def _where(rows: Rows, field: str, mark: Spec, encoding: Spec) -> list[Spec]:
    """A layer of the rows that have a field; none where none has it, for a scale without values complains."""
    layer = {"transform": [{"filter": f"isValid(datum.{field})"}], "mark": mark, "encoding": encoding}
    return [layer] if any(row.get(field) is not None for row in rows) else []


PICKED: Spec = {"name": "picked", "select": {"type": "point", "fields": ["name"], "toggle": "true"}, "bind": "legend"}
"""Clicks in the legend pick methods out, several in turn."""


def _faded(full: float) -> Spec:
    return {"condition": {"param": "picked", "value": full}, "value": full / 8}


def costs(rows: Rows, names: Sequence[str], baseline: str, x: Spec, y: Spec, says: list[Spec]) -> Spec:
    """A score against a cost: `x` and `y` with intervals (`x_low` … `y_high`), and the front of those with `front`."""
    colour, shape = _named(names, baseline, "color"), _named(names, baseline, "shape")
    bar = {"type": "rule", "size": 1.5}
    shared = {"color": colour, "opacity": _faded(0.7), "tooltip": says}
    layers: list[Spec] = [
        {
            "transform": [{"filter": "datum.front"}],
            "mark": {
                "type": "line",
                "interpolate": "step-after",
                "color": GREY,
                "strokeDash": [4, 3],
                "size": 1.5,
                "tooltip": None,
            },
            "encoding": {"x": x, "y": y, "order": {"field": "x", "type": "quantitative"}},
        },
        *_where(rows, "y_low", bar, {"x": x, "y": {**y, "field": "y_low"}, "y2": {"field": "y_high"}, **shared}),
        *_where(rows, "x_low", bar, {"y": y, "x": {**x, "field": "x_low"}, "x2": {"field": "x_high"}, **shared}),
        {
            "params": [PICKED],
            "mark": {"type": "point", "filled": True, "size": 90},
            "encoding": {"x": x, "y": y, **shared, "shape": shape, "opacity": _faded(1)},
        },
    ]
    return charts.spec(rows, 270, layer=layers)


def curves(
    rows: Rows, names: Sequence[str], baseline: str, pick: Pick, says: list[Spec], title: str, log: bool
) -> Spec:
    """`value` by `step` and `name`, in a band from `low` to `high`."""
    colour, dash = _named(names, baseline, "color"), _named(names, baseline, "strokeDash")
    x = {
        "field": "step",
        "type": "quantitative",
        "title": "optimiser step",
        "axis": {"grid": False},
        "scale": {"nice": False},
    }
    scale: Spec = {"type": "log", "nice": False} if log else {"zero": False}
    ticks: Spec = {"tickCount": 6, "format": "~g", "grid": not log}
    y = {
        "field": "value",
        "type": "quantitative",
        "title": title,
        "scale": scale,
        "axis": ticks,
    }
    within = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour, "opacity": _faded(0.16)}
    band = _where(rows, "low", {"type": "area", "tooltip": None}, within)
    line = {
        "params": [PICKED],
        "mark": {"type": "line", "size": 1.8, "point": {"size": 18}},
        "encoding": {"x": x, "y": y, "color": colour, "strokeDash": dash, "opacity": _faded(1), "tooltip": says},
    }
    return charts.spec(rows, 280, params=pick[0], transform=pick[1], layer=[*band, line])


def beside_the_baseline(names: Sequence[str]) -> Pick:
    """A drop-down list of one method, shown beside the baseline (rows with `base`), or all."""
    bind = {"input": "select", "options": ["all", *names], "name": "Method "}
    shown = "method === 'all' || datum.name === method || datum.base"
    return [{"name": "method", "value": "all", "bind": bind}], [{"filter": shown}]
