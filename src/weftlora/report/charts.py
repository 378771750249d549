"""Charts as Vega-Lite specifications: plain data in, plain data out, nothing drawn here.

Colours of marks are fixed and stand on light and dark ground alike; text, axes and grids take theirs from the page's style sheet.
Strength is shown as the opacity of one colour, so that a small value fades into whichever ground there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]
Rows = Sequence[dict[str, Any]]
Pick = tuple[list[Spec], list[Spec]]
"""(params, transform) of a drop-down list."""

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name: nothing is fetched
ACCENT = "#1b9c8c"
WARM = "#d9733f"
GREY = "#87909a"
HEADS = ["#1b9c8c", "#d9733f", "#5a7fd0", "#c15a98", "#b0932a", "#6a8f4d", "#8c6cc8", "#469fc2", "#c2564e", "#87909a"]
KINDS = {"chosen": WARM, "other direction": ACCENT, "router": ACCENT, "selected": ACCENT, "not selected": GREY}
"""Colours of the kinds of things that are told apart."""
ROW = 22
"""Pixels of height per row of a chart with rows."""

CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelLimit": 150,
        "domain": False,
        "ticks": False,
        "labelPadding": 5,
        "titlePadding": 7,
    },
    "axisX": {"labelOverlap": "parity"},
    "legend": {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "orient": "top",
        "symbolType": "circle",
    },
}


def spec(rows: Rows, height: int, **parts: Any) -> Spec:
    """A whole chart as wide as its place on the page."""
    return {
        "$schema": SCHEMA,
        "config": CONFIG,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(rows)},
        **parts,
    }


def tooltip(*fields: tuple[str, str, str | None]) -> list[Spec]:
    """What a mark says when pointed at: (field, title, number format or None for text)."""
    return [
        {"field": field, "title": title, "type": "quantitative", "format": form}
        if form
        else {"field": field, "title": title, "type": "nominal"}
        for field, title, form in fields
    ]


def drop_down(name: str, label: str, options: Sequence[str], field: str) -> Pick:
    """A drop-down list that picks the rows whose `field` is the chosen one."""
    bind = {"input": "select", "options": list(options), "name": f"{label} "}
    return [{"name": name, "value": options[0], "bind": bind}], [{"filter": f"datum.{field} === {name}"}]


def field_drop_down(name: str, label: str, fields: dict[str, str]) -> Pick:
    """A drop-down list of which of two fields is the `value`; their names by what the list calls them."""
    (first, one), (_, other) = fields.items()
    bind = {"input": "select", "options": list(fields), "name": f"{label} "}
    chosen = {"calculate": f"{name} === '{first}' ? datum.{one} : datum.{other}", "as": "value"}
    return [{"name": name, "value": first, "bind": bind}], [chosen]


def drop_downs(*picks: Pick) -> Pick:
    """Several drop-down lists above one chart."""
    return [p for params, _ in picks for p in params], [t for _, transform in picks for t in transform]


def _column_labels(columns: Sequence[str]) -> Spec:
    """An axis on top whose labels stand level where there is room for them, and else lean, or stand upright where they are many."""
    level = f"width / {len(columns)} > {7 * max(map(len, columns)) + 8}"
    lean, baseline = (-35, "bottom") if len(columns) <= 8 else (-90, "middle")
    return {
        "orient": "top",
        "labelOverlap": False,
        "labelAngle": {"expr": f"{level} ? 0 : {lean}"},
        "labelAlign": {"expr": f"{level} ? 'center' : 'left'"},
        "labelBaseline": {"expr": f"{level} ? 'bottom' : '{baseline}'"},
    }


def heatmap(
    rows: Rows,
    text_format: str,
    says: list[Spec],
    *,
    axes: tuple[str, str] = ("module", "block"),
    lowest: float | None = 0,
    pick: Pick = ([], []),
) -> Spec:
    """`value` by column and row, written into its cell where there is room; cells without a value are left out.

    Args:
        axes: the fields of column and row.
        lowest: the value that is faintest; None takes the least.
    """
    columns, lines = (list(dict.fromkeys(row[axis] for row in rows)) for axis in axes)
    values = [row["value"] for row in rows]
    least = min(values) if lowest is None else min(lowest, *values)
    strength = {"domain": [least, max([*values, least + 1e-12])], "range": [0.05, 0.8], "clamp": True}
    cell = {
        "mark": {"type": "rect", "color": ACCENT, "cornerRadius": 2},
        "encoding": {
            "opacity": {"field": "value", "type": "quantitative", "legend": None, "scale": strength},
            "tooltip": says,
        },
    }
    written = {
        "mark": {"type": "text", "fontSize": 10, "tooltip": None},
        "encoding": {"text": {"field": "value", "type": "quantitative", "format": text_format}},
    }
    gap, top = {"paddingInner": 0.06}, _column_labels(columns)
    encoding = {
        "x": {"field": axes[0], "type": "nominal", "sort": columns, "title": None, "axis": top, "scale": gap},
        "y": {"field": axes[1], "type": "nominal", "sort": lines, "title": axes[1], "scale": gap},
    }
    layers = [cell, written] if len(columns) <= 8 else [cell]
    return spec(rows, ROW * len(lines) + 8, params=pick[0], transform=pick[1], layer=layers, encoding=encoding)


def stacked(rows: Rows, pick: Pick, heads: int, says: list[Spec], title: str) -> Spec:
    """Shares of `head` side by side in every `block`; `title` names them."""
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    return spec(
        rows,
        ROW * len(blocks) + 8,
        params=pick[0],
        transform=pick[1],
        mark={"type": "bar", "height": {"band": 0.74}},
        encoding={
            "x": {
                "field": "value",
                "type": "quantitative",
                "stack": "zero",
                "scale": {"domain": [0, 1]},
                "title": title,
                "axis": {"format": ".0%"},
            },
            "y": {"field": "block", "type": "nominal", "sort": blocks, "title": "block"},
            "color": {
                "field": "head",
                "type": "ordinal",
                "scale": {"domain": list(range(1, heads + 1)), "range": [HEADS[n % len(HEADS)] for n in range(heads)]},
                "title": "head",
            },
            "order": {"field": "head", "type": "ordinal"},
            "tooltip": says,
        },
    )


def dots(rows: Rows, x: Spec, y: Spec, says: list[Spec], *, pick: Pick = ([], [])) -> Spec:
    """A point per row; `kind` gives it its colour, and which lie on top: the chosen ones."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    colour: Spec = {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": kinds, "range": [KINDS[kind] for kind in kinds]},
    }
    if len(kinds) < 2:
        colour["legend"] = None
    encoding = {"x": x, "y": y, "color": colour, "tooltip": says}
    mark = {"type": "point", "filled": True, "size": 55, "opacity": 0.75}
    on_top = sorted(rows, key=lambda row: row["kind"] == "chosen")
    return spec(on_top, 240, params=pick[0], transform=pick[1], mark=mark, encoding=encoding)


