"""How methods learn: training and validation loss over steps, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from weftlora.compare.record import Comparison
from weftlora.report import charts
from weftlora.report.charts import tooltip
from weftlora.report.comparison import drawing
from weftlora.report.comparison.parts import Cell, Chart, Column, Line, Part, Sheet, of_method
from weftlora.report.comparison.spread import interval
from weftlora.report.comparison.wording import between, metric, possible

WHAT = {"training loss": "loss", "validation loss": "validation_loss"}
SHOWN = 6
"""Steps of a curve in the table."""
POINTS = 80
"""Points of a curve that are drawn; of a longer one an even choice, with its last."""


def curves(found: Comparison) -> Iterator[Part]:
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
    picks = charts.together(charts.choice("what", "Show", whats, "what"), drawing.beside_the_baseline(names))
    chart = drawing.curves(rows, names, found.baseline, picks, says, "loss")
    what_is_drawn = (
        "Means over seeds in bands of their intervals, cut off where they are wide."
        if len(found.seeds) > 1
        else "One seed of each."
    )
    lead = (
        f"{what_is_drawn} The list picks a method to stand beside "
        f"{found.baseline}; clicks in the legend pick several, a double click shows all again."
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
            row["interval"] = between(whole, text)
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
