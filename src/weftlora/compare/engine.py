"""Where jobs are carried out: the protocol of every engine, small enough that a cluster's own scheduler can be one.

    workers.InThisProcess, workers.Pool   on this machine       a job is a run
    working.Leased                        beside others         a job is a run, under a lease that nobody else has
    on_ray.Cluster                        on a Ray cluster      a job is a worker, which claims runs by itself

An engine is made for jobs of one kind: what each of them needs (`Resources`) and how many there may be at once are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Protocol, TypeVar

from weftlora.progress import Tick

J = TypeVar("J")
Told = Callable[[J, Tick | None], None]
"""A job has begun or come on (a tick), or has ended (None)."""
BEGUN = Tick("start", 0, 1)
Over = Callable[[], bool]
"""Whether what is at work is to be stopped where it is: it goes on the next time."""
LOOK_EVERY = 0.5
"""Seconds between two looks at whether it is over."""


def never() -> bool:
    """Stop nothing."""
    return False


@dataclass(frozen=True)
class Resources:
    """What a job has for itself."""

    cpus: float = 1.0
    gpus: float = 0.0
    """Below 1: a share of one."""


class Engine(Protocol[J]):
    """Carries out jobs, up to `count` at once."""

    count: int
    at_work: Sized
    """The jobs that have been submitted and have not ended."""

    def submit(self, job: J) -> None:
        """Begin a job."""

    def watch(self, told: Told[J]) -> None:
        """Wait for a moment, and tell which of the jobs at work have come on, and which have ended, however they did.

        Raises:
            RunError: the disk refuses, so that nothing can be carried out.
        """

    def cancel(self) -> None:
        """End what is at work where it is."""

    def run(self, following: Callable[[], J | None], told: Told[J], over: Over = never) -> None:
        """Carry out what `following` gives until it gives none and all have ended, or it is `over`, which cancels those at work.

        Raises what `watch` raises.
        """
        while not over():
            while len(self.at_work) < self.count and (job := following()) is not None:
                self.submit(job)
                told(job, BEGUN)
            if not self.at_work:
                return
            self.watch(told)
        self.cancel()
