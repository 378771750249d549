"""Runs, several at once: each in a process of its own, with one torch thread, that lives no longer than the comparison.

A server process imports everything once and forks a process for every run, so that a run begins at once, finds a memory that no
other run has used, and takes none but itself with it when it dies. The parent hears of a run's progress; what came out lies in
its folder.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from weftlora.compare.plan import Job
from weftlora.compare.work import carry_out, give_up
from weftlora.errors import RunError
from weftlora.train.progress import Tick

TICK_EVERY = 0.2
"""Seconds between two reports of a run."""
IMPORTED = (
    *("weftlora.compare.work", "weftlora.train.loop", "weftlora.train.evaluation", "weftlora.train.figures"),
    *("sklearn.metrics", "sacrebleu.metrics.bleu", "rouge_score.rouge_scorer"),
)
"""What the server imports, so that no run has to: ours, and what scores are counted with (seconds)."""

Next = Callable[[], Job | None]
Told = Callable[[Job, Tick | None], None]
"""A run has begun or come on (a tick), or has ended (None)."""
BEGUN = Tick("start", 0, 1)


def here(top: Path, following: Next, told: Told) -> None:
    """The runs one after the other in this process, on one torch thread. Raises what `carry_out` raises."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while (job := following()) is not None:
            told(job, BEGUN)
            carry_out(job, top, lambda tick, job=job: told(job, tick))  # type: ignore[misc]
            told(job, None)
    finally:
        torch.set_num_threads(threads)


class Pool:
    """Up to `count` processes at once, each of which holds on to the descriptor `lock`. Use `run` inside a `with`."""

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

    def __exit__(self, *error: object) -> None:
        """End what is still at work; a run that is cut short goes on the next time."""
        for _, process in self.at_work.values():
            process.terminate()
        for _, process in self.at_work.values():
            process.join()

    def run(self, following: Next, told: Told) -> None:
        """Carry out what `following` gives until it gives none and all have ended. Raises RunError if the disk refuses."""
        while True:
            while len(self.at_work) < self.count and (job := following()) is not None:
                self._start(job)
                told(job, BEGUN)
            if not self.at_work:
                return
            for connection in wait(list(self.at_work)):
                self._hear(cast(Connection, connection), told)

    def _start(self, job: Job) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_life, args=(theirs, self.lock, self.top, job), daemon=True)
        with _unnamed_main():
            process.start()
        theirs.close()
        self.at_work[ours] = (job, process)

    def _hear(self, connection: Connection, told: Told) -> None:
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
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
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

    try:
        carry_out(job, top, tell)
    except RunError as error:
        parent.send(error)


def _follow_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
