"""A folder that is there whole or not at all: written as NAME.part beside it, forced to disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from weft.errors import RunError
from weft.train.files import sync, sync_tree, writing

SCRATCH = ".proof"
"""Folder inside the unfinished one, for what a proof needs; gone before the rename."""
FINISHED = ("adapter_config.json", "config.json")


def check_out(out: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse a place that must not be written, before anything slow begins.

    Raises:
        RunError: there is something else than an earlier export, or one and no `overwrite`; it is (or holds) the adapter that
            is exported; or it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"cannot export to {out}: it is a file; choose another out.")
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise RunError(f"cannot export to {out}: it holds the adapter itself; choose another out.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise RunError(f"{out} is not empty: choose another out, or replace what is there with overwrite.")
        if not any((out / name).is_file() for name in FINISHED):
            raise RunError(f"{out} is not empty and holds no export, so it is not replaced: choose another out.")
    nearest = next(path for path in (out.absolute().parent, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"cannot export to {out}: {nearest} cannot be written to; choose another out.")


def write(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write the folder; whatever stops it leaves `out` as it was.

    Raises:
        RunError: disk full, read-only.
    """
    partial, old = out.with_name(out.name + ".part"), out.with_name(out.name + ".replaced")
    with writing(out):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            fill(partial)
            shutil.rmtree(partial / SCRATCH, ignore_errors=True)
            sync_tree(partial)
            if out.exists():  # moved aside, not deleted: half a folder might look like a whole one
                shutil.rmtree(old, ignore_errors=True)
                out.replace(old)
            partial.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not out.exists():
                old.replace(out)
            raise
        _sync_folder(out.parent)  # the rename itself must be on disk before anybody is told
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)
