"""Where ranks, layers, heads and directions went: what `weftlora inspect` finds in adapters, as means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from weftlora.inspection.measures import split_name
from weftlora.inspection.record import Inspection
from weftlora.report import charts
from weftlora.report.charts import tooltip
from weftlora.report.comparison.elements import Cell, Chart, Column, Line, Part, Sheet, listed, of_method
from weftlora.report.comparison.runs import Evidence
from weftlora.report.inspection.elements import block_and_module, labels_of
from weftlora.report.inspection.sections import routers

Numbers = Callable[[Inspection], Mapping[str, float]]
"""A number of every site that has one, by the site's name."""


def adapter_differences(evidence: Evidence) -> Iterator[Part]:
    """Charts of everything that differs between the methods' adapters."""
    shown = [
        *_by_site(evidence, "‖ΔW‖ of every module", ".2g", ".3g", _norms),
        *_by_site(evidence, "Live rank slots of every module, where ranks move", ".1f", ".2f", _ranks),
        *_selected(evidence),
        *_by_site(
            evidence, "Mean cosine between the heads of every module: 1 where they do the same", ".2f", ".3f", _heads
        ),
        *_by_site(evidence, "Mean size of the gains of Dash at every module", ".2g", ".3g", _gains),
    ]
    shown += _routed(evidence)
    if shown:
        lead = (
            "Means over the seeds of a method; the tooltip has the spread. In a chart, the same shade is the same number for every "
            "method. "
            f"More of one run: weftlora inspect RUN --html page.html.{_left_out(evidence)}"
        )
        yield Part(
            "inside", "Where ranks, layers, heads and directions went", lead, shown, _sheet(evidence), folded=True
        )


def _sheet(evidence: Evidence) -> Sheet:
    """The means of every site that the charts are of."""
    numbers: list[tuple[str, str, Numbers]] = [
        ("‖ΔW‖", ".3g", _norms),
        ("rank", ".1f", _ranks),
        ("cosine of heads", ".3f", _heads),
        ("gain of Dash", ".3g", _gains),
    ]
    lines = []
    for name, looks in evidence.looks.items():
        link = of_method(evidence.found, name, "runs")
        held = [
            {site: statistics.fmean(values) for site, values in _gathered(looks, each).items()} for *_, each in numbers
        ]
        for site in held[0]:
            cells = [Cell(name, order=name, link=link), Cell(site, order=site)]
            for (_, form, _), values in zip(numbers, held, strict=True):
                cells.append(
                    Cell(format(values[site], form), order=values[site], link=link) if site in values else Cell("–")
                )
            lines.append(Line(name, "", cells))
    columns = [Column("method", number=False), Column("module", number=False), *(Column(what) for what, *_ in numbers)]
    return Sheet("Means by module", columns, lines)


def _gathered(looks: Sequence[Inspection], numbers: Numbers) -> dict[str, list[float]]:
    """A number of every site, from every adapter that has the site."""
    held: dict[str, list[float]] = {}
    for found in looks:
        for site, value in numbers(found).items():
            held.setdefault(site, []).append(value)
    return held


def _left_out(evidence: Evidence) -> str:
    return "".join(f" {sentence}" for sentence in evidence.left_out)


def _norms(found: Inspection) -> dict[str, float]:
    return {site.site: site.norm for site in found.sites}


def _ranks(found: Inspection) -> dict[str, float]:
    """Nothing where every site has the rank it started with."""
    moved = found.history is not None or len({site.rank for site in found.sites}) > 1
    return {site.site: float(site.rank) for site in found.sites} if moved else {}


def _heads(found: Inspection) -> dict[str, float]:
    return {head.site: head.mean for head in found.heads if head.mean is not None}


def _gains(found: Inspection) -> dict[str, float]:
    gains = {site.site: [abs(c.gain) for c in site.chosen if c.gain is not None] for site in found.directions}
    return {site: statistics.fmean(held) for site, held in gains.items() if held}


def _by_site(evidence: Evidence, what: str, written: str, told: str, numbers: Numbers) -> Iterator[Chart]:
    """A heatmap over the sites of a chosen method."""
    rows: list[dict[str, Any]] = []
    for name, looks in evidence.looks.items():
        held = _gathered(looks, numbers)
        where = block_and_module(held)
        rows += [
            {
                "pick": name,
                "block": where[site][0],
                "module": where[site][1],
                "site": site,
                "value": statistics.fmean(values),
                "spread": f"{min(values):{told}} to {max(values):{told}}",
                "seeds": len(values),
            }
            for site, values in held.items()
        ]
    if rows:
        says = tooltip(
            ("pick", "method", None),
            ("site", "name", None),
            ("value", "mean", told),
            ("spread", "over seeds", None),
            ("seeds", "seeds", "d"),
        )
        methods = list(dict.fromkeys(row["pick"] for row in rows))
        pick = charts.drop_down("pick", "Method", methods, "pick") if len(methods) > 1 else ([], [])
        of = f" ({methods[0]})" if len(methods) == 1 else ""
        alt = f"{what}, by block and module, for {listed(methods)}"
        yield Chart(f"{what}{of}", alt, charts.heatmap(rows, written, says, pick=pick))


def _routed(evidence: Evidence) -> Iterator[Chart]:
    """What the routers of one run per method do, and what they do differently in each domain."""
    for name, found in evidence.routers.items():
        for section in routers(found):
            yield from (Chart(f"{what} ({name})", f"{what}, of {name}", spec) for what, spec in section.charts)


def _selected(evidence: Evidence) -> Iterator[Chart]:
    """How often each block is adapted, by the methods that do not adapt them all."""
    seeds = {name: len(looks) for name, looks in evidence.looks.items()}
    held = {name: [_blocks(found) for found in looks] for name, looks in evidence.looks.items()}
    every = list(dict.fromkeys(block for looks in held.values() for blocks in looks for block in blocks))
    some = [name for name, looks in held.items() if any(set(blocks) != set(every) for blocks in looks)]
    if not some:
        return
    labels = labels_of(sorted(every, key=_as_counted))
    rows = [
        {"method": name, "block": labels[block], "value": times / seeds[name], "times": f"{times} of {seeds[name]}"}
        for name in some
        for block in labels
        for times in [sum(block in blocks for blocks in held[name])]
    ]
    says = tooltip(("method", "method", None), ("block", "block", None), ("times", "seeds that adapt it", None))
    chart = charts.heatmap(rows, ".0%", says, axes=("block", "method"))
    yield Chart(
        "How often each block is adapted", f"How often each block is adapted, over the seeds of {listed(some)}", chart
    )


def _blocks(found: Inspection) -> list[str]:
    return list(dict.fromkeys(block for site in found.sites if (block := split_name(site.site)[0])))


def _as_counted(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
