"""Looking at what was trained: inside one adapter (`weftlora.inspect`), and at many runs on one page.

    weftlora.report("runs/comparison", out="report.html")     a comparison's folder
    weftlora.report("runs/a", "runs/b", out="report.html")    run folders of one model and data set

Heavy modules load on the first call, not on import.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from weftlora.errors import RunError
from weftlora.extras import needs

if TYPE_CHECKING:
    from weftlora.report.comparison.page import Report


def report(
    *runs: str | Path,
    out: str | Path = "report.html",
    baseline: str | None = None,
    metric: str | None = None,
    title: str | None = None,
    routers: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write one offline page about runs: the verdict first, and every number linked to the run it comes from.

    The page is a pure function of the folders: equal folders give an equal page, with one version of the libraries.

    Args:
        runs: a comparison's folder, or run folders of one model and data set.
        out: the file, written whole or not at all; an earlier page is replaced.
        baseline: the method that the others are held against, instead of the comparison's own (plain LoRA).
        metric: what the verdicts are about, instead of the comparison's own: loss, exact_match, accuracy, macro_f1, bleu, rouge_l.
        title: the heading, instead of model and data.
        routers: also show what the routers of HydraLoRA do in each domain, in one run per method. This alone needs the base.
        overwrite: replace `out` even if it is no page of weftlora.

    Returns:
        The path, the sentence over all methods, and the comparison itself.

    Raises:
        RunError: no such folder, a damaged one, runs that cannot be compared, or a file that cannot be written.
        ConfigError: no such method or metric.
        MissingExtraError: the extra `report` is not installed.
    """
    if urls := [str(run) for run in runs if "://" in str(run)]:
        raise RunError(
            f"{urls[0]} is not a folder of this machine: bring it here first, with weftlora compare {urls[0]} --fetch --out FOLDER."
        )
    if missing := [str(run) for run in runs if not Path(run).exists()]:
        raise RunError(f"there is no folder {missing[0]!r}: give a comparison's folder, or run folders.")
    with needs("report", "weftlora.report"):
        from weftlora.report.comparison.page import write_report

        return write_report(runs, out, baseline, metric, title, routers, overwrite)


class _Callable(ModuleType):
    """`weftlora.report` is a package and the public function: importing the first must not hide the second."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
