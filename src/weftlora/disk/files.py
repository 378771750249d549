"""Writing a run folder so that a reader never finds half a file."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from safetensors import SafetensorError

from weftlora.disk.ownership import is_temporary, keep_foreign, temporary
from weftlora.errors import RunError, WeftError
from weftlora.foreign_text import from_json
from weftlora.redaction import redacted


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(path: Path) -> tuple[int, int, int, int]:
    """What changes with a file: its device and inode, its size, and when it was written, in ns. Raises OSError."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def user_cache(name: str) -> Path:
    """The folder of ours for `name` in the user's own cache; it need not be there."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weftlora" / name


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


@contextmanager
def replacing(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` once it is whole and on disk; a link there is replaced, not followed.

    Args:
        check: called once it is whole; raises where something has come to `path` meanwhile that must stay.

    Raises:
        RunError: the file cannot be written.
    """
    partial = temporary(path)
    with writing(path):
        _clear_killed(path)
        try:
            with partial.open("xb") as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
                file.flush()
                sync(file.fileno())
                check()
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


YOUNG = 60.0
"""Seconds in which an empty file may be one that somebody has just made, and not locked yet."""


def _clear_killed(path: Path) -> None:
    """Take away what killed writers of `path` have left: whoever is still at it holds a lock on his file."""
    for found in path.parent.glob(f"{glob.escape(f'.{path.name[:40]}.weft-')}*"):
        if is_temporary(found) and found.is_file():
            with contextlib.suppress(OSError), found.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                stat = os.fstat(file.fileno())
                if stat.st_size or time.time() - stat.st_mtime > YOUNG:
                    found.unlink()


def check_regular(path: Path, error: type[WeftError]) -> None:
    """Refuse a pipe, a socket or a device, as `path` itself or right in the folder: reading one may never end. Raises `error`."""
    try:
        odd = next(
            found
            for found in (path, *(path.iterdir() if path.is_dir() else ()))
            if found.exists() and not found.is_file() and not found.is_dir()
        )
    except (StopIteration, OSError):
        return
    raise error(f"{odd} is a pipe, a socket or a device, not a file: put a file there.")


PAGE = '<meta name="generator" content="weftlora">'
"""In the head of every page."""


@dataclass(frozen=True)
class Output:
    """An output file of a kind. An earlier one is replaced, as a whole; something else is not, whenever it came there.

    Two processes that write one file at once leave that of either, never parts of both.
    """

    path: Path
    what: str
    """What is written, as in "a selection"."""
    keys: Collection[str]
    """What a JSON file must have to be one; none for a page."""
    overwrite: bool
    """Whether anything may be replaced."""

    def check(self) -> None:
        """Refuse the place before the work.

        Raises:
            RunError: a folder, a link or a foreign file is there, or the folder of the file cannot be written to.
        """
        path = self.path
        if not path.parent.is_dir():
            raise RunError(f"cannot write {path}: {path.parent} is not a folder; choose another file.")
        if path.is_dir():
            raise RunError(f"cannot write {path}: it is a folder; choose another file.")
        if path.is_symlink():
            raise RunError(f"cannot write {path}: it is a link; choose another file, or remove the link.")
        if path.exists() and not path.is_file():
            raise RunError(f"cannot write {path}: it is a pipe, a socket or a device; choose another file.")
        if path.exists() and not self.overwrite and not self._is_earlier():
            raise RunError(
                f"{path} already exists and is not {self.what}: choose another file, or replace it with overwrite (--overwrite)."
            )
        if reason := why_no_file(path.parent):
            raise RunError(f"cannot write {path}: {path.parent} takes no new file ({reason}); choose another file.")

    def _is_earlier(self) -> bool:
        try:
            text = self.path.read_text(encoding="utf-8")
            return all(key in from_json(text) for key in self.keys) if self.keys else PAGE in text[:4000]
        except (OSError, ValueError, TypeError):
            return False

    def write(self, text: str) -> None:
        """Write the file, whole or not at all. Raises RunError, also for what has come there since `check`."""
        with replacing(self.path, self.check) as file:
            file.write(_encoded(text))

    def write_json(self, value: Any) -> None:
        """Write a record as JSON, as `write` does."""
        self.write(_json(value))


