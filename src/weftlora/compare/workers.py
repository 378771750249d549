"""The runs of a comparison, several at once: each in a process of its own, from wherever a kill has left it to its scores.

A server process imports everything once and forks a process for every run, with one torch thread, so that a run begins at once,
finds a memory that no other run has used, and takes none but itself with it when it dies. None lives longer than the comparison.
The parent hears of a run's progress; what came out is in its folder, and a run looks at no other:

    complete   run.json says so, and a reported run has eval-test.json
    begun      it goes on from its newest checkpoint; what cannot go on starts again
    problem    problem.json says why there will be no scores: diverged (final), or failed (tried again the next time)

Two locks on the comparison's folder keep two processes from ever writing one run. What counts is who holds them:

    .weft-lock     held by the `weftlora compare` that is in charge, as in every folder; a second one is refused
    workers.lock   handed on to its workers: it is free only when the last of them has gone, which a comparison that goes on
                   after a kill waits for
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import weftlora.train as training
from weftlora.compare.engine import BEGUN, LOOK_EVERY, Engine, Told
from weftlora.compare.methods import seeded
from weftlora.compare.plan import Job
from weftlora.compare.record import Status
from weftlora.disk.files import read_json, write_json, writing
from weftlora.disk.lock import NAME, holding
from weftlora.disk.ownership import delete, inside, of_run
from weftlora.errors import DivergedError, RunError, WeftError
from weftlora.progress import Progress, Tick
from weftlora.runs.recipe import Recipe
from weftlora.runs.run import LOSSES, Run
from weftlora.train.evaluation import Evaluation

NAMES = (NAME, "workers.lock")


@contextlib.contextmanager
def in_charge(folder: Path) -> Iterator[int]:
    """Be the only comparison in `folder`, which exists; yields the descriptor that workers hold on to.

    Raises:
        RunError: another one is at work there.
    """
    with holding(folder, "weftlora compare"):
        with writing(folder / NAMES[1]):
            descriptor = os.open(folder / NAMES[1], os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


SCORES = "eval-test.json"
PROBLEM = "problem.json"


def status(folder: Path, tuning: bool, frozen: bool = False) -> Status:
    """How far a run is; `missing` is one that has not ended."""
    if (folder / PROBLEM).is_file():
        found: Status | None = read_json(folder / PROBLEM).get("status")
        if found not in ("diverged", "failed"):
            raise RunError(f"{folder / PROBLEM} is damaged: delete it, and the run is tried again.")
        return found
    if not frozen and not _is_trained(folder):
        return "missing"
    return "complete" if tuning or (folder / SCORES).is_file() else "missing"


def _is_trained(folder: Path) -> bool:
    return (folder / "run.json").is_file() and Run.load(folder).status == "complete"


def carry_out(job: Job, top: Path, progress: Progress) -> None:
    """Train and measure a run. What goes wrong in it is written beside it as its problem; only the disk's refusal is raised.

    Raises:
        RunError: not even the problem could be written.
    """
    folder = inside(top, job.folder)
    try:
        (folder / PROBLEM).unlink(missing_ok=True)
        _carry_out(job, folder, progress)
    except WeftError as error:
        kind = "diverged" if isinstance(error, DivergedError) or _has_diverged(folder) else "failed"
        give_up(folder, kind, str(error))
    except Exception as error:
        give_up(folder, "failed", f"{type(error).__name__}: {error}", traceback.format_exc())


def give_up(folder: Path, kind: str, problem: str, trace: str = "") -> None:
    """Write down why a run has no scores. Raises RunError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / PROBLEM, {"status": kind, "problem": " ".join(problem.split())} | ({"trace": trace} if trace else {})
    )


def _carry_out(job: Job, folder: Path, progress: Progress) -> None:
    adapter = seeded(job.recipe["adapter"], job.seed)
    recipe = Recipe.read({**job.recipe, "adapter": adapter, "out": str(folder)}, base_dir=Path(job.base_dir))
    if job.frozen:
        evaluation = training.evaluate(recipe, adapter="none", answers=job.answers, progress=progress)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SCORES, _finite(evaluation).record())
        return
    if not _is_trained(folder):
        training.train(recipe, resume=_can_go_on(folder), progress=progress)
    if not job.tuning and not (folder / SCORES).is_file():
        _finite(training.evaluate(Run.load(folder), answers=job.answers, progress=progress))


def _can_go_on(folder: Path) -> bool:
    """Whether a begun run can be resumed; one that cannot is deleted, so that it starts anew."""
    if not folder.exists():
        return False
    with contextlib.suppress(RunError):
        if Run.load(folder).adapter["peft_type"] != "ADALORA":
            return True
    with writing(folder):
        delete(of_run(folder, vouched=True), folder)
    return False


def _finite(evaluation: Evaluation) -> Evaluation:
    if not math.isfinite(evaluation.scores.loss):
        raise DivergedError(f"the loss of the test rows is {evaluation.scores.loss}: lower the rate.")
    return evaluation


