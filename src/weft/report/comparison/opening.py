"""What a comparison comes to, and what it was: the sentences and facts at the top of its page."""

from __future__ import annotations

from collections.abc import Iterator

from weft.compare.record import Comparison, Row
from weft.report.comparison import drawing
from weft.report.comparison.parts import Part, of_method
from weft.report.comparison.spread import paired
from weft.report.comparison.wording import KINDS, Metric, between, counted, is_frozen, listed, metric


def overall(found: Comparison) -> str:
    """The plain sentence over all methods."""
    rows = contenders(found)
    how = metric(found.metric)
    better = sorted(_of(rows, "better"), key=lambda row: _gain(found, row), reverse=True)
    if not any(row.gap for row in rows):
        return f"There is nothing to say yet: no method and {found.baseline} have a complete run of the same seed."
    if all(row.verdict.kind == "single" for row in rows):
        return (
            f"No verdict: with one seed, a difference to {found.baseline} may be luck. Five seeds or more could tell."
        )
    if better:
        said = [f"{row.name} by {how.gap(abs(_gap(row))).lstrip('+')} {how.gap_unit}".strip() for row in better]
        verb = "is" if len(better) == 1 else "are"
        return f"Better than {found.baseline} in {how.title} {verb} {listed(said)}.{_worse(found, rows)}"
    return f"Nothing tried here is distinguishably better than {found.baseline}.{_worse(found, rows)}"


def _worse(found: Comparison, rows: list[Row]) -> str:
    worse = [row.name for row in _of(rows, "worse")]
    return f" {listed(worse)} {'is' if len(worse) == 1 else 'are'} worse." if worse else ""


def _of(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.verdict.kind == kind]


def _gap(row: Row) -> float:
    return row.gap.mean if row.gap else 0.0


def _gain(found: Comparison, row: Row) -> float:
    return _gap(row) if found.higher_is_better else -_gap(row)


def contenders(found: Comparison) -> list[Row]:
    """The rows of what competes: neither the baseline nor the frozen base."""
    return [row for row in found.rows if row.name != found.baseline and not is_frozen(found, row.name)]


def sentences(found: Comparison) -> list[tuple[str, str, str]]:
    """(kind, sentence, id of the method's runs) of every method but the baseline."""
    return [
        (KINDS[row.verdict.kind], row.verdict.sentence, of_method(found, row.name, "runs"))
        for row in found.rows
        if row.name != found.baseline
    ]


def facts(found: Comparison) -> Iterator[tuple[str, str]]:
    """What was compared, and how."""
    how = metric(found.metric)
    yield "model", found.model
    yield "data", f"{found.data} · {found.task}"
    yield "metric", f"{how.title}, {how.direction}, on test rows that nothing was chosen by"
    yield (
        "seeds",
        f"{counted(len(found.seeds), 'seed')}: {', '.join(map(str, found.seeds))}; differences are paired by seed",
    )
    yield "equal", found.budget
    yield "machine", found.machine
    yield "versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())
    levels = [row.gap.level for row in contenders(found) if row.gap and row.gap.low is not None]
    if levels:
        expected = sum(1 - level for level in levels)
        yield (
            "by chance",
            f"of {counted(len(levels), 'method')} that did nothing, about {expected:.2g} would be called better or worse",
        )


def warnings(found: Comparison) -> list[str]:
    """What a reader must know before believing the verdicts."""
    said = [] if found.complete else ["This comparison is not finished: some runs are missing."]
    lost = [o for o in found.outcomes if o.status in ("failed", "diverged")]
    if lost:
        names = list(dict.fromkeys(o.method for o in lost))
        said.append(
            f"{counted(len(lost), 'run')} did not end well ({listed(names)}); the runs are listed below, with why."
        )
    edges = [method.name for method in found.methods if method.rate_at_edge]
    if edges:
        said.append(
            f"The best learning rate of {listed(edges)} is the lowest or highest that was tried: a better one may lie outside."
        )
    return said + [f"{m.name}: {m.note}" for m in found.methods if m.note]


def differences(found: Comparison) -> Iterator[Part]:
    """Every method's difference to the baseline, seed by seed and on average."""
    how = metric(found.metric)
    rows: list[dict[str, object]] = []
    for row in sorted(contenders(found), key=lambda row: -_gain(found, row)):
        if row.gap is not None:
            rows += drawing.forest_rows(
                row.name, KINDS[row.verdict.kind], row.gap, paired(found, row.name, found.metric), how
            )
    if rows:
        chart = drawing.forest(rows, axis(found, how))
        level = next(row.gap.level for row in contenders(found) if row.gap)
        bar = f"; bars are {level:.0%} intervals" if any(row.get("low") is not None for row in rows) else ""
        said = [
            f"{row.name} {how.gap(row.gap.mean)} ({between(row.gap, how.gap)})" for row in contenders(found) if row.gap
        ]
        yield Part(
            "differences",
            f"Difference to {found.baseline}",
            f"Small dots are seeds, each beside {found.baseline} with the same seed{bar}. What lies {_good(found)} of the line is better.",
            [(f"Difference in {how.title} to {found.baseline}, by method: {'; '.join(said)}", chart)],
        )


def _good(found: Comparison) -> str:
    return "right" if found.higher_is_better else "left"


def axis(found: Comparison, how: Metric) -> str:
    """The title of an axis of differences."""
    unit = f", {how.gap_unit}" if how.gap_unit else ""
    return (
        f"← worse · {how.title}{unit} · better →"
        if found.higher_is_better
        else f"← better · {how.title}{unit} · worse →"
    )
