"""A comparison as one HTML file: from run folders to a page on disk, a pure function of the folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weftlora.compare import load
from weftlora.compare.record import METRICS, Comparison
from weftlora.compare.statistics import rows
from weftlora.errors import ConfigError, RunError, suggest
from weftlora.records import Record
from weftlora.report.comparison.adapters import adapter_differences
from weftlora.report.comparison.elements import Part, listed
from weftlora.report.comparison.plots import learning_curves
from weftlora.report.comparison.results import (
    differences,
    domains,
    facts,
    other_metrics,
    overall,
    quality,
    results,
    verdicts,
    warnings,
)
from weftlora.report.comparison.runs import Evidence, columns, gather, groups, recipes, samples
from weftlora.report.web import check_extra, check_place, render, write


def parts(evidence: Evidence) -> Iterator[Part]:
    """All parts between the verdict and the runs that have something to show, in reading order."""
    found = evidence.found
    yield from differences(found)
    yield results(found)
    for part in (quality, learning_curves, domains):
        yield from part(found)
    yield from samples(evidence)
    yield from adapter_differences(evidence)


def page(evidence: Evidence, title: str | None = None) -> str:
    """The page. Equal run folders give equal pages, byte for byte, with one version of the libraries.

    Raises:
        ConfigError: the extra `html` is not installed.
    """
    found, shown = evidence.found, list(parts(evidence))
    specs = {
        f"{part.key}-{n}": {**chart.spec, "description": chart.alt}
        for part in shown
        for n, chart in enumerate(part.charts)
    }
    said = verdicts(found)
    return render(
        "comparison.html.jinja",
        specs,
        styles=["comparison.css"],
        scripts=["comparison.js"],
        found=found,
        title=title or f"{Path(found.model).name} on {Path(found.data).name}",
        overall=overall(found),
        verdicts=said,
        warnings=warnings(found),
        facts=[(what, value) for what, value in facts(found) if value],
        parts=shown,
        kinds=list(dict.fromkeys(each.kind for each in said)),
        run_columns=columns(found),
        groups=groups(found),
        recipes=recipes(evidence),
        versions=listed([f"{name} {version}" for name, version in found.versions.items()]),
    )


@dataclass(frozen=True)
class Report(Record):
    """A page that was written."""

    path: str
    verdict: str
    """The sentence over all methods."""
    warnings: list[str]
    """What to know before believing it, a sentence each."""
    comparison: Comparison

    def record(self) -> dict[str, Any]:
        """The report as plain data, its comparison as that has itself."""
        return super().record() | {"comparison": self.comparison.record()}


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    baseline: str | None,
    metric: str | None,
    title: str | None,
    routers: bool,
    overwrite: bool,
) -> Report:
    """See `weftlora.report`."""
    check_extra()
    check_place(out, overwrite)  # before the work, not after
    found = judged(load(_folders(runs)), baseline, metric)
    write(page(gather(found, routers), title), out, overwrite)
    return Report(str(out), overall(found), warnings(found), found)


def _folders(runs: Sequence[str | Path]) -> list[str | Path]:
    for folder in runs:
        if not Path(folder).is_dir():
            raise RunError(f"there is no folder {str(folder)!r}: give a comparison's folder, or run folders.")
    return list(runs)


def judged(found: Comparison, baseline: str | None, metric: str | None) -> Comparison:
    """The comparison by another baseline or metric, if one is given.

    Raises:
        ConfigError: no method or score of that name.
        RunError: a complete run lacks the score.
    """
    if baseline is None and metric is None:
        return found
    names = [method.name for method in found.methods]
    if baseline is not None and baseline not in names:
        raise ConfigError(f"there is no method {baseline!r} in {found.folder}: {suggest(baseline, names)}")
    known = [found.metric, *(name for name in other_metrics(found) if name in METRICS)]
    if metric is not None and metric not in known:
        raise ConfigError(f"the runs in {found.folder} have no score {metric!r}: {suggest(metric, known)}")
    base, by = baseline or found.baseline, metric or found.metric
    higher = METRICS[by].higher
    made = rows(found.methods, found.outcomes, by, higher, base)
    return replace(found, baseline=base, metric=by, higher_is_better=higher, rows=made)