def _has_diverged(folder: Path) -> bool:
    """Whether a loss that was logged is no number: whatever failed after that failed of it."""
    with contextlib.suppress(RunError):
        rows: list[dict[str, Any]] = Run.load(folder).history()
        return any(not math.isfinite(row[key]) for row in rows for key in LOSSES if key in row)
    return False


TICK_EVERY = 0.2
"""Seconds between two reports of a run."""
IMPORTED = (
    *("weftlora.compare.workers", "weftlora.train.loop", "weftlora.train.evaluation", "weftlora.train.costs"),
    *("sklearn.metrics", "sacrebleu.metrics.bleu", "rouge_score.rouge_scorer"),
)
"""What the server imports, so that no run has to: ours, and what scores are counted with (seconds)."""


class InThisProcess(Engine[Job]):
    """The runs one after the other in this process, on one torch thread. Raises what `carry_out` raises."""

    count = 1

    def __init__(self, top: Path) -> None:
        self.top = top
        self.at_work: list[Job] = []

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def submit(self, job: Job) -> None:
        self.at_work.append(job)

    def watch(self, told: Told[Job]) -> None:
        import torch

        job, threads = self.at_work[0], torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            carry_out(job, self.top, lambda tick: told(job, tick))
        finally:
            torch.set_num_threads(threads)
        self.at_work.clear()
        told(job, None)

    def cancel(self) -> None:
        self.at_work.clear()


def here(jobs: int, top: Path, lock: int) -> InThisProcess | Pool:
    """The engine of this machine for so many runs at once, 0 for none but this process."""
    return Pool(jobs, top, lock) if jobs else InThisProcess(top)


class Pool(Engine[Job]):
    """A process a run, each of which holds on to the descriptor `lock`. Use it inside a `with`."""

    def __init__(self, count: int, top: Path, lock: int) -> None:
        self.count, self.top, self.lock = count, top, _Held(lock)
        self.context = multiprocessing.get_context("forkserver")
        self.at_work: dict[Connection, tuple[Job, Any]] = {}

    def __enter__(self) -> Pool:
        models = [name for name in sys.modules if ".modeling_" in name]  # the one that was planned on is among them
        self.context.set_forkserver_preload([*IMPORTED, *models])
        with _environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"):  # read once, when a library is loaded
            forkserver.ensure_running()
        return self

    def warm(self) -> None:
        """Wait until the server has imported everything, so that the first run begins at once too."""
        process = self.context.Process(target=_nothing, daemon=True)
        with _unnamed_main():
            process.start()
        process.join()

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def submit(self, job: Job) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_life, args=(theirs, self.lock, self.top, job), daemon=True)
        with _unnamed_main():
            process.start()
        theirs.close()
        self.at_work[ours] = (job, process)

    def watch(self, told: Told[Job]) -> None:
        for connection in wait(list(self.at_work), LOOK_EVERY):
            self._hear(cast(Connection, connection), told)

    def cancel(self) -> None:
        for _, process in self.at_work.values():
            process.terminate()
        for _, process in self.at_work.values():
            process.join()
        self.at_work.clear()

    def _hear(self, connection: Connection, told: Told[Job]) -> None:
        job, process = self.at_work[connection]
        try:
            said = connection.recv()
        except EOFError:
            said = None
        if isinstance(said, RunError):
            raise said
        if said is None:
            process.join()
            del self.at_work[connection]
            if process.exitcode != 0:
                give_up(self.top / job.folder, "failed", f"its process {_end(process.exitcode)}.")
        told(job, said)


@dataclass(frozen=True)
class _Held:
    """A descriptor that arrives in another process as one of its own."""

    descriptor: int

    def __reduce__(self) -> Any:
        return _arrived, (DupFd(self.descriptor),)


def _arrived(sent: Any) -> _Held:
    return _Held(sent.detach())


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """These variables for a while, for a process that is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _unnamed_main() -> Iterator[None]:
    """Nothing for a process to import as the caller's script: it would run that again, and needs none of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end(code: int) -> str:
    if code < 0:
        hint = ", perhaps because memory ran out" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"
    return f"ended with code {code}"


def _life(parent: Connection, lock: _Held, top: Path, job: Job) -> None:
    """A process's life: one run. `lock` is held for as long as it lives."""
    threading.Thread(target=_follow_the_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    gc.freeze()  # what the server imported is here to stay: looking through it takes most of a second each time
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what is to be said of an adapter was said when it was planned
    logging.getLogger("weftlora").setLevel(logging.ERROR)
    disable_progress_bar()
    set_verbosity_error()
    last = -TICK_EVERY

    def tell(tick: Tick) -> None:
        nonlocal last
        if time.monotonic() - last > TICK_EVERY:
            last = time.monotonic()
            parent.send(tick)

    parent.send(BEGUN)  # again: what came before was the server's start
    try:
        carry_out(job, top, tell)
    except RunError as error:
        parent.send(error)


def _nothing() -> None:
    """A process that only shows that one can begin."""


def _follow_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
