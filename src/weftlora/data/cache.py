"""Encoded rows of large files, kept for the next start.

    ~/.cache/weftlora/rows/KEY/    the splits as `datasets` maps them into memory, and loaded.json: all else that was found

KEY is a digest of all that the tokens depend on: the data section, every file by its place, size and time of change, the tokenizer
with its chat template, and this package. A folder appears whole or not at all. Entries that nobody has used for a month go.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from weftlora.data.config import DEMO, SPLITS, DataConfig, Format, Task, hub_name, named
from weftlora.data.loaded import BOOKS, Counts, Loaded
from weftlora.data.paths import resolve_path
from weftlora.disk.files import file_stamp, user_cache
from weftlora.disk.ownership import temporary

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


MONTH = 30 * 24 * 3600


@dataclass(frozen=True)
class Entry:
    """Where the rows of one data section are kept, or would be."""

    folder: Path

    @classmethod
    def of(
        cls,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        base_dir: str | os.PathLike[str] | None,
        more: tuple[Any, ...],
    ) -> Entry | None:
        """The entry; None where nothing is to be kept, or what is read cannot be known again."""
        if not config.cache or config.limit is not None:
            return None
        files = stamps(config, base_dir)
        if not files or (tokens := tokenizer_stamp(tokenizer)) is None:
            return None
        said = config.model_dump(mode="json") | {"processes": 0}
        told = json.dumps([said, files, tokens, more, code_stamp()], sort_keys=True, default=str)
        return cls(user_cache("rows") / hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:32])

    def read(self) -> Loaded | None:
        """What was kept; None where there is nothing whole."""
        try:
            known = _Kept.model_validate_json((self.folder / "loaded.json").read_bytes())
            splits = {name: _opened(self.folder, known.files.get(name)) for name in SPLITS}
        except Exception:  # files of Arrow are read by C++, which has errors of many kinds
            return None
        if splits["train"] is None:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder / "loaded.json")
        rest = {name: getattr(known, name) for name in _Kept.model_fields if name != "files"}
        return Loaded(**splits, **rest)  # type: ignore[arg-type]

    def write(self, found: Loaded, folder: Path) -> Loaded:
        """Keep what lies in `folder`, if any split does; the same rows, read from where they are kept."""
        files: dict[str, list[str]] = {}
        for name in SPLITS:
            split: Dataset | None = getattr(found, name)
            if split is None:
                continue
            held = [Path(each["filename"]) for each in split.cache_files]
            if not held:  # a small split beside a large one
                with_file = folder / f"{name}-small.arrow"
                _save(split, with_file)
                held = [with_file]
            files[name] = [path.name for path in held]
        record = {
            field.name: getattr(found, field.name)
            for field in dataclasses.fields(found)
            if field.name not in (*SPLITS, "counts")
        }
        record |= {"files": files, "counts": {name: dataclasses.asdict(held) for name, held in found.counts.items()}}
        (folder / "loaded.json").write_text(json.dumps(record), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first
            folder.rename(self.folder)
        _forget_old(self.folder.parent)
        return self.read() or found


class _Kept(BaseModel):
    """What loaded.json holds: all of `Loaded` but its splits, and their files."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    files: dict[str, list[str]]
    counts: dict[str, Counts]
    task: Task
    format: Format
    labels: list[str] | None
    domains: list[str]
    hashes: dict[str, str]
    max_length: int
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    sources: tuple[tuple[str, int], ...]


def _opened(folder: Path, names: list[str] | None) -> Dataset | None:
    """The rows of these files, one after the other. Raises ValueError where one does not lie in the folder, and what Arrow raises."""
    from datasets import Dataset, concatenate_datasets

    if names is None:
        return None
    if any(Path(name).name != name for name in names):
        raise ValueError("it names files elsewhere")
    held = concatenate_datasets([Dataset.from_file(str(folder / name)) for name in names])
    return held.remove_columns([name for name in held.column_names if name in BOOKS])


def _save(split: Dataset, path: Path) -> None:
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(features=split.features, path=str(path)) as writer:
        writer.write_table(split.data.table)
        writer.finalize()


class Workplace:
    """A folder to encode into, made when it is needed: beside the others of the cache, or a passing one where nothing is kept."""

    def __init__(self, kept: Entry | None) -> None:
        self.kept = kept
        self.made: Path | None = None

    def folder(self) -> Path:
        """The folder; rows that are not kept lie in it until the process ends."""
        if self.made is None and self.kept is not None:
            made = temporary(self.kept.folder)
            with contextlib.suppress(OSError):  # a home that cannot be written
                made.mkdir(parents=True)
                self.made = made
        if self.made is None:
            self.made, self.kept = Path(tempfile.mkdtemp(prefix="weftlora-rows-")), None
            atexit.register(shutil.rmtree, self.made, ignore_errors=True)
        return self.made

    def finish(self, found: Loaded) -> Loaded:
        """The same rows, kept if they are to be."""
        if self.made is None or self.kept is None:
            return found
        return self.kept.write(found, self.made)

    def leave(self) -> None:
        """Remove what was not kept."""
        if self.made is not None and self.kept is not None:
            shutil.rmtree(self.made, ignore_errors=True)


def _forget_old(top: Path) -> None:
    with contextlib.suppress(OSError):
        for entry in top.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - max(entry.stat().st_mtime, _used(entry)) > MONTH:
                    shutil.rmtree(entry, ignore_errors=True)


def _used(entry: Path) -> float:
    try:
        return (entry / "loaded.json").stat().st_mtime
    except OSError:
        return 0.0


def stamps(config: DataConfig, base_dir: str | os.PathLike[str] | None) -> list[list[Any]]:
    """Every file that is read, with what would change if it did; none where something is no file."""
    out: list[list[Any]] = []
    for written in (config.train, config.validation, config.test):
        for name, weight in named(written):
            if name == DEMO or hub_name(name, path := resolve_path(name, base_dir)) is not None:
                return []
            try:
                files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
                out += [[str(file), weight, *file_stamp(file)] for file in files]
            except OSError:
                return []
    return out


def tokenizer_stamp(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A digest of what a tokenizer does; None for one that cannot be written out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    more = [str(tokenizer.chat_template), str(tokenizer.special_tokens_map), type(tokenizer).__name__]
    return hashlib.sha256("\0".join([backend.to_str(), *more]).encode("utf-8", "surrogateescape")).hexdigest()


@functools.cache
def code_stamp() -> str:
    """A digest of the code that makes tokens of rows, ours and that of the libraries by their versions."""
    import datasets
    import tokenizers
    import transformers

    held = hashlib.sha256(f"{datasets.__version__} {tokenizers.__version__} {transformers.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        held.update(path.read_bytes())
    return held.hexdigest()
