"""What a part of the page is made of, and how its sites are named."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from weftlora.report import charts
from weftlora.report.measure import split_name
from weftlora.report.result import Inspection
from weftlora.report.views import labels_of, short_names


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    key: str
    title: str
    lead: str
    charts: list[tuple[str, charts.Spec]]
    """(what it shows, for those who cannot see it; the chart)."""
    table: Table | None = None


OF_A_SITE = (
    ("site", "site", None),
    ("norm", "‖ΔW‖", ".4g"),
    ("rank", "rank", "d"),
    ("effective", "effective rank", ".2f"),
)
"""What every cell of a heatmap over sites says beside its value."""


def places(sites: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(label of the block, short name of the module) of every site."""
    split = {site: split_name(site) for site in sites}
    labels = labels_of(dict.fromkeys(block for block, _ in split.values()))
    names = short_names(dict.fromkeys(module for _, module in split.values()))
    return {site: (labels[block], names[module]) for site, (block, module) in split.items()}


def cells(found: Inspection, values: dict[str, float | None]) -> list[dict[str, Any]]:
    """Rows of a heatmap over sites."""
    where = places(site.site for site in found.sites)
    facts = {site.site: site for site in found.sites}
    return [
        {
            "block": where[name][0],
            "module": where[name][1],
            "value": value,
            "site": name,
            "rank": facts[name].rank,
            "norm": facts[name].norm,
            "effective": facts[name].effective_rank,
        }
        for name, value in values.items()
        if value is not None
    ]


def text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None
