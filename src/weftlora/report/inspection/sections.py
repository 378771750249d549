"""The sections of an inspection's page, in reading order.

How far every site moved, its rank, and what was selected, shared and can be merged; what the routers do, and how alike the heads are
that they mix; A and B beside what they started from or another adapter, and the directions of W that they move.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from weftlora.inspection.record import (
    AdaptedModule,
    FactorComparison,
    FactorSimilarity,
    HeadSimilarity,
    Inspection,
    Routers,
    SiteDirections,
    Usage,
)
from weftlora.report import charts
from weftlora.report.charts import tooltip
from weftlora.report.inspection.elements import (
    OF_A_SITE,
    Section,
    Table,
    block_and_module,
    cells,
    mean_of_known,
    percent,
    text,
)


def sites(found: Inspection) -> Iterator[Section]:
    """‖ΔW‖ of every site."""
    relative = any(site.relative is not None for site in found.sites)
    values = {site.site: site.relative if relative else site.norm for site in found.sites}
    what = "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖"
    says = tooltip(("value", what, ".2%" if relative else ".4g"), *OF_A_SITE)
    routed = next((site.norm_kind for site in found.sites if site.norm_kind != "exact"), None)
    at = f" On a routed module ΔW depends on the token; here it is taken at the {routed}." if routed else ""
    table = Table(
        ("module", "out × in", "rank", "effective rank", "trainable", "‖ΔW‖", "‖ΔW‖ / ‖W‖"),
        [
            (
                s.site,
                f"{s.shape[0]} × {s.shape[1]}",
                str(s.rank),
                f"{s.effective_rank:.2f}",
                f"{s.trained:,}",
                f"{s.norm:.4g}",
                percent(s.relative),
            )
            for s in found.sites
        ],
    )
    chart = charts.heatmap(cells(found, values), ".1%" if relative else ".2g", says)
    lead = (
        f"{what}, the Frobenius norm of the update{' relative to that of the frozen weight' if relative else ''}.{at}"
    )
    yield Section(
        "update", "How far each module moved", lead, [(f"{what} of every module, by block and module", chart)], table
    )


def ranks(found: Inspection) -> Iterator[Section]:
    """Ranks of every site, where they differ or could."""
    if len({site.rank for site in found.sites}) < 2 and all(site.rank == site.max_rank for site in found.sites):
        return
    says = tooltip(("value", "rank", "d"), *OF_A_SITE)
    chart = charts.heatmap(cells(found, {site.site: float(site.rank) for site in found.sites}), "d", says)
    lead = "Rank of every module as trained. The effective rank of its update, in the tooltip, says how much of it matters."
    table = Table(
        ("module", "rank", "highest possible rank", "initial rank", "effective rank"),
        [(s.site, str(s.rank), str(s.max_rank), str(s.initial_rank), f"{s.effective_rank:.2f}") for s in found.sites],
    )
    yield Section("ranks", "Ranks", lead, [("Rank of every module, by block and module", chart)], table)


def history(found: Inspection) -> Iterator[Section]:
    """Where rank slots went."""
    if (history := found.history) is None:
        return
    where = block_and_module(history.before)
    rows: list[dict[str, Any]] = []
    for by, at in (("kind of module", 1), ("block", 0)):
        for step, ranks in [(0, history.before), *((each.step, each.ranks) for each in history.rounds)]:
            for name in dict.fromkeys(place[at] for place in where.values()):
                held = [rank for site, rank in ranks.items() if where[site][at] == name]
                rows.append({"by": by, "name": name, "step": step, "value": statistics.mean(held), "slots": sum(held)})
    says = tooltip(
        ("name", "", None), ("step", "after step", "d"), ("value", "mean rank", ".2f"), ("slots", "slots in all", "d")
    )
    chart = charts.lines(
        rows,
        charts.drop_down("by", "Lines by", ["kind of module", "block"], "by"),
        says,
        "optimiser step",
        "mean rank per module",
    )
    table = Table(
        ("after step", "slots taken from", "slots made in"),
        [(str(e.step), _counted(s for s, *_ in e.taken), _counted(s for s, _ in e.made)) for e in history.rounds],
    )
    lead = f"Moves of rank slots in {history.told}, from {history.source}. A click in the legend picks a line out."
    yield Section("moves", "Ranks over time", lead, [("Mean rank per module over the steps of the run", chart)], table)


def _counted(sites: Iterable[str]) -> str:
    all_sites = list(sites)
    return ", ".join(
        f"{site} ({all_sites.count(site)})" if all_sites.count(site) > 1 else site for site in dict.fromkeys(all_sites)
    )


def layers(found: Inspection) -> Iterator[Section]:
    """What a search selected, and how clearly."""
    layers = found.layers
    if layers.margin is None:
        return
    rows = [
        {
            "name": c.name,
            "value": c.distance,
            "alpha": c.alpha,
            "hat": c.alpha_hat,
            "kind": "selected" if c.selected else "not selected",
            "near": "yes" if c.near_tie else "no",
        }
        for c in layers.candidates
        if c.distance is not None
    ]
    says = tooltip(
        ("name", layers.granularity, None),
        ("alpha", "α", ".4f"),
        ("hat", "α̂", ".4f"),
        ("value", "over the threshold", "+.4f"),
        ("near", "one step could turn it", None),
    )
    table = Table(
        (layers.granularity, "selected", "α", "α̂", "over the threshold"),
        [
            (
                c.name,
                "yes" if c.selected else "no",
                text(c.alpha, ".4f"),
                text(c.alpha_hat, ".4f"),
                text(c.distance, "+.4f"),
            )
            for c in layers.candidates
        ],
    )
    lead = (
        f"What the search found: α of every {layers.granularity} less the threshold. The margin is {layers.margin:.3g}, the "
        "smallest of these distances."
    )
    chart = charts.bars(rows, says, "α over the threshold")
    yield Section(
        "layers",
        "Selected layers",
        lead,
        [(f"α of every {layers.granularity}, relative to the threshold", chart)],
        table,
    )


def groups(found: Inspection) -> Iterator[Section]:
    """Which sites share their factors."""
    if found.groups:
        stored, untied = sum(g.stored for g in found.groups), sum(g.untied for g in found.groups)
        table = Table(
            ("shared", "sites", "numbers", "untied"),
            [(g.parts, ", ".join(g.sites), f"{g.stored:,}", f"{g.untied:,}") for g in found.groups],
        )
        lead = f"Modules that share their factors: {stored:,} numbers stand for {untied:,}."
        yield Section("groups", "Tied groups", lead, [], table)


def merging(found: Inspection) -> Iterator[Section]:
    """How many sites can be merged, and why the others cannot."""
    reasons: dict[str, list[AdaptedModule]] = {}
    for site in found.sites:
        reasons.setdefault("" if site.mergeable else str(site.why_not), []).append(site)
    rows = [
        ("can be merged exactly" if not why else "cannot be merged", str(len(held)), why.rstrip("."))
        for why, held in reasons.items()
    ]
    asked = "" if found.base else " Whether a base allows it was not checked: there was none."
    lead = f"Whether the update can be added to the frozen weights.{asked}"
    yield Section("merging", "What can be merged", lead, [], Table(("", "sites", "why not"), rows))


ALL_ROWS = "all rows"
MEAN = "mean of all modules"


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
    if any(site.points for site in found.routers.outputs):
        shown.append(
            (
                "What every head gives for every row, on the axes along which they differ most",
                _head_outputs(found.routers),
            )
        )
    table = Table(
        ("module", "rows", "tokens", "entropy", "balance", "mean gate", "top-1 share"),
        [
            (name, rows, f"{u.tokens:,}", f"{u.entropy:.3f}", f"{u.balance:.3f}", _shares(u.mean), _shares(u.top1))
            for name, rows, u in _usages(found.routers)
        ],
    )
    lead = (
        f"Measured over {found.routers.source}. Heads are numbered within a module: head 1 of two modules has nothing in common. "
        "Entropy and balance near 1 together mean a router that does not choose."
    )
    yield Section("routers", "Routers", lead, shown, table)


def _usages(routers: Routers) -> Iterator[tuple[str, str, Usage]]:
    """(site, rows, usage) of everything that was measured."""
    for site in routers.sites:
        for rows, usage in {ALL_ROWS: site.whole, **site.domains}.items():
            yield site.site, rows, usage


def _gates(routers: Routers) -> charts.Spec:
    where = block_and_module(site.site for site in routers.sites)
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
        ("site", "name", None),
        ("head", "head", "d"),
        ("mean", "mean gate", ".1%"),
        ("top", "first choice of tokens", ".1%"),
        ("entropy", "entropy", ".3f"),
        ("tokens", "tokens", ",d"),
    )
    picks = [
        charts.drop_down(f"chosen_{field}", field.capitalize(), list(dict.fromkeys(row[field] for row in rows)), field)
        for field in ("module", "rows")
    ]
    share = charts.field_drop_down("share", "Show", {"mean gate": "mean", "first choices": "top"})
    return charts.stacked(rows, charts.drop_downs(*picks, share), max(row["head"] for row in rows), says, "share")


def _head_outputs(routers: Routers) -> charts.Spec:
    drawn = {site.site: site for site in routers.outputs if site.points}
    rows: list[dict[str, Any]] = [
        {
            "site": name,
            "domain": point.domain or ALL_ROWS,
            "head": f"head {point.head}",
            "x": point.x,
            "y": point.y,
            "heads": site.between_heads,
            "domains": site.between_domains,
            "axes": sum(site.explained),
        }
        for name, site in drawn.items()
        for point in site.points
    ]
    says = tooltip(
        ("site", "site", None),
        ("domain", "domain", None),
        ("head", "head", None),
        ("heads", "variance between heads", ".1%"),
        ("domains", "of the rest, between domains", ".1%"),
        ("axes", "variance on these axes", ".1%"),
    )
    pick = charts.drop_down("site_of_heads", "Site", list(drawn), "site")
    return charts.clouds(rows, "domain", "head", says, pick)


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
        ("site", "name", None),
        ("entropy", "entropy", ".3f"),
        ("balance", "balance", ".3f"),
        ("top", "top-1 share of the most used head", ".1%"),
    )
    entropy = charts.quantity("entropy", "entropy: 1 = every token mixes all heads evenly", domain=[0, 1])
    return charts.dots(
        points, entropy, charts.quantity("balance", "balance: 1 = heads used equally", domain=[0, 1]), says
    )


def _domains(routers: Routers) -> charts.Spec:
    where = block_and_module(site.site for site in routers.sites)
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
        ("module", "mean cosine", "pairs"),
        [(head.site, text(head.mean, ".4f"), ", ".join(_pairs(head))) for head in found.heads],
    )
    lead = (
        "Cosine between the B heads of a module: 1 means that they do the same, 0 that they have nothing in common. All of a "
        "module's heads share one A."
    )
    shown = [
        ("Cosine between every two heads", _matrix(tables)),
        ("Mean cosine between the heads of every module", everywhere),
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
    says = tooltip(("pick", "name", None), ("head", "head", None), ("other", "and", None), ("value", "cosine", ".4f"))
    picks = charts.drop_down("pick", "Site", list(tables), "pick")
    return charts.heatmap(rows, ".2f", says, axes=("other", "head"), pick=picks)


def _pairs(head: HeadSimilarity) -> Iterator[str]:
    for i, row in enumerate(head.cosine, 1):
        for j, value in enumerate(row[: i - 1], 1):
            yield f"B{j} B{i} {text(value, '.3f')}"


def _shares(values: Sequence[float]) -> str:
    return " ".join(f"{value:.0%}" for value in values)


POINTS = 400
"""Points of a spectrum that are drawn, beside the chosen ones and those of largest δ."""


def factor_comparison(found: Inspection) -> Iterator[Section]:
    """A and B beside the start, or another adapter."""
    against = found.factor_comparison
    if against is None or not against.sites:
        return
    if against.kind == "fresh draw":
        yield _fresh(found, against)
        return
    shown, rows, chances = [], [], []
    for part in ("A", "B"):
        factors = {s.site: one for s in against.sites if (one := s.A if part == "A" else s.B) is not None}
        overlaps = {site: one.overlap for site, one in factors.items() if one.overlap is not None}
        if overlaps:
            shown.append((f"Overlap of the spaces of {part}, by block and module", _overlap(found, factors)))
            chances += [factors[site].chance for site in overlaps]
        rows += [(site, part, *_numbers(one)) for site, one in factors.items()]
    if not shown:
        return
    lead = (
        f"The spaces that the factors span, beside {against.what}. Overlap is the mean cos² of the principal angles: 1 is the "
        f"same space; two random ones overlap by {statistics.mean(chances):.2g} on average. Adapters of one seed start from one "
        "A, so an A that is alike says little by itself."
    )
    table = Table(("module", "factor", "overlap", "by chance", "cosine", "moved", "largest angle"), rows)
    yield Section(
        "start", "Beside another adapter" if against.kind == "adapter" else "A and its start", lead, shown, table
    )


def _overlap(found: Inspection, factors: dict[str, FactorSimilarity]) -> charts.Spec:
    rows = cells(found, {site: one.overlap for site, one in factors.items()})
    for row in rows:
        one = factors[row["site"]]
        row |= {"chance": one.chance, "cosine": one.cosine, "moved": one.relative_change, "angle": max(one.angles)}
    says = tooltip(
        ("site", "name", None),
        ("value", "overlap", ".4f"),
        ("chance", "by chance", ".4f"),
        ("angle", "largest angle, degrees", ".1f"),
        ("moved", "moved, of its size", ".4f"),
        ("cosine", "cosine", ".4f"),
    )
    return charts.heatmap(rows, ".2f", says)


def _numbers(one: FactorSimilarity) -> tuple[str, ...]:
    values = [text(value, ".4f") for value in (one.overlap, one.chance, one.cosine, one.relative_change)]
    return *values, f"{max(one.angles):.1f}°" if one.angles else "–"


def _fresh(found: Inspection, against: FactorComparison) -> Section:
    sizes = {s.site: s.norm_ratio for s in against.sites}
    says = tooltip(("value", "‖A‖ / ‖a fresh draw‖", ".4f"), *OF_A_SITE)
    chart = charts.heatmap(cells(found, sizes), ".3f", says, lowest=None)
    lead = (
        "The start of A is not stored, so no angle to it can be given. Its size beside that of a fresh draw says how far it "
        "moved at least: by the difference."
    )
    table = Table(("module", "‖A‖ / ‖a fresh draw‖"), [(site, text(size, ".4f")) for site, size in sizes.items()])
    return Section(
        "start", "A and its start", lead, [("Size of A beside a fresh draw, by block and module", chart)], table
    )


def directions(found: Inspection) -> Iterator[Section]:
    """Change rates over the spectrum of W, and the chosen directions."""
    rows = [row for site in found.directions for row in _spectrum(site)]
    shown = []
    if rows:
        shown.append(("Change rate of every direction of W against its singular value", _rates(rows)))
    table = Table(
        ("module", "direction", "σ", "δ when chosen", "gain"),
        [
            (site.site, text(c.index, "d"), text(c.sigma, ".4g"), text(c.rate, ".4g"), text(c.gain, ".4g"))
            for site in found.directions
            for c in site.chosen
        ],
    )
    if shown or table.rows:
        lead = (
            "How far the update moves each core direction of W, relative to its singular value: "
            "δ\u00a0=\u00a0|uᵀΔWv|\u00a0/\u00a0σ. Direction 0 has the largest σ."
            + ("" if table.rows else " This adapter chose none.")
        )
        yield Section("directions", "Directions of W", lead, shown, table if table.rows else None)


def _spectrum(site: SiteDirections) -> Iterator[dict[str, Any]]:
    """The points of one site; what is 0 has no place on a logarithmic axis."""
    chosen = {c.index: c for c in site.chosen if c.index is not None}
    sigma, rate = site.sigma or [], site.rate or []
    for k in _drawn(rate, chosen):
        if rate[k] > 0 and sigma[k] > 0:
            yield {
                "pick": site.site,
                "k": k,
                "sigma": sigma[k],
                "value": rate[k],
                "kind": "chosen" if k in chosen else "other direction",
                "gain": chosen[k].gain if k in chosen else None,
            }


def _rates(rows: list[dict[str, Any]]) -> charts.Spec:
    says = tooltip(
        ("k", "direction", "d"),
        ("sigma", "σ", ".4g"),
        ("value", "change rate δ", ".4g"),
        ("kind", "", None),
        ("gain", "gain of Dash", ".4g"),
    )
    log = {"type": "log", "nice": False}
    x, y = charts.quantity("sigma", "σ of W", "~g", **log), charts.quantity("value", "change rate δ", "~g", **log)
    picks = charts.drop_down("pick", "Site", list(dict.fromkeys(row["pick"] for row in rows)), "pick")
    return charts.dots(rows, x, y, says, pick=picks)


def _drawn(rate: Sequence[float], chosen: Iterable[int]) -> list[int]:
    """The directions that are drawn: all of a small W; of a large one the chosen, the largest rates and an even choice."""
    every = max(1, -(-len(rate) // POINTS))
    largest = sorted(range(len(rate)), key=lambda k: -rate[k])[:64]
    return sorted({*range(0, len(rate), every), *largest, *(k for k in chosen if k < len(rate))})


def sections(found: Inspection) -> list[Section]:
    """All parts that have something to show."""
    parts = (sites, ranks, history, layers, routers, heads, factor_comparison, directions, groups, merging)
    return [section for part in parts for section in part(found)]
