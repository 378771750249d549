"""One of many workers on a comparison: claims a run, carries it out, and again, until none is left.

    weftlora compare R.yaml --worker        on every machine that reaches the folder; no scheduler is needed

Any number of them, started and killed at any time. Which runs are left is read from the folders each time, as `weftlora compare`
does; who runs which is in `leases/`. A worker that has nothing to do waits, for a rate that others choose or for one of them to
be lost.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

from weftlora.compare import results, workers
from weftlora.compare.leases import LOOKS, TTL, Claims, Files, Lease, name_of
from weftlora.compare.methods import check_saved, contenders
from weftlora.compare.plan import Job, Plan, check_rows, make
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Comparison
from weftlora.compare.running import LEASES, RESULT, Queue, Watch, check_place, check_same, has_plan
from weftlora.disk.files import write_json, writing
from weftlora.disk.lock import NAME, holder, is_held
from weftlora.errors import ConfigError, RunError
from weftlora.settings import is_number

PLAN = "plan"
"""The job of making the plan, where there is none yet: one worker does it."""


def work(source: str | Path, overrides: tuple[str, ...], watch: Watch, ttl: float = TTL) -> Comparison:
    """Be a worker until no run is left that one could begin; what the comparison says then.

    Args:
        source: a comparison's recipe, or the folder of one that has its plan.
        ttl: seconds after which a worker that is not heard of is taken for lost; the same for all of them.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work.
        RunError: a `weftlora compare` is in charge of the folder, or it cannot be reached or written.
    """
    if not is_number(ttl) or not 1 <= ttl <= 86400:
        raise ConfigError(f"a lease of {ttl!r} seconds cannot be held: give 1 to 86400.")
    if (Path(source) / "compare.json").is_file():
        if overrides:
            raise ConfigError(
                f"{source} is a comparison with its plan, which {overrides[0]} cannot change: leave it out."
            )
        folder, recipe = Path(source), None
    else:
        recipe = CompareRecipe.read(source, *overrides)
        folder = _checked(recipe)
    worker = _worker(folder, ttl, watch)
    try:
        worker.work(_planned(folder, recipe, worker))
    except OSError as error:
        raise RunError(
            f"the leases of {folder} cannot be reached: {error.strerror or error}; give the same command again once they can."
        ) from None
    found = results.read(folder)
    write_json(folder / RESULT, found.record())
    return found


def _check_free(folder: Path) -> None:
    if is_held(folder):
        raise RunError(
            f"{folder} is in use by {holder(folder / NAME)}, which runs everything itself: wait for it to end, or stop it and start "
            "workers only."
        )


def _planned(folder: Path, recipe: CompareRecipe | None, worker: _Worker) -> Plan:
    """The plan, made by the one worker who claims that; the others wait for it."""
    while not has_plan(folder):
        assert recipe is not None
        lease = worker.claims.claim([PLAN])
        if lease is None:
            worker.pause()
            continue
        made = make(recipe)  # raises what cannot work; the lease runs out, and the next worker says the same
        if not has_plan(folder):
            made.save(folder)
        worker.claims.end(lease)
        return made
    plan = Plan.load(folder)
    if recipe is not None:
        check_same(plan, recipe, folder)
        check_rows(plan, recipe)
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


def _worker(folder: Path, ttl: float, watch: Watch) -> _Worker:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _check_free(folder)
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return _Worker(folder, Claims(Files(str(folder / LEASES)), owner, ttl), watch)


class _Worker:
    def __init__(self, folder: Path, claims: Claims, watch: Watch) -> None:
        self.folder, self.claims, self.watch = folder, claims, watch

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
                    _check_free(self.folder)
                    queue = Queue(plan, self.folder, self.watch)
                    wanted = {name_of(job.folder): job for job in queue.waiting if job.folder not in gone}
                    if not wanted:
                        return
                    lease = self.claims.claim(wanted)
                    if lease is None:
                        if not self.claims.unended(wanted):  # they failed, and are left to a `weftlora compare`
                            return
                        self.pause()
                        continue
                    job = wanted[lease.job]
                    if self._carry_out(processes, queue, job, lease):
                        gone.add(job.folder)
                        self.claims.end(lease)
        finally:
            os.close(held)

    def _carry_out(self, processes: workers.Pool, queue: Queue, job: Job, lease: Lease) -> bool:
        """A run under its lease; whether it ended while that was ours."""
        following = iter([job])
        lost = False

        def over() -> bool:
            nonlocal lost
            lost = lost or not self.claims.renew(lease)
            return lost

        processes.run(lambda: next(following, None), queue.told, over)
        return not lost
