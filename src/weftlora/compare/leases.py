"""Which worker runs which job, on storage that many machines share and that has no locks.

    <job>.<n>.lease      the n-th claim of a job: made only if it is not there, rewritten with another beat while its owner lives

A job is claimed by the one who makes its next lease; storage lets only one of several do that. The owner renews it. A lease is
lost once its content has not changed for `ttl` seconds of the clock of whoever looks: clocks of two machines are never compared.
Then the next may be made, n + 1. An owner that could not renew for `FENCE` of that time takes itself for lost and stops, cut off
from storage as it may be, before anybody else can have begun; one that comes back finds the later claim and stops too. So a job
never runs twice into one folder, as long as clocks run at one speed within the quarter that `FENCE` leaves.

The storage is any that fsspec knows (a folder, s3://...) where making a file only if it is not there is one operation.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from weftlora.disk.ownership import temporary
from weftlora.errors import RunError
from weftlora.foreign_text import from_json

TTL = 60.0
"""Seconds after which a job whose owner has not been heard of is taken over."""
FENCE = 0.75
"""Of it, after which an owner that could not renew stops."""
LOOKS = 4
"""How often within `ttl` a worker that has nothing to do looks again."""
ENDING = ".lease"
BEATS = 5
"""How often a lease is renewed within `ttl`."""


class Storage(Protocol):
    """Files by name, in one place that all workers reach. Every method may raise OSError."""

    def create(self, name: str, text: str) -> bool:
        """Make a file; whether it was not there. Of several who try at once, one succeeds."""

    def write(self, name: str, text: str) -> None:
        """Replace a file's content."""

    def read(self, name: str) -> str | None:
        """A file's content; None where there is none."""

    def names(self) -> list[str]:
        """All files."""


OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"}
"""Protocols of storage without folders. Asked for one, some make a bucket, which a misspelt name must not."""
CHUNK = 1 << 20


class Files:
    """Storage in a folder or under a URL, by fsspec. What it is asked for and cannot do is an OSError, whoever's error it was."""

    def __init__(self, place: str) -> None:
        import fsspec

        self.place = place
        try:
            self.files, self.top = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise RunError(f"{place} cannot be reached: {error}.") from None
        protocol = self.files.protocol
        kinds = {protocol} if isinstance(protocol, str) else set(protocol)
        self.is_local, self.has_folders = "file" in kinds, not kinds & OBJECT_STORES
        try:
            self._folder(self.top)
        except OSError as error:
            raise RunError(f"nothing can be written to {place}: {error.strerror or error}.") from None

    def create(self, name: str, text: str) -> bool:
        with _one_kind_of_error():
            try:
                if self.is_local:  # where `pipe_file` would look first and write then
                    with self.files.open(f"{self.top}/{name}", "xb") as file:
                        file.write(text.encode())
                else:
                    self.files.pipe_file(f"{self.top}/{name}", text.encode(), mode="create")
            except FileExistsError:
                return False
        return True

    def write(self, name: str, text: str) -> None:
        with _one_kind_of_error():
            if self.is_local:  # whole or not at all, as an object store does it
                partial = temporary(Path(self.top) / name)
                partial.write_text(text, encoding="utf-8")
                partial.replace(Path(self.top) / name)
            else:
                self.files.pipe_file(f"{self.top}/{name}", text.encode())

    def read(self, name: str) -> str | None:
        with _one_kind_of_error():
            try:
                return bytes(self.files.cat_file(f"{self.top}/{name}")).decode("utf-8", "replace")
            except FileNotFoundError:
                return None

    def names(self) -> list[str]:
        with _one_kind_of_error():
            self.files.invalidate_cache(self.top)
            try:
                return [str(path).rsplit("/", 1)[-1] for path in self.files.ls(self.top, detail=False)]
            except FileNotFoundError:  # nothing is there yet
                return []

    def upload(self, path: Path, name: str) -> dict[str, Any]:
        """Put a file there; how many bytes that were, and their SHA-256. A file that is replaced meanwhile is put as it was."""
        with path.open("rb") as file, _one_kind_of_error():
            self._folder(f"{self.top}/{name}".rpartition("/")[0])
            with self.files.open(f"{self.top}/{name}", "wb") as there:
                return _copied(file, there)

    def download(self, name: str, file: IO[bytes]) -> dict[str, Any]:
        """Have a file's content in an open file; how many bytes that were, and their SHA-256."""
        with _one_kind_of_error(), self.files.open(f"{self.top}/{name}", "rb") as there:
            return _copied(there, file)

    def remove(self, name: str) -> None:
        """Delete a file."""
        with _one_kind_of_error():
            self.files.rm_file(f"{self.top}/{name}")

    def _folder(self, path: str) -> None:
        if self.has_folders:
            with _one_kind_of_error():
                self.files.makedirs(path, exist_ok=True)


