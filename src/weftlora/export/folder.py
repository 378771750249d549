"""A folder that is there whole or not at all: written beside it, forced to disk, then renamed.

What lies in a folder that is replaced and is no file of the earlier export is in the new one too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from weftlora.errors import RunError
from weftlora.train.files import restore, unfinished, write_folder, writing
from weftlora.train.lock import beside, holding
from weftlora.train.ownership import is_export, listed, of_export

SCRATCH = ".proof"
"""Folder inside the unfinished one, for what a proof needs; gone before the rename."""


def check_out(out: Path, source: Path | None, overwrite: bool, base: str | None = None) -> None:
    """Refuse a place that must not be written, before anything slow begins.

    Args:
        source: the adapter's folder.
        base: folder or hub id of its base.

    Raises:
        RunError: there is something else than an earlier export, or one and no `overwrite`; it is (or holds) the adapter that
            is exported, its base or the current folder; or it cannot be written.
    """
    place = _real(out)
    if not place.exists() and unfinished(place):  # killed between two renames
        with holding(place.parent, "weftlora export", beside(place)):
            restore(place)
    if place.exists() and not place.is_dir():
        raise RunError(f"cannot export to {out}: it is a file; choose another out.")
    found = base if base is not None and Path(base).exists() else None  # else a hub id
    kept = {"the adapter itself": source, "the base model": found, "the current folder": Path.cwd()}
    for what, path in kept.items():
        if path is not None and _real(path).is_relative_to(place):
            raise RunError(f"cannot export to {out}: it holds {what}; choose another out.")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise RunError(f"{out} is not empty: choose another out, or replace what is there with overwrite.")
        if not is_export(place):
            raise RunError(
                f"{out} is not empty and holds no export of weftlora, so it is not replaced: choose another out."
            )
    nearest = next(path for path in place.parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot export to {out}: {nearest} cannot be written to; choose another out.")


def write(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write the folder; whatever stops it leaves `out` as it was.

    Raises:
        RunError: disk full, read-only, or another process is writing the same folder.
    """
    out = _real(out)
    made = [folder for folder in out.parents if not folder.exists()]

    def whole(place: Path) -> None:
        fill(place)
        shutil.rmtree(place / SCRATCH, ignore_errors=True)
        with (place / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n{listed(place)}\n")

    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with holding(out.parent, "weftlora export", beside(out)):
            write_folder(out, whole, {path.relative_to(out) for path in of_export(out)}.__contains__)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else's files are in it now
                folder.rmdir()
        raise


def _real(path: str | Path) -> Path:
    """The folder itself: what is renamed must have a name (`.` has none) and must not be a link to it."""
    return Path(os.path.realpath(path))
