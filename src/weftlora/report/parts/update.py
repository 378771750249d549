"""How far every site moved, its rank, and what was selected, shared and can be merged."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from weftlora.report import charts
from weftlora.report.charts import tooltip
from weftlora.report.parts.section import OF_A_SITE, Section, Table, cells, percent, places, text
from weftlora.report.result import Inspection, SiteFacts


def sites(found: Inspection) -> Iterator[Section]:
    """‖ΔW‖ of every site."""
    relative = any(site.relative is not None for site in found.sites)
    values = {site.site: site.relative if relative else site.norm for site in found.sites}
    what = "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖"
    says = tooltip(("value", what, ".2%" if relative else ".4g"), *OF_A_SITE)
    routed = next((site.norm_at for site in found.sites if site.norm_at != "exact"), None)
    at = f" On a routed site ΔW depends on the token; here it is taken at the {routed}." if routed else ""
    table = Table(
        ("site", "out × in", "rank", "effective rank", "trained", "‖ΔW‖", "‖ΔW‖ / ‖W‖"),
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
        "update", "How far each site moved", lead, [(f"{what} of every site, by block and module", chart)], table
    )


def ranks(found: Inspection) -> Iterator[Section]:
    """Ranks of every site, where they differ or could."""
    if len({site.rank for site in found.sites}) < 2 and all(site.rank == site.room for site in found.sites):
        return
    says = tooltip(("value", "rank", "d"), *OF_A_SITE)
    chart = charts.heatmap(cells(found, {site.site: float(site.rank) for site in found.sites}), "d", says)
    lead = (
        "Live rank slots of every site. The effective rank of its update, in the tooltip, says how many of them matter."
    )
    table = Table(
        ("site", "rank", "room", "at the start", "effective rank"),
        [(s.site, str(s.rank), str(s.room), str(s.first_rank), f"{s.effective_rank:.2f}") for s in found.sites],
    )
    yield Section("ranks", "Ranks", lead, [("Rank of every site, by block and module", chart)], table)


def history(found: Inspection) -> Iterator[Section]:
    """Where rank slots went."""
    if (history := found.history) is None:
        return
    where = places(history.before)
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
        charts.choice("by", "Lines by", ["kind of module", "block"], "by"),
        says,
        "optimiser step",
        "mean rank per site",
    )
    table = Table(
        ("after step", "slots taken from", "slots made in"),
        [(str(e.step), _counted(s for s, *_ in e.taken), _counted(s for s, _ in e.made)) for e in history.rounds],
    )
    lead = f"{len(history.rounds)} rounds of moving rank slots, from {history.source}. A click in the legend picks a line out."
    yield Section("moves", "Ranks over time", lead, [("Mean rank per site over the steps of the run", chart)], table)


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
            "near": "yes" if c.near else "no",
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
        lead = f"Sites that share their factors: {stored:,} numbers stand for {untied:,}."
        yield Section("groups", "Tied groups", lead, [], table)


def merging(found: Inspection) -> Iterator[Section]:
    """How many sites can be merged, and why the others cannot."""
    reasons: dict[str, list[SiteFacts]] = {}
    for site in found.sites:
        reasons.setdefault("" if site.mergeable else str(site.why_not), []).append(site)
    rows = [
        ("can be merged exactly" if not why else "cannot be merged", str(len(held)), why.rstrip("."))
        for why, held in reasons.items()
    ]
    asked = "" if found.base else " Whether a base could take it was not asked: there was none."
    lead = f"Whether the update can be added to the frozen weights.{asked}"
    yield Section("merging", "What can be merged", lead, [], Table(("", "sites", "why not"), rows))
