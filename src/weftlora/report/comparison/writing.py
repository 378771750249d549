"""From run folders to a page on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weftlora.compare import load
from weftlora.compare.metrics import METRICS
from weftlora.compare.record import Comparison
from weftlora.compare.rows import rows
from weftlora.errors import ConfigError, RunError, suggest
from weftlora.report.comparison.evidence import gather
from weftlora.report.comparison.opening import overall, warnings
from weftlora.report.comparison.page import page
from weftlora.report.comparison.results import other_metrics
from weftlora.report.web import check_extra, check_place, write


@dataclass(frozen=True)
class Report:
    """A page that was written."""

    path: str
    verdict: str
    """The sentence over all methods."""
    warnings: list[str]
    """What to know before believing it, a sentence each."""
    comparison: Comparison

    def record(self) -> dict[str, Any]:
        """The report as plain data; `--json` prints it."""
        return {
            "path": self.path,
            "verdict": self.verdict,
            "warnings": self.warnings,
            "comparison": self.comparison.record(),
        }


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
