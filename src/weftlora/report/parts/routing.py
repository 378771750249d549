"""What the routers do, and how alike the heads are that they mix."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from weftlora.report import charts
from weftlora.report.charts import tooltip
from weftlora.report.parts.section import OF_A_SITE, Section, Table, cells, mean_of_known, places, text
from weftlora.report.result import HeadSimilarity, Inspection, Routers, Usage

ALL_ROWS = "all rows"
MEAN = "mean of all sites"


def routers(found: Inspection) -> Iterator[Section]:
    """Gates by block, where routers stand between mixing and choosing, and what domains do differently."""
    if found.routers is None:
        return
    shown = [
        ("How much of every head is used, by block", _gates(found.routers)),
        ("Entropy and balance of every router", _entropies(found.routers)),
    ]
    if len(found.routers.domains) > 1:
        shown.append(("How differently each domain uses the heads", _domains(found.routers)))
    table = Table(
        ("site", "rows", "tokens", "entropy", "balance", "mean gate", "top-1 share"),
        [
            (name, rows, f"{u.tokens:,}", f"{u.entropy:.3f}", f"{u.balance:.3f}", _shares(u.mean), _shares(u.top1))
            for name, rows, u in _usages(found.routers)
        ],
    )
    lead = (
        f"Measured over {found.routers.source}. Heads are numbered within a site: head 1 of two sites has nothing in common. "
        "Entropy and balance near 1 together mean a router that does not choose."
    )
    yield Section("routers", "Routers", lead, shown, table)


def _usages(routers: Routers) -> Iterator[tuple[str, str, Usage]]:
    """(site, rows, usage) of everything that was measured."""
    for site in routers.sites:
        for rows, usage in {ALL_ROWS: site.whole, **site.domains}.items():
            yield site.site, rows, usage


def _gates(routers: Routers) -> charts.Spec:
    where = places(site.site for site in routers.sites)
    rows: list[dict[str, Any]] = [
        {
            "module": where[name][1],
            "rows": over,
            "block": where[name][0],
            "head": n,
            "mean": mean,
            "top": top,
            "entropy": usage.entropy,
            "site": name,
            "tokens": usage.tokens,
        }
        for name, over, usage in _usages(routers)
        for n, (mean, top) in enumerate(zip(usage.mean, usage.top1, strict=True), 1)
    ]
    says = tooltip(
        ("site", "site", None),
        ("head", "head", "d"),
        ("mean", "mean gate", ".1%"),
        ("top", "first choice of tokens", ".1%"),
        ("entropy", "entropy", ".3f"),
        ("tokens", "tokens", ",d"),
    )
    picks = [
        charts.choice(f"chosen_{field}", field.capitalize(), list(dict.fromkeys(row[field] for row in rows)), field)
        for field in ("module", "rows")
    ]
    share = charts.reading("share", "Show", {"mean gate": "mean", "first choices": "top"})
    return charts.stacked(rows, charts.together(*picks, share), max(row["head"] for row in rows), says, "share")


def _entropies(routers: Routers) -> charts.Spec:
    points = [
        {
            "kind": "router",
            "site": site.site,
            "entropy": site.whole.entropy,
            "balance": site.whole.balance,
            "top": max(site.whole.top1),
        }
        for site in routers.sites
    ]
    says = tooltip(
        ("site", "site", None),
        ("entropy", "entropy", ".3f"),
        ("balance", "balance", ".3f"),
        ("top", "top-1 share of the most used head", ".1%"),
    )
    entropy = charts.quantity("entropy", "entropy: 1 = every token mixes all heads evenly", domain=[0, 1])
    return charts.dots(
        points, entropy, charts.quantity("balance", "balance: 1 = heads used equally", domain=[0, 1]), says
    )


def _domains(routers: Routers) -> charts.Spec:
    where = places(site.site for site in routers.sites)
    held: dict[tuple[str, str], list[float]] = {}
    for site in routers.sites:
        for domain in site.domains:
            held.setdefault((domain, where[site.site][1]), []).append(site.apart(domain))
    rows = [{"domain": d, "module": m, "value": statistics.mean(v), "sites": len(v)} for (d, m), v in held.items()]
    says = tooltip(
        ("domain", "domain", None),
        ("module", "module", None),
        ("value", "apart from all rows", ".3f"),
        ("sites", "sites", "d"),
    )
    return charts.heatmap(rows, ".2f", says, axes=("module", "domain"))


def heads(found: Inspection) -> Iterator[Section]:
    """Cosines between the heads: of every two, and on average by site."""
    tables = {head.site: head.cosine for head in found.heads if head.mean is not None}
    if not tables:
        return
    means = cells(found, {head.site: head.mean for head in found.heads})
    everywhere = charts.heatmap(means, ".2f", tooltip(("value", "mean cosine", ".4f"), *OF_A_SITE))
    table = Table(
        ("site", "mean cosine", "pairs"),
        [(head.site, text(head.mean, ".4f"), ", ".join(_pairs(head))) for head in found.heads],
    )
    lead = (
        "Cosine between the B heads of a site: 1 means that they do the same, 0 that they have nothing in common. All of a "
        "site's heads share one A."
    )
    shown = [
        ("Cosine between every two heads", _matrix(tables)),
        ("Mean cosine between the heads of every site", everywhere),
    ]
    yield Section("heads", "How alike the heads are", lead, shown, table)


def _matrix(tables: dict[str, list[list[float | None]]]) -> charts.Spec:
    n = max(map(len, tables.values()))
    if len({len(table) for table in tables.values()}) == 1:
        mean = [[mean_of_known([table[i][j] for table in tables.values()]) for j in range(n)] for i in range(n)]
        tables = {MEAN: mean, **tables}
    rows = [
        {"pick": site, "head": f"B{i}", "other": f"B{j}", "value": value}
        for site, table in tables.items()
        for i, row in enumerate(table, 1)
        for j, value in enumerate(row, 1)
        if value is not None
    ]
    says = tooltip(("pick", "site", None), ("head", "head", None), ("other", "and", None), ("value", "cosine", ".4f"))
    picks = charts.choice("pick", "Site", list(tables), "pick")
    return charts.heatmap(rows, ".2f", says, axes=("other", "head"), pick=picks)


def _pairs(head: HeadSimilarity) -> Iterator[str]:
    for i, row in enumerate(head.cosine, 1):
        for j, value in enumerate(row[: i - 1], 1):
            yield f"B{j} B{i} {text(value, '.3f')}"


def _shares(values: Sequence[float]) -> str:
    return " ".join(f"{value:.0%}" for value in values)