def _copied(source: IO[bytes], there: IO[bytes]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
        there.write(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """What libraries of storage raise, of which each has errors of its own, as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@dataclass
class Lease:
    """A claim of ours."""

    job: str
    n: int
    renewed: float
    """When it was last written, by our clock."""
    beat: int = 0

    @property
    def name(self) -> str:
        return f"{self.job}.{self.n}.lease"


class Claims:
    """A worker's claims. `owner` is no other worker's; `now` is any clock that runs at the speed of the others'."""

    def __init__(
        self, storage: Storage, owner: str, ttl: float = TTL, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.storage, self.owner, self.ttl, self.now = storage, owner, ttl, now
        self.seen: dict[str, tuple[str | None, float]] = {}
        """Lease of somebody's → its content and when we first saw that."""

    def claim(self, jobs: Iterable[str]) -> Lease | None:
        """The first of these jobs that nobody has, or whose owner is lost; None where all are held or have ended.

        Raises:
            OSError: the storage cannot be reached.
        """
        latest = self._latest()
        wanted = list(jobs)
        for job in wanted:
            if job not in latest and (lease := self._make(job, 0)) is not None:
                return lease
        for job in wanted:
            n = latest.get(job)
            if n is not None and self._is_lost(f"{job}.{n}.lease") and (lease := self._make(job, n + 1)) is not None:
                return lease
        return None

    def renew(self, lease: Lease) -> bool:
        """Say that we live, where it is time to; whether the lease is still ours. A storage that is away may come back."""
        since = self.now() - lease.renewed
        if since < self.ttl / BEATS:
            return True
        if since >= FENCE * self.ttl:
            return False
        try:
            if self.storage.read(f"{lease.job}.{lease.n + 1}.lease") is not None:
                return False
            asked = self.now()
            lease.beat += 1
            self.storage.write(lease.name, self._content(lease.beat))
        except OSError:
            return True
        lease.renewed = asked
        return True

    def end(self, lease: Lease) -> None:
        """Say that the job has ended, however it did: nobody takes it again. Raises OSError."""
        self.storage.write(lease.name, self._content(lease.beat, ended=True))

    def unended(self, jobs: Iterable[str]) -> list[str]:
        """Those of these jobs that have a lease which has not ended. Raises OSError."""
        latest = self._latest()
        held = [(job, self.storage.read(f"{job}.{latest[job]}.lease")) for job in jobs if job in latest]
        return [job for job, text in held if text is None or not _said(text).get("ended")]

    def _make(self, job: str, n: int) -> Lease | None:
        asked = self.now()
        return Lease(job, n, asked) if self.storage.create(f"{job}.{n}.lease", self._content(0)) else None

    def _is_lost(self, name: str) -> bool:
        text = self.storage.read(name)
        if text is not None and _said(text).get("ended"):
            return False
        before, since = self.seen.get(name, (None, math.inf))
        if name not in self.seen or text != before:
            self.seen[name] = (text, self.now())
            return False
        return self.now() - since >= self.ttl

    def _latest(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name in filter(_is_lease, self.storage.names()):
            job, _, n = name.removesuffix(ENDING).rpartition(".")
            if n == "0":  # nearly all
                found.setdefault(job, 0)
            elif n.isdecimal():
                found[job] = max(found.get(job, -1), int(n))
        return found

    def _content(self, beat: int, ended: bool = False) -> str:
        return json.dumps({"owner": self.owner, "beat": beat, **({"ended": True} if ended else {})})


def _said(text: str) -> dict[str, Any]:
    """What a lease says; nothing where it is half-written."""
    try:
        said = from_json(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _is_lease(name: str) -> bool:
    return name.endswith(ENDING)


def check_none(folder: Path, ttl: float = TTL) -> None:
    """Refuse to be in charge of a folder whose workers have been heard of within `ttl` seconds. Raises RunError."""
    for path in folder.glob("*.lease"):
        with suppress(OSError):
            said = _said(path.read_text(encoding="utf-8", errors="replace"))
            if not said.get("ended") and time.time() - path.stat().st_mtime < ttl:
                raise RunError(
                    f"{folder.parent} has workers, such as {said.get('owner', 'one that cannot be read')}: start another with "
                    f"--worker, or stop them and wait {ttl:.0f} seconds."
                )


def name_of(folder: str) -> str:
    """A job's name in leases, by its folder; two folders never share one.

    >>> name_of("runs/lora/s0")
    'runs+lora+s0'
    """
    return folder.replace("/", "+")


def this_process() -> str:
    """An owner that no other process is, nor a later one with our number."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def run_of(name: str) -> str:
    """The folder of the run whose job has this name."""
    return name.replace("+", "/")
