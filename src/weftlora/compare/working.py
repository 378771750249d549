"""One of many workers on a comparison: claims a run, carries it out, and again, until none is left.

    weftlora compare R.yaml --worker                                on every machine that reaches the folder; no scheduler is needed
    weftlora compare R.yaml --worker --store s3://bucket/prefix     on machines that share nothing but this

Any number of them, started and killed at any time. Which runs are left is read from the folders each time, as `weftlora compare`
does; who runs which is in `leases/`. A worker that has nothing to do waits, for a rate that others choose or for one of them to
be lost. With a store every worker has a folder of its own, into which what others have ended is brought before it looks
(`weftlora.compare.storing`), and from which what it has done is put there.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from weftlora.compare import results, workers
from weftlora.compare.engine import LOOK_EVERY, Engine, Told
from weftlora.compare.leases import LOOKS, TTL, Claims, Files, Lease, name_of, this_process
from weftlora.compare.methods import check_saved, contenders
from weftlora.compare.plan import Job, Plan, check_rows, make
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Comparison
from weftlora.compare.running import LEASES, RESULT, Queue, Watch, check_place, check_same, has_plan
from weftlora.compare.storing import Store, newest_step, said
from weftlora.disk.files import read_json, write_json, writing
from weftlora.disk.lock import NAME, holder, holding, is_held
from weftlora.errors import ConfigError, RunError
from weftlora.progress import Tick
from weftlora.settings import is_number

T = TypeVar("T")
log = logging.getLogger(__name__)
PLAN = "plan"
"""The job of making the plan, where there is none yet: one worker does it."""


def work(
    source: str | Path | CompareRecipe,
    overrides: tuple[str, ...],
    watch: Watch,
    ttl: float = TTL,
    store: str | None = None,
) -> Comparison:
    """Be a worker until no run is left that one could begin; what the comparison says then.

    Args:
        source: a comparison's recipe, its file, or the folder of one that has its plan.
        ttl: seconds after which a worker that is not heard of is taken for lost; the same for all of them.
        store: where results, leases and adapters go, where workers do not share the folder.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work.
        RunError: a `weftlora compare` is in charge of the folder, or it cannot be reached or written.
    """
    if not is_number(ttl) or not 1 <= ttl <= 86400:
        raise ConfigError(f"a lease of {ttl!r} seconds cannot be held: give 1 to 86400.")
    recipe: CompareRecipe | None = None
    if not isinstance(source, CompareRecipe) and (Path(source) / "compare.json").is_file():
        if overrides or store is not None:
            wrong = overrides[0] if overrides else f"--store {store}"
            raise ConfigError(
                f"{source} is a comparison with its plan, to which {wrong} cannot be added: leave it out, or give the recipe."
            )
        folder = Path(source)
    else:
        recipe = CompareRecipe.read(source, *overrides)
        folder = _checked(recipe)
    place = store or str(folder)
    with ExitStack() as held:
        try:
            worker = _worker(folder, ttl, watch, store)
            if store is not None:
                held.enter_context(holding(folder, "weftlora compare --worker"))
            worker.work(_planned(folder, recipe, worker))
            found = results.read(folder)
            write_json(folder / RESULT, found.record())
            if worker.store is not None:
                worker.store.put(folder, RESULT)
        except OSError as error:
            what = "" if store else "the leases of "
            raise RunError(
                f"{what}{place} cannot be reached: {said(error)}; give the same command again once it can."
            ) from None
    return found


def _check_free(folder: Path) -> None:
    if is_held(folder):
        raise RunError(
            f"{folder} is in use by {holder(folder / NAME)}, which runs everything itself: wait for it to end, or stop it and start "
            "workers only."
        )


def _planned(folder: Path, recipe: CompareRecipe | None, worker: Leased) -> Plan:
    """The plan, made by the one worker who claims that; the others wait for it."""
    while not worker.has_plan():
        assert recipe is not None
        lease = worker.claims.claim([PLAN])
        if lease is None:
            worker.pause()
            continue
        made = make(recipe)  # raises what cannot work; the lease runs out, and the next worker says the same
        if not worker.has_plan():
            made.save(folder)
            if worker.store is not None:
                worker.store.put(folder, "compare.json")
        worker.claims.end(lease)
        return made
    plan = Plan.load(folder)
    if recipe is not None:
        check_same(plan, recipe, folder)
        check_rows(plan, recipe)
        if worker.store is not None:  # it was made on another machine
            plan = dataclasses.replace(plan, base_dir=str(recipe.base_dir))
    check_saved(contenders(recipe.methods) if recipe is not None else [], plan.methods, plan.draws)
    return plan


def planned(recipe: CompareRecipe, ttl: float = TTL, store: str | None = None) -> Plan:
    """The plan of a comparison that workers are to be started on, made where there is none. Raises as `work` does."""
    folder = _checked(recipe)
    return _planned(folder, recipe, _worker(folder, ttl, lambda standing: None, store))


def _checked(recipe: CompareRecipe) -> Path:
    """The folder of a comparison that can begin or go on there."""
    recipe.check_places()
    folder = Path(recipe.out).expanduser()
    check_place(folder, recipe, False)
    return folder


def _worker(folder: Path, ttl: float, watch: Watch, store: str | None = None) -> Leased:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if store is None:
        _check_free(folder)
    shared = None if store is None else Store(store)
    return Leased(
        folder,
        Claims(Files(str(folder / LEASES)) if shared is None else shared.leases, this_process(), ttl),
        watch,
        shared,
    )


class Leased(Engine[Job]):
    """Runs on which nobody else is at work, one at a time: each under a lease, and in the store too where there is one."""

    count = 1

    def __init__(self, folder: Path, claims: Claims, watch: Watch, store: Store | None) -> None:
        self.folder, self.claims, self.told_of, self.store = folder, claims, watch, store
        self.at_work: dict[Any, tuple[Job, Any]] = {}
        self.gone: set[str] = set()
        """The folders of runs that have ended while they were ours, whatever came of them."""

    def has_plan(self) -> bool:
        """Whether there is a plan, which is then in the folder."""
        return has_plan(self.folder) if self.store is None else self.store.bring_plan(self.folder) is not None

    def pause(self) -> None:
        """Wait for others."""
        time.sleep(self.claims.ttl / LOOKS)

    def work(self, plan: Plan) -> None:
        """Runs until none is left but those that have ended badly."""
        with self.ready():
            self.run(lambda: self.claimed(plan), lambda job, tick: self.queue.told(job, tick))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within this, runs can be carried out."""
        held = os.open(os.devnull, os.O_RDONLY)  # in place of the lock of one comparison in charge
        try:
            with workers.Pool(1, self.folder, held) as self.processes:
                self.processes.warm()  # a claim is not renewed meanwhile
                self.at_work = self.processes.at_work
                yield
        finally:
            os.close(held)

    def claimed(self, plan: Plan) -> Job | None:
        """The next run, once a lease of it is ours; None where none is left that one could begin."""
        while True:
            if self.store is None:
                _check_free(self.folder)
            unsent = self._brought(plan)
            self.queue = Queue(plan, self.folder, self.told_of)
            left = [*unsent, *(job for job in self.queue.waiting if job.folder not in self.gone)]
            wanted = {name_of(job.folder): job for job in left}
            if not wanted:
                return None
            lease = self.claims.claim(wanted)
            if lease is None:
                if not self.claims.unended(wanted):  # they failed, and are left to a `weftlora compare`
                    return None
                self.pause()
                continue
            job, self.claim = wanted[lease.job], _Claimed(self.claims, lease)
            if job not in unsent:
                log.info("%s: %s", job.folder, "begun" if lease.n == 0 else "taken over")
                return job
            log.info("%s: it is put into the store", job.folder)
            self._ended(job)

    def _brought(self, plan: Plan) -> list[Job]:
        """Have what others have ended in our folder; the runs that ended here and are not in the store yet."""
        if self.store is None:
            return []
        ended = self.store.bring(plan.every_run(), self.folder)
        here = (job for job in plan.every_job() if job.folder not in ended)
        final = ("complete", "diverged")
        return [job for job in here if workers.status(self.folder / job.folder, job.tuning, job.frozen) in final]

    def submit(self, job: Job) -> None:
        store, folder = self.store, self.folder
        if store is not None:
            self.claim.during(lambda: store.go_on(job.folder, folder))
            self.sending = _Sending(store, job, self.claim.lease, folder, self.claim)
        self.processes.submit(job)

    def watch(self, told: Told[Job]) -> None:
        is_lost = self.claim.is_lost() if self.store is None else self.sending.is_over()
        if is_lost:
            [(job, _)] = self.at_work.values()
            self.cancel()
            self._come_to(job)
            return

        def heard(job: Job, tick: Tick | None) -> None:
            told(job, tick)
            if tick is None:
                self._come_to(job)
                self._ended(job)

        self.processes.watch(heard)

    def cancel(self) -> None:
        self.processes.cancel()

    def _come_to(self, job: Job) -> None:
        """Say what came of a run."""
        if self.store is not None:
            self.claim.during(self.sending.end)
        if self.claim.lost:
            said = "stopped, since its lease could not be renewed or was taken over"
        else:
            said = workers.status(self.folder / job.folder, job.tuning, job.frozen)
            if said in ("diverged", "failed"):
                said += f": {read_json(self.folder / job.folder / workers.PROBLEM).get('problem')}"
        log.info("%s: %s", job.folder, said)

    def _ended(self, job: Job) -> None:
        """Put a run that has ended into the store, and its lease aside, as long as it is ours."""
        store, claim, folder = self.store, self.claim, self.folder
        if claim.lost or not (
            store is None
            or claim.during(lambda: store.put_run(job.folder, claim.lease.n, folder, "ended", lambda: not claim.lost))
        ):
            return
        self.gone.add(job.folder)
        self.claims.end(claim.lease)


