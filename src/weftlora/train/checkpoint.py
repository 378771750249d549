"""Checkpoints that are complete or ignored.

Trainer writes a checkpoint in place, file by file, and on resume takes the newest folder, whole or not. Here a marker is
written after everything else is on disk, and only marked folders count. Whoever marks also signs the state that Trainer
saves in each checkpoint, so that a folder without a marker can be told apart: half-written, or written by a Trainer
that marks nothing.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from weftlora.disk.files import file_digest, sync_tree, write_json, writing
from weftlora.disk.ownership import CHECKPOINT, files_of, inside
from weftlora.errors import RunError
from weftlora.foreign_text import from_json

log = logging.getLogger(__name__)
MARKER = "complete.json"
SIGNATURE = "weft"
"""The key of what weftlora keeps in `TrainerState.stateful_callbacks`: a word in files, so it stays as it is."""


def mark(folder: Path, step: int) -> None:
    """Declare a checkpoint complete, once all its files are on disk. Raises RunError."""
    with writing(folder):
        sync_tree(folder)
        files = {name.as_posix(): _digest(folder / name) for name in sorted(files_of(folder)) if name.name != MARKER}
    write_json(folder / MARKER, {"step": step, "files": files})


def _digest(path: Path) -> list[Any]:
    return [path.stat().st_size, file_digest(path)]


def problem(folder: Path) -> str:
    """What is wrong with a checkpoint that is marked complete, against its marker; empty if nothing is."""
    try:
        said = from_json((folder / MARKER).read_text(encoding="utf-8"))
        if said["step"] != step_of(folder):
            return f"its marker is of step {said['step']}"
        for name, (size, digest) in said.get("files", {}).items():
            path = inside(folder, name)
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _digest(path)[1] != digest:
                return f"{name} has changed since it was written"
        told = folder / "trainer_state.json"
        if told.is_file() and (step := from_json(told.read_text(encoding="utf-8"))["global_step"]) != step_of(folder):
            return f"its trainer_state.json is of step {step}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RunError) as error:
        return f"it cannot be read ({type(error).__name__})"
    return ""


def unmark(folder: Path) -> None:
    """A checkpoint that is about to be deleted or written over no longer counts. Raises RunError."""
    with writing(folder):
        (folder / MARKER).unlink(missing_ok=True)


def is_marked(folder: Path) -> bool:
    """Whether a checkpoint is complete."""
    return (folder / MARKER).is_file()


def marked(checkpoints: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return [path for path in folders(checkpoints) if is_marked(path)]


def newest(checkpoints: str | Path) -> Path | None:
    """The newest complete checkpoint; also for `Trainer.train(resume_from_checkpoint=...)` of your own Trainer.

    Raises:
        RunError: a newer one was written by a Trainer that marks none, so nobody knows whether it is complete; or it is a link.
    """
    found = marked(Path(checkpoints))
    for path in sorted(Path(checkpoints).glob("checkpoint-*")):
        if path.is_symlink() and CHECKPOINT.fullmatch(path.name):
            raise RunError(f"{path} is a link, which nothing is read or deleted through: put the folder itself there.")
    unknown = [path for path in folders(Path(checkpoints)) if not is_marked(path) and _is_unsigned(path)]
    if unknown and (not found or step_of(unknown[-1]) > step_of(found[-1])):
        raise RunError(
            f"{unknown[-1]} was written without weftlora.Callback, which marks complete checkpoints: resume once from the one you "
            "trust, by its path, with callbacks=[weftlora.Callback()]."
        )
    problems: list[str] = []
    for path in reversed(found):
        if not (wrong := problem(path)):
            if problems:
                log.warning("%s: continuing from %s instead", "; ".join(problems), path.name)
            return path
        problems.append(f"{path} is damaged: {wrong}")
    if problems:
        raise RunError(f"{problems[0]}, and there is no earlier complete one: start the run again.")
    return None


def step_of(checkpoint: Path) -> int:
    """The optimiser step a checkpoint was taken after."""
    return int(checkpoint.name.rpartition("-")[2])


def drop(checkpoint: Path) -> None:
    """Delete a checkpoint; the marker goes first, so no half-deleted one counts. Raises RunError."""
    unmark(checkpoint)
    with writing(checkpoint):
        shutil.rmtree(checkpoint)


def drop_incomplete(checkpoints: Path) -> None:
    """Delete what a kill left half-written."""
    for path in folders(checkpoints):
        if not is_marked(path):
            drop(path)


def rotate(checkpoints: Path, keep: int, best: Path | None = None) -> None:
    """Keep `keep` checkpoints: the newest complete one and `best` in any case; incomplete ones go first, then old ones."""
    every, kept = folders(checkpoints), marked(checkpoints)[-1:]
    kept += [path for path in every if best is not None and path.resolve() == best.resolve() and path not in kept]
    expendable = sorted((path for path in every if path not in kept), key=lambda path: (is_marked(path), step_of(path)))
    for path in expendable[: max(0, len(every) - max(keep, len(kept)))]:
        drop(path)


def folders(checkpoints: Path) -> list[Path]:
    """All checkpoints below a folder by step, complete or not; a link is none, and neither is what a user has named after one."""
    found = [path for path in checkpoints.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def _is_unsigned(folder: Path) -> bool:
    """Whether Trainer finished its last file, the state, and nobody signed it."""
    try:
        state = from_json((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return SIGNATURE not in (state.get("stateful_callbacks") or {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False
