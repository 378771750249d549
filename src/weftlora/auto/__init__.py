"""The best adapter for a file within a budget of time: rates, then methods, then a verdict over paired seeds, then a proved export.

    weftlora.auto("data.train=rows.jsonl", "model=path/to/model", "budget=2h")
    weftlora.auto("auto.yaml", jobs=2)              goes on where it was stopped

Heavy modules load on the first call, not on import.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from weftlora.auto.record import Found, Left, Tried
from weftlora.extras import needs

if TYPE_CHECKING:
    from weftlora.auto.running import Watch

__all__ = ["Found", "Left", "Tried", "auto"]


def auto(
    recipe: str | Path | Mapping[str, Any],
    *overrides: str,
    jobs: int | Literal["auto"] = 1,
    overwrite: bool = False,
    watch: Watch | None = None,
    store: str | None = None,
) -> Found:
    """Find an adapter for a model and rows within a budget of time, and export it for the server that will run it.

    A few steps of every method are timed, which says how many runs fit. Plain LoRA's rate is tuned first; then methods, each with
    the same few rates around it, by successive halving on validation loss; then the best of them and plain LoRA are trained on
    fresh paired seeds, and plain LoRA is kept unless one is better by an interval that leaves out 0. A search that was stopped,
    at whatever point, goes on where it was and ends with the same adapter: it decides by results and counts, and the clock only
    ends it.

    Args:
        recipe: a file, a mapping, or the first `key=value`.
        overrides: `key=value` with dots: `data.train`, `model`, `budget` (2h, 45m, 1h30m), `serve`, `metric`, `train.steps`, `out`.
        jobs: runs at once, each in a process of its own. 0: in this process, one after the other. "auto": as many as this machine's
            cores and free memory have room for.
        overwrite: delete the search in `out` and start again.
        watch: called with a `weftlora.auto.running.Standing` whenever something has come on.
        store: a URL that fsspec knows, such as s3://bucket/prefix, into which everything that has ended is put as it ends, so that
            the same call goes on from there on another machine.

    Returns:
        What was chosen, why, and what it cost; `report.html` in the folder shows it.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work, or the budget is too small for a
            verdict, which is said before the search starts.
        RunError: the folder is in use, holds something else, or cannot be written; the store cannot be reached, or another machine
            is at work on the search there; or no run gave an adapter.
    """
    with needs("auto", "weftlora.auto"):
        from weftlora.auto import running
        from weftlora.auto.recipe import AutoRecipe

        return running.auto(AutoRecipe.read(recipe, *overrides), jobs, overwrite, watch or running.ignore, store)


class _Callable(ModuleType):
    """`weftlora.auto` is a package and the public function: importing the first must not hide the second."""

    def __call__(self, *args: Any, **kwargs: Any) -> Found:
        return auto(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
