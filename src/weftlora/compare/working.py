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
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from weftlora.compare import results, workers
from weftlora.compare.leases import LOOKS, TTL, Claims, Files, Lease, name_of
from weftlora.compare.methods import check_saved, contenders
from weftlora.compare.plan import Job, Plan, check_rows, make
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Comparison
from weftlora.compare.running import LEASES, RESULT, Queue, Watch, check_place, check_same, has_plan
from weftlora.compare.storing import Store, newest_step, said
from weftlora.disk.files import read_json, write_json, writing
from weftlora.disk.lock import NAME, holder, holding, is_held
from weftlora.errors import ConfigError, RunError
from weftlora.settings import is_number

T = TypeVar("T")
log = logging.getLogger(__name__)
PLAN = "plan"
"""The job of making the plan, where there is none yet: one worker does it."""


def work(
    source: str | Path, overrides: tuple[str, ...], watch: Watch, ttl: float = TTL, store: str | None = None
) -> Comparison:
    """Be a worker until no run is left that one could begin; what the comparison says then.

    Args:
        source: a comparison's recipe, or the folder of one that has its plan.
        ttl: seconds after which a worker that is not heard of is taken for lost; the same for all of them.
        store: where results, leases and adapters go, where workers do not share the folder.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work.
        RunError: a `weftlora compare` is in charge of the folder, or it cannot be reached or written.
    """
    if not is_number(ttl) or not 1 <= ttl <= 86400:
        raise ConfigError(f"a lease of {ttl!r} seconds cannot be held: give 1 to 86400.")
    recipe: CompareRecipe | None = None
    if (Path(source) / "compare.json").is_file():
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


def _planned(folder: Path, recipe: CompareRecipe | None, worker: _Worker) -> Plan:
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


def planned(recipe: CompareRecipe, ttl: float = TTL) -> Plan:
    """The plan of a comparison that workers are to be started on, made where there is none. Raises as `work` does."""
    folder = _checked(recipe)
    return _planned(folder, recipe, _worker(folder, ttl, lambda standing: None))


def _checked(recipe: CompareRecipe) -> Path:
    """The folder of a comparison that can begin or go on there."""
    recipe.check_places()
    folder = Path(recipe.out).expanduser()
    check_place(folder, recipe, False)
    return folder


def _worker(folder: Path, ttl: float, watch: Watch, store: str | None = None) -> _Worker:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if store is None:
        _check_free(folder)
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    shared = None if store is None else Store(store)
    return _Worker(
        folder, Claims(Files(str(folder / LEASES)) if shared is None else shared.leases, owner, ttl), watch, shared
    )


class _Worker:
    def __init__(self, folder: Path, claims: Claims, watch: Watch, store: Store | None) -> None:
        self.folder, self.claims, self.watch, self.store = folder, claims, watch, store

    def has_plan(self) -> bool:
        """Whether there is a plan, which is then in the folder."""
        return has_plan(self.folder) if self.store is None else self.store.bring_plan(self.folder) is not None

    def pause(self) -> None:
        """Wait for others."""
        time.sleep(self.claims.ttl / LOOKS)

    def work(self, plan: Plan) -> None:
        """Runs until none is left but those that have ended badly."""
        held = os.open(os.devnull, os.O_RDONLY)  # in place of the lock of one comparison in charge
        gone: set[str] = set()
        try:
            with workers.Pool(1, self.folder, held) as processes:
                processes.warm()  # a claim is not renewed meanwhile
                while True:
                    if self.store is None:
                        _check_free(self.folder)
                    unsent = self._brought(plan)
                    queue = Queue(plan, self.folder, self.watch)
                    left = [*unsent, *(job for job in queue.waiting if job.folder not in gone)]
                    wanted = {name_of(job.folder): job for job in left}
                    if not wanted:
                        return
                    lease = self.claims.claim(wanted)
                    if lease is None:
                        if not self.claims.unended(wanted):  # they failed, and are left to a `weftlora compare`
                            return
                        self.pause()
                        continue
                    job = wanted[lease.job]
                    if self._carry_out(processes, queue, job, lease, job in unsent):
                        gone.add(job.folder)
                        self.claims.end(lease)
        finally:
            os.close(held)

    def _brought(self, plan: Plan) -> list[Job]:
        """Have what others have ended in our folder; the runs that ended here and are not in the store yet."""
        if self.store is None:
            return []
        jobs = plan.every_job()
        ended = self.store.bring(jobs, self.folder)
        here = (job for job in jobs if job.folder not in ended)
        final = ("complete", "diverged")
        return [job for job in here if workers.status(self.folder / job.folder, job.tuning, job.frozen) in final]

    def _carry_out(self, processes: workers.Pool, queue: Queue, job: Job, lease: Lease, is_done: bool) -> bool:
        """A run under its lease, in the store too where there is one; whether all of that ended while it was ours.

        Args:
            is_done: it has ended here, and is only to be put into the store.
        """
        claim, store, folder = _Claimed(self.claims, lease), self.store, self.folder
        following = iter([job])
        log.info(
            "%s: %s", job.folder, "it is put into the store" if is_done else "begun" if lease.n == 0 else "taken over"
        )
        if store is None:
            processes.run(lambda: next(following, None), queue.told, claim.is_lost)
            log.info("%s: %s", job.folder, self._outcome(job, claim))
            return not claim.lost
        if not is_done:
            claim.during(lambda: store.go_on(job, folder))
            sending = _Sending(store, job, lease, folder, claim)
            processes.run(lambda: next(following, None), queue.told, sending.is_over)
            claim.during(sending.end)
            log.info("%s: %s", job.folder, self._outcome(job, claim))
        return not claim.lost and claim.during(
            lambda: store.put_run(job, lease.n, folder, "ended", lambda: not claim.lost)
        )

    def _outcome(self, job: Job, claim: _Claimed) -> str:
        """What came of a run, in words."""
        if claim.lost:
            return "stopped, since its lease could not be renewed or was taken over"
        found = workers.status(self.folder / job.folder, job.tuning, job.frozen)
        file = self.folder / job.folder / workers.PROBLEM
        return found if found not in ("diverged", "failed") else f"{found}: {read_json(file).get('problem')}"


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
                wait([made], workers.LOOK_EVERY)
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
            self.store.put_run(self.job, self.lease.n, self.folder, "begun", lambda: not self.claim.lost)
        except (OSError, RunError) as error:
            log.warning("a checkpoint of %s could not be put into %s: %s", self.job.folder, self.store.place, error)
