"""Which adapter for my task and budget: methods trained side by side on the same seeds, and what can be said of them.

    weftlora.compare("compare.yaml", jobs=2)         train, measure, decide; goes on where it was stopped
    weftlora.compare.work("compare.yaml")            one of many workers, on as many machines
    weftlora.compare.load("runs/comparison")         what a folder says, as far as it has come
    weftlora.compare.fetch("s3://bucket/prefix", "runs/comparison")     what workers have put into an object store

Heavy modules load on the first call, not on import.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from weftlora.compare.record import Comparison, Interval, Method, Outcome, Rate, Row, Verdict
from weftlora.errors import ConfigError, RunError, suggest
from weftlora.extras import needs

if TYPE_CHECKING:
    from weftlora.compare.recipe import CompareRecipe
    from weftlora.compare.running import Watch

__all__ = ["Comparison", "Interval", "Method", "Outcome", "Rate", "Row", "Verdict", "compare", "fetch", "load", "work"]

LEASE = 60.0
"""Seconds after which a worker that is not heard of is taken for lost."""


def compare(
    recipe: str | Path | Mapping[str, Any] | CompareRecipe,
    *overrides: str,
    jobs: int | Literal["auto"] = 1,
    overwrite: bool = False,
    watch: Watch | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    gpus: float | None = None,
    store: str | None = None,
) -> Comparison:
    """Compare methods on one model and data set: choose each one's rate, train it with every seed, and say what holds.

    A comparison that was stopped, at whatever point, goes on where it was; runs that failed are tried again. A run that fails or
    diverges is a result (its `Outcome`), not the end.

    Args:
        recipe: a comparison's file, a mapping or a `CompareRecipe`.
        overrides: `key=value` with dots, such as `budget.r=4`; values are YAML.
        jobs: runs at once, each in a process of its own with one torch thread. 0: in this process, one after the other, where a
            run's peak memory includes what those before it have left. "auto": as many as this machine's cores and free memory have
            room for. Scores are the same whatever the number.
        overwrite: delete the comparison in `out` and start anew.
        watch: called with a `weftlora.compare.running.Standing` whenever a run has come on.
        engine: "ray" carries the runs out on a Ray cluster whose nodes mount the folder; `jobs` is then the number of workers, and 1
            or "auto" as many as there is room for.
        address: of that cluster; None starts one on this machine.
        gpus: with Ray, the share of a GPU that a run gets; None is a whole one where the model is on one.
        store: with Ray, a URL as for `work`, where its nodes do not mount the folder: `out` has results, `fetch` brings adapters.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work; nothing was trained.
        RunError: the folder is in use by another comparison, holds something else, or cannot be written.
    """
    with needs("compare", "weftlora.compare"):
        from weftlora.compare.recipe import CompareRecipe

        read = CompareRecipe.read(recipe, *overrides)
        read.check_places()
        if engine not in ("local", "ray"):
            raise ConfigError(f"there is no engine {engine!r}: {suggest(str(engine), ['local', 'ray'])}")
        if engine == "local" and (address or gpus is not None or store):
            raise ConfigError(
                "address, gpus and store are of a Ray cluster: give engine=ray (--engine ray) with them, or --worker with --store."
            )
        if engine == "ray":
            if overwrite:
                raise ConfigError(
                    "engine=ray does not overwrite a comparison: delete the folder, or choose another (out, --out)."
                )
            from weftlora.compare import at_once, on_ray, running

            at_once.check(jobs)
            count = None if jobs == "auto" or jobs <= 1 else jobs
            return on_ray.compare(read, address, count, gpus, watch or running.ignore, LEASE, store)
        from weftlora.compare import running

        return running.compare(read, (), jobs, overwrite, watch or running.ignore)


def work(
    recipe: str | Path,
    *overrides: str,
    lease: float = LEASE,
    watch: Watch | None = None,
    store: str | None = None,
) -> Comparison:
    """Be one of many workers on a comparison, until no run is left that this one could begin.

    Start it on every machine that reaches the folder: each run is claimed by a lease that its worker renews, and is taken over
    where it stopped once a worker has not been heard of for `lease` seconds. Runs that fail are not tried again by workers.

    Args:
        recipe: a comparison's file, or the folder of one that has been planned.
        overrides: as for `compare`.
        lease: seconds, the same for all workers.
        watch: as for `compare`.
        store: a URL that fsspec knows, such as s3://bucket/prefix, where workers do not share the folder: leases, results, adapters
            and checkpoints to go on from are there, `out` is a folder of this worker alone, and the recipe is the same everywhere.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work; nothing was trained.
        RunError: a `weftlora compare` runs everything itself there, or the folder or the store cannot be reached or written.
    """
    with needs("compare", "weftlora.compare.work"):
        from weftlora.compare import running, working

        return working.work(recipe, overrides, watch or running.ignore, lease, store)


def fetch(store: str, folder: str | Path) -> Comparison:
    """Bring what workers have put into a store into a folder: every run that has ended, with its adapter.

    The folder is a comparison as any other then, for `weftlora.report`, `inspect` and `export`. What is there already is not
    brought again.

    Args:
        store: as for `work`.
        folder: a new one, or that of an earlier call.

    Raises:
        RunError: there is no comparison, the store cannot be reached or is damaged, or the folder holds something else.
    """
    with needs("compare", "weftlora.compare.fetch"):
        from weftlora.compare import results, storing

        place = Path(folder).expanduser()
        storing.fetch(store, place)
        return results.read(place)


def load(paths: str | Path | Sequence[str | Path]) -> Comparison:
    """What is in a comparison's folder, as far as it has come, or what plain run folders say together.

    Args:
        paths: one comparison's folder, or the URL of its store; or run folders of one model and data set, of which those that differ
            in seed and folder only are one method. The baseline is plain LoRA, where there is one.

    Raises:
        RunError: a folder is neither, is damaged, or its runs are of other rows or another base than the rest.
        ConfigError: two runs of one method and seed.
    """
    from weftlora.compare import results, storing

    if storing.is_url(paths):
        with tempfile.TemporaryDirectory(prefix="weftlora-") as place:
            storing.fetch(str(paths), Path(place), whole=False)
            return replace(results.read(Path(place)), folder=str(paths))
    given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not given:
        raise RunError("there is nothing to compare: give a comparison's folder, or run folders.")
    if len(given) == 1 and (given[0] / "compare.json").is_file():
        return results.read(given[0])
    if mixed := [path for path in given if (path / "compare.json").is_file()]:
        raise RunError(f"{mixed[0]} is a comparison: give it alone, or run folders only.")
    return results.gather(given)


class _Callable(ModuleType):
    """`weftlora.compare` is a package and the public function: importing the first must not hide the second."""

    def __call__(self, *args: Any, **kwargs: Any) -> Comparison:
        return compare(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
