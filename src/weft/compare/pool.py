"""Runs, several at once: one process each, with one torch thread, that lives no longer than the comparison.

The parent hands out one run at a time and hears of its progress and its end; what came out lies in the run's folder. A worker
that dies takes one run with it, which is written down as its problem, and another worker takes its place.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from weft.compare.plan import Job
from weft.compare.work import carry_out, give_up
from weft.errors import RunError
from weft.train.progress import Tick

TICK_EVERY = 0.2
"""Seconds between two reports of a worker."""

Next = Callable[[], Job | None]
Told = Callable[[Job, Tick | None], None]
"""A run has begun or come on (a tick), or has ended (None)."""


def here(top: Path, following: Next, told: Told) -> None:
    """The runs one after the other in this process, on one torch thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while (job := following()) is not None:
            told(job, Tick("start", 0, 1))
            carry_out(job, top, lambda tick, job=job: told(job, tick))  # type: ignore[misc]
            told(job, None)
    finally:
        torch.set_num_threads(threads)


class Pool:
    """`count` workers; use `run` once, inside a `with`."""

    def __init__(self, count: int, top: Path, lock: int) -> None:
        self.count, self.top, self.lock = count, top, lock
        self.workers: dict[Connection, Any] = {}
        self.busy: dict[Connection, Job] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        """End every worker; a run that is cut short goes on the next time."""
        for process in self.workers.values():
            process.terminate()
        for process in self.workers.values():
            process.join()

    def run(self, following: Next, told: Told) -> None:
        """Hand out runs until `following` gives none and all have ended. Raises RunError if a worker cannot start."""
        while True:
            while len(self.busy) < self.count and (job := following()) is not None:
                idle = next((each for each in self.workers if each not in self.busy), None) or self._hired()
                idle.send(job)
                self.busy[idle] = job
                told(job, Tick("start", 0, 1))
            if not self.busy:
                return
            for connection in wait(list(self.busy)):
                self._hear(connection, told)  # type: ignore[arg-type]

    def _hear(self, connection: Connection, told: Told) -> None:
        job = self.busy[connection]
        try:
            said = connection.recv()
        except (EOFError, OSError):
            process = self.workers.pop(connection)
            process.join()
            give_up(self.top / job.folder, "failed", f"its process {_end(process.exitcode)}.")
            said = None
        if said is None:
            del self.busy[connection]
        elif isinstance(said, RunError):
            raise said
        told(job, said)

    def _hired(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read once, when a library is loaded
        try:
            process = context.Process(target=_work, args=(theirs, DupFd(self.lock), str(self.top)), daemon=True)
            process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        self.workers[ours] = process
        return ours


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"
    return f"ended with code {code}"


def _work(connection: Connection, lock: Any, top: str) -> None:
    """A worker's life: runs as they come, until the parent ends it or is gone."""
    lock.detach()  # held for as long as this process lives
    threading.Thread(target=_follow_the_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what is said of an adapter was said when it was planned
    logging.getLogger("weft").setLevel(logging.ERROR)
    disable_progress_bar()
    set_verbosity_error()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        said = [0.0]

        def tell(tick: Tick, said: list[float] = said) -> None:
            if time.monotonic() - said[0] > TICK_EVERY:
                said[0] = time.monotonic()
                connection.send(tick)

        try:
            carry_out(job, Path(top), tell)
        except RunError as error:
            connection.send(error)
            return
        connection.send(None)


def _follow_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