def why_no_file(folder: Path) -> str | None:
    """Why no file can be made in `folder`, by making one and taking it away again; None where it can.

    What permissions say is not what a file system does: root may write anywhere, and nobody into /sys. Where the system has
    files without a name, the one that is made has none, so that a kill leaves nothing.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return (error.strerror or type(error).__name__).lower()
    return None


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises RunError."""
    with replacing(path) as file:
        file.write(_encoded(text))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. Raises RunError."""
    write_text(path, _json(value))


def _json(value: Any) -> str:
    return json.dumps(redacted(value), indent=2, default=str) + "\n"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def append_json(path: Path, row: dict[str, Any]) -> None:
    """Append one line, below one that a kill cut short. Raises RunError."""
    with writing(path), open(path, "ab+", opener=_not_through_a_link) as file:
        cut = file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(("\n" * bool(cut) + json.dumps(redacted(row), default=str) + "\n").encode())


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in `path`. Raises RunError when it is missing or damaged."""
    try:
        value = from_json(_text(path, "strict"))
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}.") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} cannot be read: it does not contain a mapping.")
    return cast("dict[str, Any]", redacted(value))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; none if it does not exist. Lines that a kill cut short are left out. Raises RunError."""
    if not path.exists():
        return []
    rows = []
    for line in _text(path, "replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(from_json(line))
    return [row for row in rows if isinstance(row, dict)]


def _text(path: Path, errors: str) -> str:
    """A record's text. Raises RunError where it cannot be read, or is a link that leads out of its folder."""
    try:
        if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
            raise RunError(f"{path} leads out of its folder through a link: put the file itself there.")
        return path.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}.") from None


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a JSON lines file as a whole. Raises RunError."""
    write_text(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))


def write_folder(path: Path, fill: Callable[[Path], None], ours: Callable[[Path], bool]) -> None:
    """Let `fill` write a new folder, then put it in place of `path`; whatever stops it leaves `path` as it was.

    Args:
        ours: whether a file of the present `path`, by its name in it, is one that may go. All others are in the new folder too.

    Raises:
        RunError: disk full, read-only, or something in the way.
    """
    with writing(path):
        restore(path)
        if path.is_symlink():
            raise RunError(f"{path} is a link, which nothing is written through: put the folder itself there.")
        aside = temporary(path)
        new, old = aside / "new", aside / "old"
        try:
            aside.mkdir()
            (aside / TEMPORARY_FOR).write_text(path.name, encoding="utf-8")
            new.mkdir()
            fill(new)
            if path.exists():
                keep_foreign(path, new, ours)
            sync_tree(new)
            sync_folder(new)
            if path.exists():  # moved aside, not deleted: half a folder might look like a whole one
                path.replace(old)
            new.replace(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.replace(path)
            shutil.rmtree(aside, ignore_errors=True)
            raise
        sync_folder(path.parent)  # the rename itself must be on disk before anybody is told
        shutil.rmtree(aside, ignore_errors=True)


TEMPORARY_FOR = "weft-temporary"
"""The file in an unfinished folder that says which folder it was to become."""


def restore(path: Path) -> None:
    """Clear away what a killed `write_folder` has left, and put back what it had moved aside."""
    for aside in unfinished(path):
        if (aside / "old").is_dir() and not os.path.lexists(path):
            (aside / "old").replace(path)
        shutil.rmtree(aside, ignore_errors=True)


def unfinished(path: Path) -> list[Path]:
    """The folders that a killed `write_folder` of `path` has left."""

    def is_ours(found: Path) -> bool:
        if not found.is_dir() or not is_temporary(found) or not found.name.startswith(f".{path.name[:40]}.weft-"):
            return False
        if {inner.name for inner in found.iterdir()} <= {TEMPORARY_FOR}:  # killed as it was made
            return True
        try:
            return (found / TEMPORARY_FOR).read_text(encoding="utf-8") == path.name
        except OSError:
            return False

    return [found for found in path.parent.glob(".*.weft-*") if is_ours(found)] if path.parent.is_dir() else []


def sync(descriptor: int) -> None:
    """Force an open file to disk."""
    os.fsync(descriptor)


def sync_tree(folder: Path) -> None:
    """Force every file below `folder` to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                sync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's own entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
