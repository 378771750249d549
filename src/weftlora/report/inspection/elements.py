"""What the page of an inspection is made of: sections, short names of sites, and numbers by block × module.

The terminal arranges a record by the same names and tables.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from weftlora.inspection.measures import split_name
from weftlora.inspection.record import AdaptedModule, Inspection
from weftlora.report import charts


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The shortest dotted ending of each name that no other has.

    >>> short_names(["attention.output.dense", "output.dense", "query"])
    {'attention.output.dense': 'attention.output.dense', 'output.dense': 'output.dense', 'query': 'query'}
    >>> short_names(["self_attn.q_proj", "mlp.up_proj"])
    {'self_attn.q_proj': 'q_proj', 'mlp.up_proj': 'up_proj'}
    """
    all_names = list(dict.fromkeys(names))
    short = {}
    for name in all_names:
        parts = name.split(".")
        endings = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        others = [other for other in all_names if other != name]
        short[name] = next((e for e in endings if not any(f".{o}".endswith(f".{e}") for o in others)), name)
    return short


def block_label(block: str) -> str:
    """A block as people say it: its stack where there may be several, and its number.

    >>> block_label("model.layers.3"), block_label("encoder.block.3"), block_label("")
    ('3', 'encoder 3', 'outside')
    """
    if not block:
        return "outside"
    parts = block.split(".")
    stack = next((part for part in parts if part in ("encoder", "decoder")), "")
    return f"{stack} {parts[-1]}".strip()


@dataclass(frozen=True)
class Grid:
    """Numbers by block (rows, in the model's order) and module (columns); None where a block lacks the module."""

    blocks: list[str]
    modules: list[str]
    values: list[list[float | None]]

    @property
    def flat(self) -> list[float]:
        """All numbers there are."""
        return [value for row in self.values for value in row if value is not None]

    def split(self, width: int) -> list[Grid]:
        """Side by side parts whose headers fit into `width` characters, each without the blocks that have nothing in it."""
        first, cuts, used = max(map(len, self.blocks), default=0), [0], 0
        for n, module in enumerate(self.modules):
            wide = max(len(module), 6) + 2
            if n > cuts[-1] and first + used + wide > width:
                cuts, used = [*cuts, n], 0
            used += wide
        return [self._columns(a, b) for a, b in pairwise([*cuts, len(self.modules)])]

    def _columns(self, a: int, b: int) -> Grid:
        rows = [(block, row[a:b]) for block, row in zip(self.blocks, self.values, strict=True)]
        kept = [(block, row) for block, row in rows if any(value is not None for value in row)]
        return Grid([block for block, _ in kept], self.modules[a:b], [row for _, row in kept])


def grid(found: Inspection, number: Callable[[AdaptedModule], float | None]) -> Grid:
    """One number of every site, by block and module."""
    blocks = list(dict.fromkeys(site.block for site in found.sites))
    modules = list(dict.fromkeys(site.module for site in found.sites))
    at = {(site.block, site.module): number(site) for site in found.sites}
    names, labels = short_names(modules), labels_of(blocks)
    rows = [[at.get((block, module)) for module in modules] for block in blocks]
    return Grid([labels[block] for block in blocks], [names[module] for module in modules], rows)


def labels_of(blocks: Iterable[str]) -> dict[str, str]:
    """Labels of blocks; their full names where two would read the same."""
    found = {block: block_label(block) for block in blocks}
    return found if len(set(found.values())) == len(found) else {block: block or "outside" for block in found}


def sites_by_block(sites: Iterable[str]) -> dict[str, list[str]]:
    """Full names of sites under their blocks, in order."""
    blocks: dict[str, list[str]] = {}
    for site in sites:
        blocks.setdefault(split_name(site)[0], []).append(site)
    return blocks


def movement(found: Inspection) -> tuple[str, Grid]:
    """How far every site moved: relative to W where the base was at hand, else ‖ΔW‖ itself."""
    if any(site.relative is not None for site in found.sites):
        return "‖ΔW‖ / ‖W‖", grid(found, lambda site: site.relative)
    return "‖ΔW‖", grid(found, lambda site: site.norm)


def settings_line(found: Inspection) -> str:
    """r, α and what else describes the adapter, in a line."""
    s = found.settings
    said = [f"{name} {s[key]:g}" for name, key in (("r", "r"), ("α", "lora_alpha")) if s.get(key) is not None]
    said += [f"dropout {s['lora_dropout']:g}"] if s.get("lora_dropout") else []
    said += ["rsLoRA"] if s.get("use_rslora") else []
    said += [f"{found.steps:,} steps"] if found.steps else []
    return " · ".join([found.method, *said])


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
    ("site", "name", None),
    ("norm", "‖ΔW‖", ".4g"),
    ("rank", "rank", "d"),
    ("effective", "effective rank", ".2f"),
)
"""What every cell of a heatmap over sites says beside its value."""


def block_and_module(sites: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(label of the block, short name of the module) of every site."""
    split = {site: split_name(site) for site in sites}
    labels = labels_of(dict.fromkeys(block for block, _ in split.values()))
    names = short_names(dict.fromkeys(module for _, module in split.values()))
    return {site: (labels[block], names[module]) for site, (block, module) in split.items()}


def cells(found: Inspection, values: dict[str, float | None]) -> list[dict[str, Any]]:
    """Rows of a heatmap over sites."""
    where = block_and_module(site.site for site in found.sites)
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
