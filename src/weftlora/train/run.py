"""A run is a folder.

run.json        what was asked and what came out; written whole or not at all
metrics.jsonl   one line per logged step: loss, rate, tokens
events.jsonl    what happened when: start, checkpoints, resume, end
adapter/        the trained adapter, as peft saves it
checkpoints/    what --resume continues from
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from weftlora.errors import AdapterError, ConfigError, RunError
from weftlora.train.files import append_json, read_json, read_lines, write_json, writing

FORMAT = 1
"""Version of run.json; a newer one is refused by name."""

FREE_ON_RESUME = {"train.report_to", "train.keep", "train.logging_every"}
"""Keys that may differ when a run is resumed: they do not touch the adapter."""


@dataclass(frozen=True)
class Run:
    """One training run: what `run.json` holds, and the folder it lies in."""

    folder: Path
    status: str
    """running, complete, interrupted or failed."""
    recipe: dict[str, Any]
    base_dir: str
    task: str
    seed: int
    steps: int
    versions: dict[str, str]
    device: str
    threads: int
    base: dict[str, str]
    """Where the base was found and its fingerprint."""
    adapter: dict[str, Any]
    """The peft config."""
    parameters: dict[str, int]
    data: dict[str, Any]
    """Hashes of the files, counts of rows, domains and labels."""
    time: dict[str, Any] = field(default_factory=dict)
    """Seconds of each phase, and when they began (UTC)."""
    metrics: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    """What it cost and how large its adapter is, see `weftlora.train.figures`; empty until it is complete."""

    @property
    def adapter_folder(self) -> Path:
        """Where the trained adapter lies, as peft saved it."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What a resumed training continues from."""
        return self.folder / "checkpoints"

    def record(self) -> dict[str, Any]:
        """The run as plain data, as `run.json` and `--json` show it."""
        return {"format": FORMAT, **dataclasses.asdict(self), "folder": str(self.folder)}

    def save(self) -> None:
        """Write run.json. Raises RunError."""
        write_json(self.folder / "run.json", self.record())

    def event(self, name: str, **facts: Any) -> None:
        """Append to events.jsonl. Raises RunError."""
        append_json(self.folder / "events.jsonl", {"event": name, "time": now(), **facts})

    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            RunError: no run.json, a damaged one, or one of a newer format.
        """
        path = Path(folder)
        if not (path / "run.json").is_file():
            raise RunError(f"{path} is no run folder: it has no run.json.")
        content = read_json(path / "run.json")
        if content.pop("format", 0) > FORMAT:
            raise RunError(f"{path / 'run.json'} was written by a newer weftlora: update weftlora to read it.")
        names = {item.name for item in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in content.items() if key in names} | {"folder": path})
        except TypeError as error:
            raise RunError(f"{path / 'run.json'} is damaged: {error}.") from None


def check_source(folder: Path) -> None:
    """Refuse a path that cannot be a run folder or an adapter folder. Raises AdapterError."""
    if not folder.exists():
        raise AdapterError(
            f"{folder} is no adapter: there is no folder {str(folder)!r}; give a run folder or an adapter folder."
        )
    if not (folder / "run.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder} is no adapter: give a run folder or a folder with an adapter_config.json.")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a run folder that cannot be made, before anything slow begins.

    Raises:
        RunError: something is there already, or the place cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"the run folder {folder} is a file: choose another folder with out=....")
    if folder.exists() and any(folder.iterdir()) and not _is_unstarted(folder):
        if overwrite and folder.resolve() == Path.cwd():
            raise RunError(
                f"--overwrite cannot replace the working folder {str(folder)!r}: choose another out, or start elsewhere."
            )
        if (waiting := _beside(folder)).exists():
            raise RunError(
                f"{waiting} holds a run that was being replaced when weftlora was stopped: move it away or delete it first."
            )
        if not overwrite:
            raise RunError(f"the run folder {folder} is not empty: continue it with --resume, or use --overwrite.")
        if not (folder / "run.json").is_file():
            raise RunError(
                f"--overwrite replaces run folders only, and {folder} holds other files: choose another out."
            )
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir():
        raise RunError(f"the run folder {folder} cannot be made: {nearest} is a file.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"the run folder {folder} cannot be made: {nearest} is read-only; choose another with out=....")


def check_continues(run: Run, recipe: dict[str, Any]) -> None:
    """Refuse to resume a run with another recipe: it would be neither run.

    Raises:
        ConfigError: the first key that differs, with both values.
    """
    for key, (before, after) in differences(run.recipe, recipe, ""):
        if key not in FREE_ON_RESUME and key != "out":
            raise ConfigError(f"{run.folder} was started with {key}={before!r}, not {after!r}: resume it as it was.")


def differences(a: Any, b: Any, key: str) -> Iterable[tuple[str, tuple[Any, Any]]]:
    """Every key, with dots, at which two mappings differ, and both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, (a, b)


def _is_unstarted(folder: Path) -> bool:
    """Whether a kill left a new run folder before its first run.json: there is nothing in it to lose or to resume."""
    return {path.name for path in folder.rglob("*")} <= {"checkpoints", "run.json.part"}


def _beside(folder: Path) -> Path:
    """Where a run waits while the one that replaces it starts."""
    return folder.resolve().with_name(folder.resolve().name + ".replaced")


class Made:
    """A new run folder. The run it replaces waits beside it, so that a start that fails changes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        occupied = folder.exists() and any(folder.iterdir()) and not _is_unstarted(folder)
        self.replaced = _beside(folder) if occupied else None
        with writing(folder):
            if self.replaced:
                folder.replace(self.replaced)
            self.top = next((path for path in reversed((folder, *folder.parents)) if not path.exists()), None)
            try:
                (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            except OSError:
                self.undo()
                raise

    def undo(self) -> None:
        """Delete what was made and put back what was replaced; an empty folder that was there before stays."""
        if self.top is not None:
            shutil.rmtree(self.top, ignore_errors=True)
        else:
            for path in self.folder.iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        if self.replaced:
            self.replaced.replace(self.folder)

    def keep(self) -> None:
        """The new run has started: delete the one it replaces."""
        if self.replaced:
            shutil.rmtree(self.replaced, ignore_errors=True)
