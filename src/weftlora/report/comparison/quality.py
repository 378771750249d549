"""Quality against what it costs: trained numbers, and CPU seconds of training; with the front of what nothing beats in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from weftlora.compare.record import Comparison, Interval, Outcome
from weftlora.report import charts
from weftlora.report.charts import Spec, tooltip
from weftlora.report.comparison import drawing
from weftlora.report.comparison.parts import Chart, Part
from weftlora.report.comparison.results import ranking
from weftlora.report.comparison.spread import interval
from weftlora.report.comparison.wording import between, count, figures, is_frozen, listed, metric, possible

Text = Callable[[float], str]


def quality(found: Comparison) -> Iterator[Part]:
    """A chart per cost, where at least two methods are known by it."""
    how = metric(found.metric)
    costs: list[tuple[str, str, Mapping[str, Interval], Text]] = [
        ("trained numbers", f"{how.title.capitalize()} and trained numbers", trained(found), count),
        (
            "CPU seconds of training",
            f"{how.title.capitalize()} and time",
            seconds(found),
            lambda value: f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s",
        ),
    ]
    shown, fronts = [], []
    for what, title, cost, text in costs:
        points = _points(found, cost, text)
        if len(points) > 1:
            best = front(points, found.higher_is_better)
            for point in points:
                point["front"] = point["name"] in best
            alt = f"{how.title} against {what}; no method is both cheaper and better than {listed(best)}"
            shown.append(Chart(title, alt, _chart(found, points, what)))
            fronts.append(f"by {what}, {listed(best)}")
    if shown:
        many = len(found.seeds) > 1
        bars = (
            "Bars are intervals over seeds; where they overlap, neither need be better."
            if many
            else "It is of one seed."
        )
        lead = (
            f"No other method is both cheaper and better than those on the dashed line: {'; '.join(fronts)}. "
            f"{bars}{_frozen(found)}"
        )
        yield Part("quality", "Quality and cost", lead, shown)


def trained(found: Comparison) -> dict[str, Interval]:
    """Trained numbers of every method."""
    given = {m.name: Interval(m.parameters, None, None, 1) for m in found.methods if m.parameters is not None}
    return _over_runs(found, lambda outcome: next(iter(figures([outcome], "trained")), None)) | given


def seconds(found: Comparison) -> dict[str, Interval]:
    """CPU seconds of training: its steps, and those that a search before it was worth."""

    def of(outcome: Outcome) -> float | None:
        each, searched = figures([outcome], "cpu_per_step"), figures([outcome], "search_steps")
        return each[0] * (found.method(outcome.method).steps + sum(searched)) if each else None

    return _over_runs(found, of)


def _over_runs(found: Comparison, number: Callable[[Outcome], float | None]) -> dict[str, Interval]:
    held: dict[str, Interval] = {}
    for method in found.methods:
        complete = [o for o in found.of(method.name) if o.status == "complete"]
        if (whole := interval([value for o in complete if (value := number(o)) is not None])) is not None:
            held[method.name] = whole
    return held


def _points(found: Comparison, cost: Mapping[str, Interval], text: Text) -> list[dict[str, Any]]:
    how = metric(found.metric)
    points = []
    for row in ranking(found):
        if row.score is None or row.name not in cost or is_frozen(found, row.name):
            continue
        x, y = possible(cost[row.name]), how.possible(row.score)
        point = {"name": row.name, "x": x.mean, "y": how.drawn(y.mean), "cost": text(x.mean), "n": y.n}
        point |= {"score": how.text(y.mean), "interval": between(y, how.text)}
        if y.low is not None and y.high is not None:
            point |= {"y_low": how.drawn(y.low), "y_high": how.drawn(y.high)}
        if x.low is not None and x.high is not None and x.high > x.low:
            point |= {"x_low": x.low, "x_high": x.high}
        points.append(point)
    return points


def front(points: list[dict[str, Any]], higher: bool) -> list[str]:
    """The names of those that no other is at least as cheap and as good as, and better in one; cheapest first.

    >>> front([{"name": "a", "x": 1, "y": 3}, {"name": "b", "x": 2, "y": 2}, {"name": "c", "x": 2, "y": 4}], higher=False)
    ['a', 'b']
    """
    sign = -1 if higher else 1
    at = {point["name"]: (point["x"], sign * point["y"]) for point in points}
    beaten = {n for n, (x, y) in at.items() if any(u <= x and v <= y and (u, v) != (x, y) for u, v in at.values())}
    return sorted(at.keys() - beaten, key=lambda name: (*at[name], name))


def _chart(found: Comparison, points: list[dict[str, Any]], what: str) -> Spec:
    how, names = metric(found.metric), [method.name for method in found.methods if not is_frozen(found, method.name)]
    shown = [name for name in names if any(point["name"] == name for point in points)]
    says = tooltip(
        ("name", "method", None),
        ("score", how.title, None),
        ("interval", "interval", None),
        ("n", "seeds", "d"),
        ("cost", what, None),
    )
    x, y = (
        _axis(points, field, title) for field, title in (("x", what), ("y", f"{how.title}{how.unit} ({how.direction})"))
    )
    drawn = drawing.cut(drawing.cut(points, x["scale"], "x_low"), y["scale"], "y_low")
    return drawing.costs(drawn, shown, found.baseline, x, y, says)


def _axis(points: list[dict[str, Any]], field: str, title: str) -> Spec:
    log = drawing.is_wide((point[field] for point in points), 8)
    form = "~s" if max(point[field] for point in points) >= 10_000 else "~g" if log else None
    return charts.quantity(field, title, form, **drawing.reach(points, field, f"{field}_low", f"{field}_high", log))


def _frozen(found: Comparison) -> str:
    """Where the frozen base stands; on the chart it would leave no room for the others."""
    how = metric(found.metric)
    scores = [row.score for row in found.rows if is_frozen(found, row.name) and row.score]
    return f" The frozen base, at {how.text(scores[0].mean)}, is not drawn." if scores else ""