class _Claimed:
    """A lease of ours, for as long as it is."""

    def __init__(self, claims: Claims, lease: Lease) -> None:
        self.claims, self.lease, self.lost = claims, lease, False

    def is_lost(self) -> bool:
        """Renew it where it is time to, and whether that came too late."""
        self.lost = self.lost or not self.claims.renew(self.lease)
        return self.lost

    def during(self, call: Callable[[], T]) -> T:
        """What a call gives that may take long, while the lease is renewed. Raises what it raises."""
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(call)
            while not made.done():
                self.is_lost()
                wait([made], LOOK_EVERY)
        return made.result()


class _Sending:
    """Puts a run's newest checkpoint into the store while it goes on, one at a time; where that fails, the next one counts."""

    def __init__(self, store: Store, job: Job, lease: Lease, folder: Path, claim: _Claimed) -> None:
        self.store, self.job, self.lease, self.folder, self.claim = store, job, lease, folder, claim
        self.sent, self.thread = newest_step(folder / job.folder), threading.Thread()

    def is_over(self) -> bool:
        """Whether the lease is lost; asked now and then while the run is at work."""
        step = newest_step(self.folder / self.job.folder)
        if step > self.sent and not self.thread.is_alive():
            self.sent = step
            self.thread = threading.Thread(target=self._send, daemon=True)
            self.thread.start()
        return self.claim.is_lost()

    def end(self) -> None:
        """Wait for what is on its way."""
        if self.thread.ident is not None:
            self.thread.join()

    def _send(self) -> None:
        try:
            self.store.put_run(self.job.folder, self.lease.n, self.folder, "begun", lambda: not self.claim.lost)
        except (OSError, RunError) as error:
            log.warning("a checkpoint of %s could not be put into %s: %s", self.job.folder, self.store.place, error)
