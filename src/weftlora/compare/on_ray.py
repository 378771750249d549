"""A comparison on a Ray cluster: Ray places workers and replaces those whose node is gone; `weftlora.compare.working` does the rest.

    weftlora compare R.yaml --engine ray --address HOST:6379

A worker is a task with the CPUs and the share of a GPU that a run needs. It claims runs by leases in the comparison's folder, which
every node mounts; so nothing of the comparison's state is in Ray, and neither a node, nor the driver, nor the cluster itself is needed
for what was done to count. The driver that is started again goes on.

What workers say is in logs/ in that folder, a file of each, and the driver says it on as it comes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weftlora.compare import results, working
from weftlora.compare.plan import Plan
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Comparison
from weftlora.compare.running import LOGS, Queue, Watch
from weftlora.errors import ConfigError, RunError, WeftError
from weftlora.extras import needs
from weftlora.settings import is_number

PATIENCE = 10.0
"""Seconds in which a cluster has to answer."""
_PLACE = re.compile(r"(?P<host>[^/:]+):(?P<port>\d{1,5})")
log = logging.getLogger(__name__)
LOOK_EVERY = 2.0
"""Seconds between two looks at how far it is."""


def compare(
    recipe: CompareRecipe,
    address: str | None,
    jobs: int | None,
    gpus: float | None,
    watch: Watch,
    lease: float,
) -> Comparison:
    """See `weftlora.compare.compare` with engine="ray".

    Args:
        address: of the cluster; None starts one on this machine.
        jobs: workers; None is as many as the cluster has room for.
        gpus: share of a GPU of each; None is a whole one where the plan was made on one.

    Raises:
        RunError: no cluster answers, or has room for a worker; or every worker has failed, with what the last one said.
        ConfigError: jobs or gpus that mean nothing.
    """
    if gpus is not None and not (is_number(gpus) and 0 <= gpus <= 64 and (gpus <= 1 or gpus == int(gpus))):
        raise ConfigError(
            f"gpus={gpus!r} is not a share of a GPU for a run: give 0, a share such as 0.25, or a whole number."
        )
    with needs("ray", "weftlora compare --engine ray"):
        import ray
    folder = Path(recipe.out).expanduser().resolve()
    plan = working.planned(recipe, lease)
    needed = {"num_cpus": float(plan.recipe["train"]["num_threads"]), "num_gpus": _gpus(plan, gpus)}
    began_here = not ray.is_initialized()
    _connect(ray, address)
    try:
        heard = Heard(folder / LOGS)
        count = jobs or _room(ray, needed)
        worker = ray.remote(max_retries=-1, **needed)(_work)
        at_work = [worker.remote(str(folder), lease, os.getcwd()) for _ in range(count)]
        _follow(ray, at_work, plan, folder, watch, heard)
    finally:
        if began_here:
            ray.shutdown()
    return results.read(folder)


def _work(folder: str, lease: float, place: str) -> None:
    """A worker's task, on some node."""
    if os.path.isdir(place):
        os.chdir(place)
    if not (Path(folder) / "compare.json").is_file():
        raise RunError(f"{folder} is not on this node: put the comparison on a disk that all nodes mount.")
    with _written_down(Path(folder) / LOGS):
        working.work(folder, (), _unwatched, lease)


@contextmanager
def _written_down(logs: Path) -> Iterator[None]:
    """What this process says, in a file for the driver; a worker that cannot write one works all the same."""
    ours, before = logging.getLogger("weftlora"), logging.getLogger("weftlora").level
    handler: logging.Handler = logging.NullHandler()
    with suppress(OSError):
        logs.mkdir(exist_ok=True)
        handler = logging.FileHandler(logs / f"{socket.gethostname()}-{os.getpid()}{ENDING}", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    except WeftError as error:
        log.error("%s", error)
        raise
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)
        handler.close()


ENDING = ".log"


class Heard:
    """What workers write into their logs from now on."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.read = {path: path.stat().st_size for path in logs.glob(f"*{ENDING}")}

    def lines(self) -> list[str]:
        """The whole lines that have come, each with its worker's name."""
        found = []
        for path in sorted(self.logs.glob(f"*{ENDING}")):
            with suppress(OSError), path.open("rb") as file:
                file.seek(self.read.get(path, 0))
                text = file.read()
                whole = text[: text.rfind(b"\n") + 1]
                self.read[path] = self.read.get(path, 0) + len(whole)
                found += [f"{path.stem} {line}" for line in whole.decode("utf-8", "replace").splitlines()]
        return found


def _unwatched(standing: object) -> None:
    """Nobody watches a worker: the driver reads the folders."""


def _connect(ray: Any, address: str | None) -> None:
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if ray.is_initialized():
        return
    try:
        if found := _PLACE.fullmatch(address or ""):  # Ray itself would try for minutes
            socket.create_connection((found["host"], int(found["port"])), timeout=PATIENCE).close()
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=False)
    except (ValueError, OverflowError, RuntimeError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise RunError(
            f"no Ray cluster answers at {address or 'this machine'} ({said}): start one with ray start --head, or check --address."
        ) from None


def _gpus(plan: Plan, asked: float | None) -> float:
    if asked is not None:
        return float(asked)
    return 0.0 if plan.device == "cpu" else 1.0


def _room(ray: Any, needed: dict[str, float]) -> int:
    """How many workers fit onto the nodes, one by one: a task is on one node. Raises RunError where none does."""
    count = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        fits = [has.get("CPU", 0.0) // needed["num_cpus"]]
        if needed["num_gpus"]:
            fits.append(has.get("GPU", 0.0) // needed["num_gpus"])
        count += int(min(fits))
    if not count:
        raise RunError(
            f"no node of the cluster has {needed['num_cpus']:g} CPUs and {needed['num_gpus']:g} GPUs for a run: add one, or ask "
            "for less with train.num_threads or --gpus."
        )
    return count


def _follow(ray: Any, at_work: list[Any], plan: Plan, folder: Path, watch: Watch, heard: Heard) -> None:
    """Tell how far it is, and what workers say, until every worker has ended.

    Raises:
        RunError: runs are left and no worker is, with what the last of those that failed said. While others are at work they go on.
    """
    left, failed = list(at_work), ""
    while left:
        done, left = ray.wait(left, timeout=LOOK_EVERY)
        for each in done:
            try:
                ray.get(each)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, WeftError) else None
                failed = str(cause) if cause else f"a worker failed: {' '.join(str(error).split())[-300:]}"
        standing = Queue(plan, folder, lambda standing: None).standing()
        for line in heard.lines():
            watch(dataclasses.replace(standing, said=line))
        watch(standing)
    if failed and standing.done < standing.total:
        raise RunError(failed)
