"""Checkpoints that are complete or ignored.

Trainer writes a checkpoint in place, file by file, and on resume takes the newest folder, whole or not. Here a marker is
written after everything else is on disk, and only marked folders count.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from weft.train.files import sync_tree, write_json, writing

MARKER = "complete.json"


def mark(folder: Path, step: int) -> None:
    """Declare a checkpoint complete, once all its files are on disk. Raises RunError."""
    with writing(folder):
        sync_tree(folder)
    write_json(folder / MARKER, {"step": step})


def marked(checkpoints: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return [path for path in _all(checkpoints) if (path / MARKER).is_file()]


def newest(checkpoints: str | Path) -> Path | None:
    """The newest complete checkpoint; also for `Trainer.train(resume_from_checkpoint=...)` of your own Trainer."""
    found = marked(Path(checkpoints))
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The optimiser step a checkpoint was taken after."""
    return int(checkpoint.name.rpartition("-")[2])


def drop_incomplete(checkpoints: Path) -> None:
    """Delete what a kill left half-written."""
    for path in _all(checkpoints):
        if not (path / MARKER).is_file():
            shutil.rmtree(path)


def rotate(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints; the marker goes first, so no half-deleted one counts."""
    for path in marked(checkpoints)[:-keep]:
        (path / MARKER).unlink()
        shutil.rmtree(path)


def _all(checkpoints: Path) -> list[Path]:
    folders = [path for path in checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(folders, key=step_of)
