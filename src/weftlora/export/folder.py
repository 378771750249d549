"""A folder that is there whole or not at all: written as NAME.part beside it, forced to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from weftlora.errors import RunError
from weftlora.train.files import sync, sync_tree, writing

SCRATCH = ".proof"
"""Folder inside the unfinished one, for what a proof needs; gone before the rename."""
FINISHED = ("adapter_config.json", "config.json")
MARK = "Exported with weftlora"
"""In the card of every export, and in no other."""


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


def is_export(folder: Path) -> bool:
    """Whether an export wrote this folder: a trained adapter or a base model, which look alike, must not be replaced by one."""
    card = folder / "README.md"
    whole = card.is_file() and any((folder / name).is_file() for name in FINISHED)
    return whole and MARK in card.read_text(encoding="utf-8", errors="replace")


def write(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write the folder; whatever stops it leaves `out` as it was.

    Raises:
        RunError: disk full, read-only, or another process is writing the same folder.
    """
    out = _real(out)
    partial, old = out.with_name(out.name + ".part"), out.with_name(out.name + ".replaced")
    made = [folder for folder in out.parents if not folder.exists()]
    with writing(out), _claimed(partial, out):
        try:
            fill(partial)
            shutil.rmtree(partial / SCRATCH, ignore_errors=True)
            sync_tree(partial)
            _sync_folder(partial)
            if out.exists():  # moved aside, not deleted: half a folder might look like a whole one
                shutil.rmtree(old, ignore_errors=True)
                out.replace(old)
            partial.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not out.exists():
                old.replace(out)
            for folder in made:
                with suppress(OSError):  # somebody else's files are in it now
                    folder.rmdir()
            raise
        _sync_folder(out.parent)  # the rename itself must be on disk before anybody is told
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _claimed(partial: Path, out: Path) -> Iterator[None]:
    """A new folder that is ours alone. The lock goes with the process, so a killed export holds none."""
    with ExitStack() as held:
        if partial.exists():
            _lock(partial, out, held)
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _lock(partial, out, held)
        yield


def _lock(folder: Path, out: Path, held: ExitStack) -> None:
    if os.name != "posix":
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(
            f"another process is exporting to {out} at this moment: wait for it, or choose another out."
        ) from None
    except OSError:  # a file system without locks
        return


def _real(path: str | Path) -> Path:
    """The folder itself: what is renamed must have a name (`.` has none) and must not be a link to it."""
    return Path(os.path.realpath(path))


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
