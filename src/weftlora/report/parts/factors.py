"""A and B beside what they started from or another adapter, and the directions of W that they move."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from weftlora.report import charts
from weftlora.report.charts import tooltip
from weftlora.report.parts.section import OF_A_SITE, Section, Table, cells, text
from weftlora.report.result import Against, Alike, Inspection, SiteDirections

POINTS = 400
"""Points of a spectrum that are drawn, beside the chosen ones and those of largest δ."""


def against(found: Inspection) -> Iterator[Section]:
    """A and B beside the start, or another adapter."""
    against = found.against
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
    table = Table(("site", "factor", "overlap", "by chance", "cosine", "moved", "largest angle"), rows)
    yield Section(
        "start", "Beside another adapter" if against.kind == "adapter" else "A and its start", lead, shown, table
    )


def _overlap(found: Inspection, factors: dict[str, Alike]) -> charts.Spec:
    rows = cells(found, {site: one.overlap for site, one in factors.items()})
    for row in rows:
        one = factors[row["site"]]
        row |= {"chance": one.chance, "cosine": one.cosine, "moved": one.moved, "angle": max(one.angles)}
    says = tooltip(
        ("site", "site", None),
        ("value", "overlap", ".4f"),
        ("chance", "by chance", ".4f"),
        ("angle", "largest angle, degrees", ".1f"),
        ("moved", "moved, of its size", ".4f"),
        ("cosine", "cosine", ".4f"),
    )
    return charts.heatmap(rows, ".2f", says)


def _numbers(one: Alike) -> tuple[str, ...]:
    values = [text(value, ".4f") for value in (one.overlap, one.chance, one.cosine, one.moved)]
    return *values, f"{max(one.angles):.1f}°" if one.angles else "–"


def _fresh(found: Inspection, against: Against) -> Section:
    sizes = {s.site: s.size for s in against.sites}
    says = tooltip(("value", "‖A‖ / ‖a fresh draw‖", ".4f"), *OF_A_SITE)
    chart = charts.heatmap(cells(found, sizes), ".3f", says, lowest=None)
    lead = (
        "The start of A is not stored, so no angle to it can be given. Its size beside that of a fresh draw says how far it "
        "moved at least: by the difference."
    )
    table = Table(("site", "‖A‖ / ‖a fresh draw‖"), [(site, text(size, ".4f")) for site, size in sizes.items()])
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
        ("site", "direction", "σ", "δ when chosen", "gain"),
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
    picks = charts.choice("pick", "Site", list(dict.fromkeys(row["pick"] for row in rows)), "pick")
    return charts.dots(rows, x, y, says, pick=picks)


def _drawn(rate: Sequence[float], chosen: Iterable[int]) -> list[int]:
    """The directions that are drawn: all of a small W; of a large one the chosen, the largest rates and an even choice."""
    every = max(1, -(-len(rate) // POINTS))
    largest = sorted(range(len(rate)), key=lambda k: -rate[k])[:64]
    return sorted({*range(0, len(rate), every), *largest, *(k for k in chosen if k < len(rate))})
