"""A comparison on a Ray cluster: Ray places workers and replaces those whose node is gone; `weftlora.compare.working` does the rest.

    weftlora compare R.yaml --engine ray --address HOST:6379

A worker is a task with the CPUs and the share of a GPU that a run needs. It claims runs by leases in the comparison's folder, which
every node mounts, or in a store; so nothing of the comparison's state is in Ray, and neither a node, nor the driver, nor the cluster
itself is needed for what was done to count. The driver that is started again goes on.

What workers say is in logs/ there, a file of each, and the driver says it on as it comes.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weftlora.compare import results, working
from weftlora.compare.engine import Engine, Resources, Told
from weftlora.compare.leases import LOOKS, Files
from weftlora.compare.plan import Plan
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Comparison
from weftlora.compare.running import LOGS, Queue, Watch
from weftlora.compare.storing import Store, answering
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
    store: str | None = None,
) -> Comparison:
    """See `weftlora.compare.compare` with engine="ray".

    Args:
        address: of the cluster; None starts one on this machine.
        jobs: workers; None is as many as the cluster has room for.
        gpus: share of a GPU of each; None is a whole one where the plan was made on one.
        store: where results, leases, adapters and logs go, where the nodes do not mount the folder.

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
    place = store or str(folder)
    with answering(place):
        plan = working.planned(recipe, lease, store)
        shared = None if store is None else Store(store)
        heard = Heard(Files(f"{place}/{LOGS}"))
    needed = Resources(float(plan.recipe["train"]["num_threads"]), _gpus(plan, gpus))
    began_here = not ray.is_initialized()
    _connect(ray, address)

    def look() -> bool:
        if shared is not None:
            shared.bring(plan.every_run(), folder)
        standing = Queue(plan, folder, lambda standing: None).standing()
        for line in heard.lines():
            watch(dataclasses.replace(standing, said=line))
        watch(standing)
        return False

    try:
        given = recipe.model_dump(mode="json", exclude_unset=True) | {"out": str(folder)}
        task = (_work, given, str(recipe.base_dir), store, lease, os.getcwd())
        every = LOOK_EVERY if store is None else lease / LOOKS
        cluster = Cluster(ray, needed, jobs or _room(ray, needed), task, every)
        workers = iter(range(cluster.count))
        with answering(place):
            cluster.run(lambda: next(workers, None), lambda worker, tick: None, look)
    finally:
        if began_here:
            ray.shutdown()
    if cluster.failed and Queue(plan, folder, lambda standing: None).left:
        raise RunError(cluster.failed)
    return results.read(folder)


class Cluster(Engine[int]):
    """Workers, by their number, as tasks that Ray places where there is room for what each needs, and again where a node is gone."""

    def __init__(
        self, ray: Any, needed: Resources, count: int, task: tuple[Any, ...], every: float = LOOK_EVERY
    ) -> None:
        function, *self.given = task
        self.ray, self.count, self.every = ray, count, every
        self.task = ray.remote(max_retries=-1, num_cpus=needed.cpus, num_gpus=needed.gpus)(function)
        self.at_work: dict[Any, int] = {}
        self.failed = ""
        """What the last worker that failed has said; the others go on."""

    def submit(self, job: int) -> None:
        self.at_work[self.task.remote(*self.given)] = job

    def watch(self, told: Told[int]) -> None:
        done, _ = self.ray.wait(list(self.at_work), timeout=self.every)
        for each in done:
            try:
                self.ray.get(each)
            except self.ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, WeftError) else None
                self.failed = str(cause) if cause else f"a worker failed: {' '.join(str(error).split())[-300:]}"
            told(self.at_work.pop(each), None)

    def cancel(self) -> None:
        for each in self.at_work:
            self.ray.cancel(each, force=True)
        self.at_work.clear()


def _work(given: dict[str, Any], base_dir: str, store: str | None, lease: float, place: str) -> None:
    """A worker's task, on some node."""
    if os.path.isdir(place):
        os.chdir(place)
    folder = Path(given["out"])
    if store is None:
        if not (folder / "compare.json").is_file():
            raise RunError(
                f"{folder} is not on this node: put the comparison on a disk that all nodes mount, or give --store."
            )
        with _written_down(f"{folder}/{LOGS}"):
            working.work(folder, (), _unwatched, lease)
        return
    with tempfile.TemporaryDirectory(prefix="weftlora-") as own, _written_down(f"{store}/{LOGS}"):
        recipe = CompareRecipe.read(given | {"out": own}, base_dir=Path(base_dir))
        working.work(recipe, (), _unwatched, lease, store)


class _Log(logging.Handler):
    """What a worker says, in a file of its own; one that cannot be written is no reason to stop."""

    def __init__(self, logs: str) -> None:
        super().__init__()
        self.files, self.name_of_it = Files(logs), f"{socket.gethostname()}-{os.getpid()}{ENDING}"
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record) + "\n")
        with suppress(OSError):
            self.files.write(self.name_of_it, "".join(self.lines))


@contextmanager
def _written_down(logs: str) -> Iterator[None]:
    """What this process says, in a file for the driver."""
    ours, before = logging.getLogger("weftlora"), logging.getLogger("weftlora").level
    handler: logging.Handler = logging.NullHandler()
    with suppress(OSError, RunError):
        handler = _Log(logs)
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


ENDING = ".log"


class Heard:
    """What workers write into their logs from now on."""

    def __init__(self, logs: Files) -> None:
        self.logs = logs
        self.heard: dict[str, int] = {}
        """Log → how many of its lines are known."""
        self.lines()

    def lines(self) -> list[str]:
        """The lines that have come, each with its worker's name. Raises OSError."""
        found = []
        for name in sorted(name for name in self.logs.names() if name.endswith(ENDING)):
            lines = (self.logs.read(name) or "").splitlines()
            found += [f"{name.removesuffix(ENDING)} {line}" for line in lines[self.heard.get(name, 0) :]]
            self.heard[name] = len(lines)
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


def _room(ray: Any, needed: Resources) -> int:
    """How many workers fit onto the nodes, one by one: a task is on one node. Raises RunError where none does."""
    count = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        fits = [has.get("CPU", 0.0) // needed.cpus]
        if needed.gpus:
            fits.append(has.get("GPU", 0.0) // needed.gpus)
        count += int(min(fits))
    if not count:
        raise RunError(
            f"no node of the cluster has {needed.cpus:g} CPUs and {needed.gpus:g} GPUs for a run: add one, or ask "
            "for less with train.num_threads or --gpus."
        )
    return count
