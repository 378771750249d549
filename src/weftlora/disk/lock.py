"""One process at a time in a folder that weftlora writes.

    with holding(folder, "weftlora train"): ...

The lock is the operating system's (`filelock`: flock, which network file systems pass on), so it goes with the process that
holds it, however that one ends. Its file names the process while it is held and is removed afterwards. A file that a kill has
left means nothing: what counts is whether somebody holds it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from weftlora.disk.files import writing
from weftlora.errors import RunError
from weftlora.foreign_text import from_json

NAME = ".weft-lock"
PATIENCE = 1.0
"""Seconds to try for: `is_held` takes a lock for an instant, and that is no other process at work."""
_WITHOUT = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
"""What a file system says that knows no locks."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def holding(folder: Path, what: str, name: str = NAME, patience: float = PATIENCE) -> Iterator[None]:
    """Be the only process that writes `folder`, which exists.

    Args:
        what: the command, for whoever finds the folder taken.
        name: the lock's file in the folder.
        patience: seconds to wait for another process that is at work there.

    Raises:
        RunError: another process is at work there, or the lock cannot be written.
    """
    path = folder / name
    note = json.dumps(
        {"pid": os.getpid(), "host": socket.gethostname(), "command": what, "since": f"{datetime.now(UTC):%F %T} UTC"}
    )

    def sign(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note.encode(), 0)

    lock = FileLock(path, timeout=patience, thread_local=False, fallback_to_soft=False, on_acquired=sign)
    with writing(path):
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{folder} is in use by {holder(path)}: wait for it to end, or choose another folder."
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT:
                raise
            log.warning("%s is on a file system without locks: make sure that no second process writes to it.", folder)
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # the folder may have been deleted, or have become read-only
                path.unlink()
            lock.release()


@contextlib.contextmanager
def claimed(folder: Path, what: str) -> Iterator[None]:
    """As `holding`, in a folder that is made if it is not there; what was made and is empty in the end is removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with holding(folder, what):
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def beside(path: Path) -> str:
    """The name of a lock for `path` itself, which lies beside it: for a folder that is renamed into place."""
    name = (
        path.name if len(path.name) <= 40 else f"{path.name[:40]}-{hashlib.sha256(path.name.encode()).hexdigest()[:8]}"
    )
    return f".{name}.weft-lock"


def holder(path: Path) -> str:
    """In words, who wrote a lock's file."""
    try:
        said = from_json(path.read_text(encoding="utf-8"))
        return f"process {int(said['pid'])} on {said['host']} ({said['command']}, since {said['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def is_held(folder: Path, name: str = NAME) -> bool:
    """Whether a process is at work in `folder`; nothing is written, so this works on what may only be read."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _WITHOUT
    else:
        return False
    finally:
        os.close(descriptor)
