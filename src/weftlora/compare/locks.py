"""Two locks on a comparison's folder, so that no two processes ever write one run.

    lock           held by the `weftlora compare` that is in charge; a second one is refused at once
    workers.lock   handed on to its workers: it is free only when the last of them has gone, which a comparison that goes on
                   after a kill waits for

Both are files that stay where they are; what counts is who holds them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from weftlora.errors import RunError
from weftlora.train.files import writing

NAMES = ("lock", "workers.lock")


@contextlib.contextmanager
def in_charge(folder: Path) -> Iterator[int]:
    """Be the only comparison in `folder`, which exists; yields the descriptor that workers hold on to.

    Raises:
        RunError: another one is at work there.
    """
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(_opened(folder / name)) for name in NAMES)
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another weftlora compare is at work in {folder}: wait for it, or choose another folder with --out."
            ) from None
        fcntl.flock(second, fcntl.LOCK_EX)
        yield second


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
