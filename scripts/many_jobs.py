"""Ten thousand runs on a hundred machines that fail, through the claims of `weftlora compare --worker`, with a clock that is not real.

    python scripts/many_jobs.py --out evidence/many-jobs.json [--jobs 10000 --nodes 100]

A discrete simulation: nodes, their deaths, their restarts and the minutes in which one does not reach the storage are drawn from
a seed; claims, renewals and takeovers are `weftlora.compare.leases.Claims` as it is, on a storage in memory that counts what it
is asked. Times of runs are lognormal; a run that is taken over goes on from its last checkpoint. Whoever is at work on what is
noted at every event, so a job that two nodes are at work on at once would be seen. No training and no network is simulated: a
storage answers at once.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weftlora.compare.leases import BEATS, LOOKS, Claims, Lease

HOUR = 3600.0


@dataclass(frozen=True)
class World:
    """What is simulated; times in seconds."""

    jobs: int = 10_000
    nodes: int = 100
    mean: float = HOUR
    spread: float = 0.5
    """Standard deviation of the logarithm of a run's time."""
    checkpoint: float = 0.2 * HOUR
    dies: float = 24 * HOUR
    """Mean time between two deaths of a node."""
    back: float = 600.0
    """How long a dead node is away."""
    cut_off: float = 48 * HOUR
    """Mean time between two times that a node does not reach the storage."""
    away: float = 900.0
    """Mean length of that."""
    ttl: float = 300.0
    skew: float = 0.01
    """Clocks run faster or slower by up to this share."""
    seed: int = 0


