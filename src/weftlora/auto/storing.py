"""A search in storage that outlives this machine: what has ended is put there at once, and the next machine goes on from that.

    auto.json, clock.json, found.json, export/, ...     the search's own files, as in its folder
    takes/, search/..., finalists/runs/...              its runs that have ended: see `weftlora.compare.storing`
    leases/search-<k>.<n>.lease                         who is at work, one machine at a time: see `weftlora.compare.leases`

The k-th start of a search that was stopped by itself is the k-th job; one that nobody has heard of is taken over under its number.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weftlora.auto.plan import NAME
from weftlora.compare.leases import BEATS, LOOKS, TTL, Claims, Files, Lease, run_of, this_process
from weftlora.compare.storing import Store, answering
from weftlora.compare.workers import status
from weftlora.disk.files import file_stamp, read_json, replacing, writing
from weftlora.disk.ownership import of_export
from weftlora.errors import RunError
from weftlora.foreign_text import from_json

FOUND, CLOCK, FINALISTS, EXPORT, RECIPE = "found.json", "clock.json", "finalists", "export", "recipe.yaml"
FILES = (NAME, CLOCK, RECIPE, "report.html", "finalists.html", f"{FINALISTS}/compare.json", FOUND)
"""The search's own, in the order in which they come to be there: the last says that it has ended."""
SAME = ("hashes", "methods", "steps", "size", "lr", "r")
"""What two plans of one search have in common."""
PATIENCE = 1.5
"""Of a lease's time, how long we wait for one that is not renewed."""


class Kept:
    """The storage of a search, and our lease of it."""

    def __init__(self, place: str, folder: Path, ttl: float) -> None:
        self.place, self.folder = place.rstrip("/"), folder
        self.store = Store(place)
        self.exports, self.finalists = Files(f"{self.place}/{EXPORT}"), Files(f"{self.place}/{FINALISTS}")
        self.claims = Claims(self.store.leases, this_process(), ttl)
        self.lost, self.over = False, threading.Event()
        self.stamps: dict[str, Any] = {}
        """File → what it was when it was put there."""
        self.sent: set[str] = set()
        """The runs that are there."""

    def claim(self) -> Lease:
        """Be the only one at work on the search. Raises OSError, and RunError where another machine is."""
        k, end = 0, time.monotonic() + PATIENCE * self.claims.ttl
        while (lease := self.claims.claim([f"search-{k}"])) is None:
            if not self.claims.unended([f"search-{k}"]):
                k += 1
            elif time.monotonic() > end:
                raise RunError(f"another machine is at work on the search at {self.place}: wait for it, or stop it.")
            else:
                time.sleep(self.claims.ttl / LOOKS)
        return lease

    def renew(self, lease: Lease) -> None:
        """Renew the lease until it is lost, or all is over."""
        while not self.lost and not self.over.wait(self.claims.ttl / BEATS / 2):
            self.lost = not self.claims.renew(lease)

    def bring(self) -> None:
        """Have in our folder what is there. Raises OSError, and RunError where the folder holds another search."""
        there = {*self.store.top.names(), *(f"{FINALISTS}/{name}" for name in self.finalists.names())}
        for name in (name for name in FILES if name in there):
            if name in (NAME, CLOCK) and (self.folder / name).is_file():
                ours, theirs = read_json(self.folder / name), self._said(name)
                if name == NAME and any(ours.get(key) != theirs.get(key) for key in SAME):
                    raise RunError(f"{self.folder} holds another search than {self.place}: choose another with --out.")
                if name == CLOCK and ours.get("spent", 0.0) >= theirs.get("spent", 0.0):
                    continue
            self._download(name)
        for name in self.exports.names():
            if not (self.folder / EXPORT / name).is_file():
                self._download(f"{EXPORT}/{name}")
        ended = [run_of(take.job) for take in self.store.latest().values() if take.state == "ended"]
        self.sent = self.store.bring(ended, self.folder, whole=True)

    def put(self, lease: Lease) -> None:
        """Put there what has come to be here. Raises OSError, and RunError where another machine has taken over."""
        for run in self._ended():
            if self.store.put_run(run, lease.n, self.folder, "ended", lambda: not self.lost):
                self.sent.add(run)
        exported = [path.relative_to(self.folder).as_posix() for path in of_export(self.folder / EXPORT)]
        for name in (*exported, *FILES):
            path = self.folder / name
            if path.is_file() and self.stamps.get(name) != (stamp := file_stamp(path)) and not self.lost:
                self.store.top.upload(path, name)
                self.stamps[name] = stamp
        if self.lost:
            raise RunError(
                f"another machine has taken over the search at {self.place}, or the store could not be reached for too long: give "
                "the same command again to continue from what is there."
            )

    def _ended(self) -> Iterator[str]:
        """The runs that have ended here and are not there; what failed is tried again."""
        for form, is_search in (("search/*/*", True), (f"{FINALISTS}/runs/*/*", False)):
            for path in sorted(self.folder.glob(form)):
                run = path.relative_to(self.folder).as_posix()
                if run not in self.sent and status(path, is_search) in ("complete", "diverged"):
                    yield run

    def _said(self, name: str) -> dict[str, Any]:
        """What a file there says. Raises RunError if it is damaged."""
        try:
            return dict(from_json(self.store.top.read(name) or "{}"))
        except (ValueError, TypeError):
            raise RunError(f"{self.place}/{name} is damaged: delete it, or choose another --store.") from None

    def _download(self, name: str) -> None:
        path = self.folder / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            self.store.top.download(name, file)


@contextmanager
def kept(place: str | None, folder: Path, ttl: float = TTL) -> Iterator[Callable[[], None]]:
    """A search in a folder, which is brought from `place` first where one is given, and is ours alone meanwhile.

    Gives what puts there what has come to be here, which raises RunError.

    Raises:
        RunError: the storage cannot be reached or is damaged, another machine is at work there, or the folder holds another search.
    """
    if place is None:
        yield lambda: None
        return
    with answering(place):
        held = Kept(place, folder, ttl)
        lease = held.claim()
    beating = threading.Thread(target=held.renew, args=(lease,), daemon=True)
    beating.start()
    try:
        with answering(place):
            held.bring()

        def keep() -> None:
            with answering(place):
                held.put(lease)

        yield keep
        keep()
    finally:
        held.over.set()
        beating.join()
        with suppress(OSError):
            if not held.lost:
                held.claims.end(lease)