def clouds(rows: Rows, colour: str, shape: str, says: list[Spec], pick: Pick, size: int = 320) -> Spec:
    """A point per row at x and y, both on one scale, with a colour per `colour` and a shape per `shape`."""
    encoding = {
        "x": quantity("x", "first principal axis"),
        "y": quantity("y", "second principal axis"),
        "color": {"field": colour, "type": "nominal"},
        "shape": {"field": shape, "type": "nominal"},
        "tooltip": says,
    }
    mark = {"type": "point", "size": 60, "opacity": 0.8}
    return spec(rows, size, params=pick[0], transform=pick[1], mark=mark, encoding=encoding)


def lines(rows: Rows, pick: Pick, says: list[Spec], x: str, y: str) -> Spec:
    """`value` over `step`, a line per `name`; a click in the legend picks one out."""
    legend = {"name": "picked", "select": {"type": "point", "fields": ["name"]}, "bind": "legend"}
    encoding = {
        "x": {"field": "step", "type": "quantitative", "title": x, "axis": {"grid": False, "tickMinStep": 1}},
        "y": {"field": "value", "type": "quantitative", "title": y, "scale": {"zero": False}},
        "color": {
            "field": "name",
            "type": "nominal",
            "title": None,
            "sort": list(dict.fromkeys(row["name"] for row in rows)),
            "scale": {"range": HEADS},
            "legend": {"columns": 3, "labelLimit": 85},  # as wide as a phone
        },
        "opacity": {"condition": {"param": "picked", "value": 1}, "value": 0.12},
        "tooltip": says,
    }
    mark = {"type": "line", "interpolate": "step-after", "point": {"size": 40}}
    return spec(rows, 230, params=[*pick[0], legend], transform=pick[1], mark=mark, encoding=encoding)


def bars(rows: Rows, says: list[Spec], title: str) -> Spec:
    """`value` on either side of 0, by `name`; `kind` gives the colour."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    return spec(
        rows,
        ROW * len(names) + 8,
        mark={"type": "bar", "height": {"band": 0.7}},
        encoding={
            "x": {"field": "value", "type": "quantitative", "title": title},
            "y": {"field": "name", "type": "nominal", "sort": names, "title": None},
            "color": {
                "field": "kind",
                "type": "nominal",
                "title": None,
                "scale": {"domain": kinds, "range": [KINDS[kind] for kind in kinds]},
            },
            "tooltip": says,
        },
    )


def quantity(field: str, title: str, form: str | None = None, **scale: Any) -> Spec:
    """A numeric axis; without `domain`, as far as the values go."""
    axis: Spec = {"tickCount": 6, **({"format": form} if form else {})}
    if scale.get("type") == "log":
        axis["grid"] = False  # it would have a line for every digit
    return {"field": field, "type": "quantitative", "title": title, "axis": axis, "scale": scale or {"zero": False}}
