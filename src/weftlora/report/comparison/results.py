"""The table of results: a row per method, its scores and costs with their intervals, each leading to the runs behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from weftlora.compare.metrics import METRICS
from weftlora.compare.record import Comparison, Interval, Outcome, Row
from weftlora.report.comparison.parts import Cell, Column, Line, Part, Sheet, of_method
from weftlora.report.comparison.spread import interval, score
from weftlora.report.comparison.wording import (
    Metric,
    count,
    figures,
    kind_of,
    mean_cell,
    metric,
    possible,
    rate,
    size,
    spread_cell,
)


def results(found: Comparison) -> Part:
    """All methods, best first."""
    how, others = metric(found.metric), other_metrics(found)
    columns = [
        Column("method", number=False),
        Column(how.title, how.direction),
        Column("difference", f"to {found.baseline}"),
        Column("wins", "of its seeds"),
        *(Column(metric(name).title, metric(name).direction) for name in others),
        Column("rank"),
        Column("trained", "numbers"),
        Column("stored", "numbers"),
        Column("export", "on disk"),
        Column("learning rate", "chosen for it"),
        Column("step ratio", f"CPU, to {found.baseline}"),
        Column("training", "seconds"),
        Column("tokens/s"),
        Column("memory", "peak"),
    ]
    lines = [Line(row.name, kind_of(found, row), list(_cells(found, row, others))) for row in ranking(found)]
    level = next((row.score.level for row in found.rows if row.score), 0.95)
    means = (
        f"Means over seeds with {level:.0%} intervals."
        if len(found.seeds) > 1
        else "One seed: no number has an interval."
    )
    lead = (
        f"{means} Every number leads to the runs it comes from, every name to its recipe; a click on a heading sorts."
    )
    return Part("results", "Results", lead, sheet=Sheet("Results", columns, lines, filtered=True))


def ranking(found: Comparison) -> list[Row]:
    """The rows, best first; those without a score last."""
    sign = -1 if found.higher_is_better else 1
    return sorted(found.rows, key=lambda row: (row.score is None, sign * row.score.mean if row.score else 0.0))


def other_metrics(found: Comparison) -> list[str]:
    """The scores that runs have beside the metric of the verdicts, in the order of the metrics that are known."""
    names = {name for outcome in found.outcomes for name in outcome.scores} - {found.metric}
    return [*(name for name in METRICS if name in names), *sorted(names - set(METRICS))]


def _cells(found: Comparison, row: Row, others: Iterable[str]) -> Iterable[Cell]:
    how, method, link = metric(found.metric), found.method(row.name), of_method(found, row.name, "runs")
    complete = [outcome for outcome in found.of(row.name) if outcome.status == "complete"]
    yield Cell(row.name, kind_of(found, row), row.name, of_method(found, row.name, "recipe"))
    yield _score(row.score, how, link)
    yield mean_cell(row.gap, how.gap, link, row.verdict.kind)
    yield Cell(f"{row.wins} of {row.gap.n}", order=row.wins, link=link) if row.gap else Cell("–")
    for name in others:
        scores = [value for outcome in complete if (value := score(outcome, name)) is not None]
        yield _score(interval(scores), metric(name), link)
    yield Cell("–") if method.rank is None else Cell(str(method.rank), order=method.rank, link=link)
    yield _trained(found, row.name, complete, link)
    yield spread_cell(figures(complete, "stored"), count, link)
    yield spread_cell(figures(complete, "export_bytes"), size, link)
    yield (
        Cell("–")
        if method.lr is None
        else Cell(rate(method.lr), "at the edge" if method.rate_at_edge else "", method.lr, link)
    )
    yield _cost(row.step_ratio, lambda value: f"{value:.2f}", link)
    yield _measured(complete, "train_seconds", lambda value: f"{value:,.3g}", link)
    yield _measured(complete, "tokens_per_s", lambda value: f"{value:,.0f}", link)
    yield _measured(complete, "peak_bytes", size, link)


def _trained(found: Comparison, name: str, complete: list[Outcome], link: str) -> Cell:
    """Trained numbers, and by how much they miss the budget."""
    method = found.method(name)
    if method.parameters is None:
        return spread_cell(figures(complete, "trained"), count, link)
    gap = "" if method.budget_gap is None else f"{method.budget_gap:+.1%} of budget".replace("-", "\N{MINUS SIGN}")
    return Cell(count(method.parameters), gap, method.parameters, link)


def _measured(complete: list[Outcome], key: str, text: Callable[[float], str], link: str) -> Cell:
    return _cost(interval(figures(complete, key)), text, link)


def _cost(whole: Interval | None, text: Callable[[float], str], link: str) -> Cell:
    return mean_cell(whole and possible(whole), text, link)


def _score(whole: Interval | None, how: Metric, link: str) -> Cell:
    return mean_cell(whole and how.possible(whole), how.text, link)