class Shared:
    """The storage: a dictionary, with counts of what was asked."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.asked: Counter[str] = Counter()


@dataclass
class Reach:
    """The storage as one node reaches it, or does not."""

    shared: Shared
    is_away: bool = False

    def _ask(self, what: str) -> None:
        if self.is_away:
            raise OSError("no route to storage")
        self.shared.asked[what] += 1

    def create(self, name: str, text: str) -> bool:
        self._ask("create")
        if name in self.shared.files:
            return False
        self.shared.files[name] = text
        return True

    def write(self, name: str, text: str) -> None:
        self._ask("write")
        self.shared.files[name] = text

    def read(self, name: str) -> str | None:
        self._ask("read")
        return self.shared.files.get(name)

    def names(self) -> list[str]:
        self._ask("list")
        return list(self.shared.files)


@dataclass
class Node:
    """A machine with one worker, or none while it is dead."""

    number: int
    rate: float
    reach: Reach
    claims: Claims
    lives: int = 0
    lease: Lease | None = None
    began: float = 0.0
    waited: float = 0.0
    idle_since: float | None = 0.0


@dataclass
class Simulation:
    """The world as it goes on; `run` is all of it."""

    world: World
    now: float = 0.0
    shared: Shared = field(default_factory=Shared)

    def __post_init__(self) -> None:
        world = self.world
        self.random = random.Random(world.seed)
        mu = math.log(world.mean) - world.spread**2 / 2
        self.needs = {f"job-{n}": self.random.lognormvariate(mu, world.spread) for n in range(world.jobs)}
        self.left = dict(self.needs)
        """Job → seconds that it still takes from its last checkpoint; a job that has ended is not in it."""
        self.at_work: dict[str, set[int]] = {name: set() for name in self.needs}
        self.counts: Counter[str] = Counter()
        self.lost = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.nodes = [self._node(number) for number in range(world.nodes)]
        for node in self.nodes:
            self._at(0.0, node, self._look)
            self._later(world.dies, lambda node=node: self._die(node))  # type: ignore[misc]
            self._later(world.cut_off, lambda node=node: self._cut(node))  # type: ignore[misc]

    def _node(self, number: int) -> Node:
        rate = 1 + self.random.uniform(-self.world.skew, self.world.skew)
        reach = Reach(self.shared)
        claims = Claims(reach, f"node-{number}", self.world.ttl, lambda: 1e6 * number + rate * self.now)
        return Node(number, rate, reach, claims)

    def _later(self, mean: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + self.random.expovariate(1 / mean), next(self.order), what))

    def _at(self, after: float, node: Node, what: Callable[[Node], None]) -> None:
        life = node.lives

        def still_alive() -> None:
            if node.lives == life:
                what(node)

        heapq.heappush(self.events, (self.now + after, next(self.order), still_alive))

    # ------------------------------------------------------------------ what a worker does

    def _look(self, node: Node) -> None:
        try:
            node.lease = node.claims.claim(self.left) if self.left else None
        except OSError:
            node.lease = None
        if node.lease is None:
            if self.left:
                self._at(self.world.ttl / LOOKS, node, self._look)
            return
        if node.idle_since is not None:
            node.waited += self.now - node.idle_since
            node.idle_since = None
        self.counts["takeovers"] += node.lease.n > 0
        self.at_work[node.lease.job].add(node.number)
        self.counts["most workers on one job"] = max(
            self.counts["most workers on one job"], len(self.at_work[node.lease.job])
        )
        node.began = self.now
        self._at(self.left[node.lease.job], node, self._finish)
        self._at(self.world.ttl / BEATS / node.rate, node, self._beat)

    def _beat(self, node: Node) -> None:
        if node.lease is None:
            return
        if node.claims.renew(node.lease):
            self._at(self.world.ttl / BEATS / node.rate, node, self._beat)
            return
        self.counts["runs that a fence stopped"] += 1
        self._stop(node)
        node.lives += 1  # what was due of this run is not
        self._at(0.0, node, self._look)

    def _finish(self, node: Node) -> None:
        if node.lease is None:
            return
        job, lease = node.lease.job, node.lease
        self.at_work[job].discard(node.number)
        self.counts["runs that ended twice"] += job not in self.left
        self.left.pop(job, None)
        node.lease, node.idle_since = None, self.now
        node.lives += 1
        if not self.left:
            self.ended = self.now
        try:
            node.claims.end(lease)
        except OSError:
            self.counts["ends that were not written"] += 1
        self._at(0.0, node, self._look)

    def _stop(self, node: Node) -> None:
        """Its run is cut where it is: what it did since its last checkpoint is lost."""
        if node.lease is None:
            return
        job, done = node.lease.job, self.now - node.began
        self.at_work[job].discard(node.number)
        if job in self.left:
            kept = done - done % self.world.checkpoint
            self.left[job] -= kept
            self.lost += done - kept
        node.lease, node.idle_since = None, self.now

    # ------------------------------------------------------------------ what happens to it

    def _die(self, node: Node) -> None:
        self.counts["deaths"] += 1
        self._stop(node)
        node.lives += 1
        node.claims = Claims(
            node.reach, f"{node.claims.owner}'", self.world.ttl, node.claims.now
        )  # started again, it knows nothing
        self._at(self.world.back, node, self._look)
        self._later(self.world.dies, lambda: self._die(node))

    def _cut(self, node: Node) -> None:
        self.counts["times cut off"] += 1
        node.reach.is_away = True

        def back() -> None:
            node.reach.is_away = False

        self._later(self.world.away, back)
        self._later(self.world.cut_off, lambda: self._cut(node))

    def run(self) -> dict[str, Any]:
        """All of it, as a record."""
        self.ended = math.nan
        while self.left:
            self.now, _, what = heapq.heappop(self.events)
            what()
        work = sum(self.needs.values())
        asked = dict(sorted(self.shared.asked.items()))
        return {
            "hours": round(self.ended / HOUR, 2),
            "hours_without_failures": round(work / self.world.nodes / HOUR, 2),
            "work_done_twice": round(self.lost / work, 5),
            "waiting": round(sum(node.waited for node in self.nodes) / (self.ended * self.world.nodes), 5),
            "asked_of_storage": asked,
            "asked_per_job": round(sum(asked.values()) / self.world.jobs, 1),
            "asked_per_second": round(sum(asked.values()) / self.ended, 2),
            **{name.replace(" ", "_"): count for name, count in sorted(self.counts.items())},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=100)
    given = parser.parse_args()
    world = World(jobs=given.jobs, nodes=given.nodes)
    quiet = World(jobs=given.jobs, nodes=given.nodes, dies=1e12, cut_off=1e12)
    record = {
        "command": f"python scripts/many_jobs.py --out evidence/many-jobs.json --jobs {given.jobs} --nodes {given.nodes}",
        "world": vars(world),
        "found": Simulation(world).run(),
        "without failures": Simulation(quiet).run(),
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
