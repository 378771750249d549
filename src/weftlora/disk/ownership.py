"""What in a folder is weftlora's, and may therefore be deleted.

A file is ours where its name is one that weftlora gives and a marker of ours vouches for the folder that it lies in: run.json for a
run, compare.json for a comparison, the card for an export, the name for what is temporary. All else is the user's: it is not
deleted, not moved, and not written through a link.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from weftlora.errors import RunError
from weftlora.foreign_text import from_json

TEMPORARY = re.compile(r"\..*\.weft-[0-9a-f]{16}", re.DOTALL)
"""The name of what is not finished: nobody can guess it, so nothing of anybody's can wait there."""
CHECKPOINT = re.compile(r"checkpoint-[0-9]{1,18}")
"""How Trainer calls a checkpoint; a folder that a user has named after one is the user's."""

_FILES = (
    "run.json",
    "metrics.jsonl",
    "events.jsonl",
    "samples.jsonl",
    "search.jsonl",
    "selection.json",
    "problem.json",
)
_EVALUATION = re.compile(r"eval-(test|validation)(-base)?\.json")
PROMPTS = "prompts.json"
"""What in an adapter folder says how its prompts were written out."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "README.md", PROMPTS)
"""What a run saves into adapter/."""
REPLACED = "run"
"""What the folder is called after, with a temporary name, in which a run waits while another takes its place."""
EXPORTED = "Exported with weftlora"
"""In the card of every export, and in no other."""
FOLDERS = ("adapter", "checkpoints", "search")
"""The folders of a run that it writes into."""


def temporary(path: Path) -> Path:
    """A name beside `path` for what is to take its place once it is whole."""
    return path.with_name(f".{path.name[:40]}.weft-{secrets.token_hex(8)}")


def is_temporary(path: Path) -> bool:
    """Whether `path` is something unfinished that a kill has left."""
    return TEMPORARY.fullmatch(path.name) is not None and not path.is_symlink()


def inside(top: Path, name: str) -> Path:
    """The path of `name`, read from a file, below `top`. Raises RunError where it would lead out of it."""
    path = top / name
    if "\0" in name or os.path.isabs(name) or ".." in Path(name).parts or not Path(name).parts:
        raise RunError(
            f"{top} names the folder {name!r}, which is not in it: the folder is damaged or not to be trusted."
        )
    if not path.resolve().is_relative_to(top.resolve()):
        raise RunError(f"{path} leads out of {top} through a link: put the folder itself there.")
    return path


def check_no_links(folder: Path) -> None:
    """Refuse a run folder in which something that a run writes is a link. Raises RunError."""
    for path in (*(folder / name for name in (*_FILES, *FOLDERS)), *_listed(folder / "checkpoints")):
        if path.is_symlink() and (path.name in (*_FILES, *FOLDERS) or CHECKPOINT.fullmatch(path.name)):
            raise RunError(
                f"{path} is a link, which a run does not write through: put the file or folder itself there."
            )


def of_run(folder: Path, vouched: bool = False) -> list[Path]:
    """What a run has written into its folder, in the order in which it may go: run.json, which vouches for it, is the last.

    Its exports are among it, a run that it was to replace is not.

    Args:
        vouched: something else vouches for the folder, such as the comparison that it is in.
    """
    found = unfinished_files(folder)
    if not vouched and not (folder / "run.json").is_file():
        return found
    found += [path for path in _listed(folder) if _EVALUATION.fullmatch(path.name)]
    found += [path for path in _listed(folder / "checkpoints") if CHECKPOINT.fullmatch(path.name)]
    if not (folder / "adapter").is_symlink():
        found += [folder / "adapter" / name for name in ADAPTER]
    if not (folder / "search").is_symlink():
        found += [folder / "search" / "state.pt"]
    found += [path for place in _listed(folder) for path in of_export(place) if place.name not in FOLDERS]
    found += map(folder.joinpath, reversed(_FILES))
    return [path for path in found if os.path.lexists(path) and not path.is_symlink()]


def unfinished_files(folder: Path) -> list[Path]:
    """What a kill has left half-written in a run's folder."""
    found = [path for place in (folder, folder / "search") for path in _listed(place) if is_temporary(path)]
    return [path for path in found if path not in replaced_runs(folder)]


def replaced_runs(folder: Path) -> list[Path]:
    """Where runs wait in `folder` while those that replace them start."""
    return [path for path in folder.glob(f".{REPLACED}.weft-*") if is_temporary(path) and path.is_dir()]


def is_export(folder: Path) -> bool:
    """Whether an export wrote this folder: a trained adapter or a base model, which look alike, must not be replaced by one."""
    whole = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    return whole and EXPORTED in _card(folder)


def of_export(folder: Path) -> list[Path]:
    """The files of an export, by the list in its card; none where there is no export."""
    if folder.is_symlink() or not folder.is_dir() or not is_export(folder):
        return []
    said = _LISTED.search(_card(folder))
    with suppress(ValueError):
        names = from_json(said[1]) if said else []
        return [folder / name for name in files_of(folder) if name.as_posix() in ("README.md", *names)]
    return []  # a list that cannot be read vouches for nothing


def listed(folder: Path) -> str:
    """The line of an export's card that lists its files."""
    return f"<!-- files of this export: {json.dumps(sorted(name.as_posix() for name in files_of(folder)))} -->"


_LISTED = re.compile(r"<!-- files of this export: (\[[^\n]*\]) -->")


def _card(folder: Path) -> str:
    card = folder / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""


def delete(paths: list[Path], top: Path) -> None:
    """Delete these files and folders, and the folders below `top` that are empty without them."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    without_empty({path.parent for path in paths}, top)


def without_empty(folders: set[Path], top: Path) -> None:
    """Remove these folders, and those between them and `top`, where nothing lies in them."""
    for folder in sorted({above for each in folders for above in (each, *each.parents)}, reverse=True):
        if folder != top and folder.is_relative_to(top):
            with suppress(OSError):
                folder.rmdir()


def move(paths: list[Path], top: Path, to: Path) -> None:
    """Move what lies below `top` to the same place below `to`; folders that are empty without it go."""
    for path in paths:
        place = to / path.relative_to(top)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
    without_empty({path.parent for path in paths}, top)


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below a folder, links included and not followed, relative to it."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (Path(place, name).relative_to(folder) for name in (*names, *links))


def keep_foreign(old: Path, new: Path, ours: Callable[[Path], bool]) -> None:
    """Put what is not `ours` in `old` into `new` too, where nothing of that name is; nothing is taken away from `old`."""
    for name in files_of(old):
        if not ours(name) and not os.path.lexists(new / name):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(old / name, new / name, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(old / name, new / name, follow_symlinks=False)


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
