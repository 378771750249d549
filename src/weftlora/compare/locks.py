"""Two locks on a comparison's folder, so that no two processes ever write one run.

    .weft-lock     held by the `weftlora compare` that is in charge, as in every folder; a second one is refused
    workers.lock   handed on to its workers: it is free only when the last of them has gone, which a comparison that goes on
                   after a kill waits for

What counts is who holds them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from weftlora.train.files import writing
from weftlora.train.lock import NAME, holding

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
