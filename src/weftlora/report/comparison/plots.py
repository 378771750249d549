"""Charts of a comparison as Vega-Lite specifications, plain data in and plain data out; with the page's part on how methods learn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from weftlora.compare.record import Comparison, Interval
from weftlora.report import charts
from weftlora.report.charts import ACCENT, GREY, ROW, WARM, Pick, Rows, Spec, tooltip
from weftlora.report.comparison.elements import (
    ONE_SEED,
    Cell,
    Chart,
    Column,
    Line,
    Metric,
    Part,
    Sheet,
    between,
    interval,
    metric,
    of_method,
    possible,
)

VERDICTS = {"better": ACCENT, "worse": WARM, "not settled": GREY, "no verdict": GREY}
PALETTE = ["#1b9c8c", "#d9733f", "#5a7fd0", "#c15a98", "#b0932a", "#6a8f4d", "#8c6cc8", "#c2564e"]
SHAPES = ["circle", "square", "diamond"]
DASHES = [[1, 0], [6, 3], [2, 2]]
"""A second and a third round of the palette are told apart by these."""
PHONE = 280
"""Pixels that a phone leaves for a legend."""


def forest_rows(
    name: str, kind: str, gap: Interval, seeds: Mapping[int, float], how: Metric, **more: Any
) -> list[dict[str, Any]]:
    """The mean of a method and its seeds, for `forest`."""
    whole = {"name": name, "kind": kind, "value": how.drawn(gap.mean), "said": how.gap(gap.mean), "of": "mean", **more}
    if gap.low is not None and gap.high is not None:
        whole |= {"low": how.drawn(gap.low), "high": how.drawn(gap.high)}
    whole |= {"interval": between(gap, how.gap) or ONE_SEED, "n": gap.n}
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
    # the order as a domain: "sort" would write the names into an expression, which not every name survives
    y = {"field": "name", "type": "nominal", "sort": None, "scale": {"domain": names}, "title": None}
    x = {"field": "value", "type": "quantitative", "title": title, "axis": {"tickCount": 6}, "scale": {"nice": True}}
    says = tooltip(
        ("name", "method", None),
        ("said", "difference", None),
        ("interval", "interval", None),
        ("n", "seeds", "d"),
        ("kind", "verdict", None),
    )
    one = tooltip(("name", "method", None), ("seed", "seed", "d"), ("said", "difference", None))
    bar: Spec = {"type": "rule", "size": 3, "opacity": 0.7}
    drawn: Spec = {"y": y, "color": colour}
    layers: list[Spec] = [
        {"mark": {"type": "rule", "color": GREY, "tooltip": None}, "encoding": {"x": {"datum": 0}}},
        *_where(rows, "low", bar, {**drawn, "x": {**x, "field": "low"}, "x2": {"field": "high"}, "tooltip": says}),
        {
            "transform": [{"filter": "datum.of === 'seed'"}],
            "mark": {"type": "point", "filled": True, "size": 20, "opacity": 0.75, "yOffset": 8},
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
    scales: dict[str, Sequence[Any]] = {"color": PALETTE, "shape": SHAPES, "strokeDash": DASHES}
    rounds = scales[channel]
    at = {name: n if channel == "color" else n // len(PALETTE) for n, name in enumerate(others)}
    grey = GREY if channel == "color" else rounds[0]
    columns = PHONE // (7 * max(map(len, names)) + 26)
    legend: Spec = {"columns": min(max(columns, 1), 4), "labelLimit": PHONE - 40, "symbolOpacity": 1}
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


def reach(rows: Rows, mean: str, low: str, high: str, log: bool = False) -> Spec:
    """A scale as far as the means go, and their intervals where these are not much wider; what is longer is cut off."""
    to, back = (math.log, math.exp) if log else (float, float)
    means = [to(row[mean]) for row in rows]
    first, last = min(means), max(means)
    span = (last - first) or abs(last) or 1.0
    ends = [row[end] for row in rows for end in (low, high) if end in row]
    known = [to(end) for end in ends if not log or end > 0]
    least = max(min([*known, first]), first - span)
    most = min(max([*known, last]), last + span)
    pad = 0.06 * (most - least) or 0.06 * span
    scale: Spec = {"type": "log"} if log else {"zero": False}
    return {**scale, "domain": [back(least - pad), back(most + pad)], "nice": False}


def cut(rows: Rows, scale: Spec, *fields: str) -> list[dict[str, Any]]:
    """The rows, where what a logarithmic scale has no place for (0 and below) ends where the scale does."""
    least = scale["domain"][0] if scale.get("type") == "log" else -math.inf
    return [{**row, **{field: max(row[field], least) for field in fields if field in row}} for row in rows]


def is_wide(values: Iterable[float], times: float) -> bool:
    """Whether small values are told apart from large ones only on a logarithmic scale."""
    least, most = min(held := list(values)), max(held)
    return least > 0 and most > times * least


def _faded(full: float) -> Spec:
    return {"condition": {"param": "picked", "value": full}, "value": full / 8}


def costs(rows: Rows, names: Sequence[str], baseline: str, x: Spec, y: Spec, says: list[Spec]) -> Spec:
    """A score against a cost: `x` and `y` with intervals (`x_low` … `y_high`), and the front of those with `front`."""
    colour, shape = _named(names, baseline, "color"), _named(names, baseline, "shape")
    bar: Spec = {"type": "rule", "size": 1.5, "clip": True}
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


def curves(rows: Rows, names: Sequence[str], baseline: str, pick: Pick, says: list[Spec], title: str) -> Spec:
    """`value` by `step` and `name`, in a band from `low` to `high`."""
    colour, dash = _named(names, baseline, "color"), _named(names, baseline, "strokeDash")
    log = is_wide((row["value"] for row in rows), 20)
    x = charts.quantity("step", "optimiser step", nice=False, zero=False)
    scale = reach(rows, "value", "low", "high", log)
    y = charts.quantity("value", title, "~g" if log else None, **scale)
    x["axis"]["grid"] = False
    within = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour, "opacity": _faded(0.16)}
    band = _where(rows, "low", {"type": "area", "clip": True, "tooltip": None}, within)
    line = {
        "params": [PICKED],
        "mark": {"type": "line", "size": 1.8, "point": {"size": 18}},
        "encoding": {"x": x, "y": y, "color": colour, "strokeDash": dash, "opacity": _faded(1), "tooltip": says},
    }
    shown = cut(rows, scale, "low")
    return charts.spec(shown, 280, params=pick[0], transform=pick[1], layer=[*band, line])


def beside_the_baseline(names: Sequence[str]) -> Pick:
    """A drop-down list of one method, shown beside the baseline (rows with `base`), or all."""
    bind = {"input": "select", "options": ["all", *names], "name": "Method "}
    shown = "method === 'all' || datum.name === method || datum.base"
    return [{"name": "method", "value": "all", "bind": bind}], [{"filter": shown}]


WHAT = {"training loss": "loss", "validation loss": "validation_loss"}
SHOWN = 6
"""Steps of a curve in the table."""
POINTS = 80
"""Points of a curve that are drawn; of a longer one an even choice, with its last."""


def learning_curves(found: Comparison) -> Iterator[Part]:
    """Learning curves of all methods that have one."""
    rows = [
        row for what, key in WHAT.items() for method in found.methods for row in _curve(found, method.name, what, key)
    ]
    if not rows:
        return
    names = [method.name for method in found.methods if any(row["name"] == method.name for row in rows)]
    says = tooltip(
        ("name", "method", None),
        ("step", "step", ",d"),
        ("value", "loss", ".4f"),
        ("interval", "interval", None),
        ("n", "seeds", "d"),
    )
    whats = [what for what in WHAT if any(row["what"] == what for row in rows)]
    picks = charts.drop_downs(charts.drop_down("what", "Show", whats, "what"), beside_the_baseline(names))
    chart = curves(rows, names, found.baseline, picks, says, "loss")
    what_is_drawn = (
        "Means over seeds in bands of their intervals, cut off where they are wide."
        if len(found.seeds) > 1
        else "One seed of each."
    )
    lead = (
        f"{what_is_drawn} Pick a method in the list to see it beside "
        f"{found.baseline}; click in the legend to pick several, double-click to show all again."
    )
    what = " and ".join(whats).capitalize()
    alt = f"{what} of {', '.join(names)} over optimiser steps"
    yield Part("curves", "Learning curves", lead, [Chart(what, alt, chart)], _sheet(found, rows, names), folded=True)


def _curve(found: Comparison, name: str, what: str, key: str) -> Iterator[dict[str, Any]]:
    at: dict[int, list[float]] = {}
    for outcome in found.of(name):
        for point in outcome.curve if outcome.status == "complete" else []:
            if math.isfinite(value := point.get(key, math.nan)):
                at.setdefault(int(point["step"]), []).append(value)
    text = metric("loss").text
    for step in _thinned(sorted(at)):
        if (measured := interval(at[step])) is not None:
            whole = possible(measured)
            row = {
                "name": name,
                "what": what,
                "step": step,
                "value": whole.mean,
                "n": whole.n,
                "base": name == found.baseline,
            }
            row["interval"] = between(whole, text) or ONE_SEED
            if whole.low is not None and whole.high is not None:
                row |= {"low": whole.low, "high": whole.high}
            yield row


def _sheet(found: Comparison, rows: list[dict[str, Any]], names: list[str]) -> Sheet:
    """The curves at a few steps."""
    lines, text = [], metric("loss").text
    links = {name: of_method(found, name, "runs") for name in names}
    for what in WHAT:
        steps = sorted({row["step"] for row in rows if row["what"] == what})
        at = {(row["name"], row["step"]): row for row in rows if row["what"] == what}
        for step in sorted({steps[(len(steps) - 1) * n // (SHOWN - 1)] for n in range(SHOWN)}) if steps else []:
            cells = [Cell(what, order=what), Cell(f"{step:,}", order=step)]
            held = [at.get((name, step)) for name in names]
            cells += [
                Cell("–")
                if row is None
                else Cell(text(row["value"]), row["interval"], row["value"], links[row["name"]])
                for row in held
            ]
            lines.append(Line("", "", cells))
    columns = [Column("what", number=False), Column("step"), *map(Column, names)]
    return Sheet("Learning curves", columns, lines)


def _thinned(steps: list[int]) -> list[int]:
    every = -(-len(steps) // POINTS)
    return sorted({*steps[::every], steps[-1]}) if steps else []
