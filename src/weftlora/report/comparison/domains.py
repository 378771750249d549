"""Results by domain, where the rows have domains."""

from __future__ import annotations

from collections.abc import Iterator

from weftlora.compare.record import Comparison
from weftlora.report import charts
from weftlora.report.comparison import drawing
from weftlora.report.comparison.opening import axis
from weftlora.report.comparison.parts import Cell, Chart, Column, Line, Part, Sheet, of_method
from weftlora.report.comparison.results import ranking
from weftlora.report.comparison.spread import interval, paired, scores
from weftlora.report.comparison.wording import KINDS, is_frozen, kind_of, mean_cell, metric

DOMAIN = KINDS["undecided"]
"""Differences within domains have no verdicts; all stand in one colour."""


def domains(found: Comparison) -> Iterator[Part]:
    """Differences to the baseline in a chosen domain, and the score of every method in every domain."""
    names = sorted({domain for outcome in found.outcomes for domain in outcome.domains})
    if len(names) < 2:
        return
    how = metric(found.metric)
    rows = []
    for domain in names:
        for row in ranking(found):
            each = paired(found, row.name, found.metric, domain)
            whole = interval(list(each.values()))
            if whole is not None and row.name != found.baseline and not is_frozen(found, row.name):
                rows += drawing.forest_rows(row.name, DOMAIN, whole, each, how, domain=domain)
    drawn = []
    if rows:
        pick = charts.choice("domain", "Domain", list(dict.fromkeys(row["domain"] for row in rows)), "domain")
        what = f"Difference in {how.title} to {found.baseline} within a domain"
        drawn = [Chart(what, f"{what}, by method", drawing.forest(rows, axis(found, how), pick))]
    lead = (
        f"{how.title.capitalize()} in each domain, paired by seed as above. With {len(names)} domains and several methods some "
        "interval will leave out 0 by luck: these are leads, not verdicts."
    )
    yield Part("domains", "By domain", lead, drawn, _sheet(found, names), folded=bool(drawn))


def _sheet(found: Comparison, names: list[str]) -> Sheet:
    how = metric(found.metric)
    lines = []
    for row in ranking(found):
        link = of_method(found, row.name, "runs")
        cells = [Cell(row.name, order=row.name, link=of_method(found, row.name, "recipe"))]
        means = [interval(list(scores(found, row.name, found.metric, domain).values())) for domain in names]
        cells += [mean_cell(mean and how.possible(mean), how.text, link) for mean in means]
        lines.append(Line(row.name, kind_of(found, row), cells))
    columns = [Column("method", number=False), *(Column(domain, how.title) for domain in names)]
    return Sheet(f"{how.title.capitalize()} by domain", columns, lines)
