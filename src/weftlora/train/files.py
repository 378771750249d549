"""Writing a run folder so that a reader never finds half a file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from weftlora.errors import RunError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write below `path` into one sentence.

    Raises:
        RunError: disk full, read-only, or something in the way.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
        raise RunError(f"cannot write {path}: {reason}; free space or choose another folder with out=....") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` beside `path`, force it to disk, then rename it into place. Raises RunError."""
    partial = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(value, file, indent=2, default=str)
                file.write("\n")
                sync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def append_json(path: Path, row: dict[str, Any]) -> None:
    """Append one line, below one that a kill cut short. Raises RunError."""
    with writing(path), path.open("ab+") as file:
        cut = file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(("\n" * bool(cut) + json.dumps(row, default=str) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in `path`. Raises RunError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} cannot be read: it holds no mapping.")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; none if it does not exist. Lines that a kill cut short are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a JSON lines file as a whole. Raises RunError."""
    partial = path.with_name(path.name + ".part")
    with writing(path):
        try:
            partial.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder beside `path`, then put it in place of `path`. Raises RunError."""
    partial = path.with_name(path.name + ".part")
    with writing(path):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            fill(partial)
            sync_tree(partial)
            if path.exists():
                shutil.rmtree(path)
            partial.replace(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def sync(descriptor: int) -> None:
    """Force an open file to disk."""
    os.fsync(descriptor)


def sync_tree(folder: Path) -> None:
    """Force every file below `folder` to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                sync(file.fileno())
