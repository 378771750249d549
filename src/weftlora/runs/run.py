"""A run is a folder.

run.json        what was asked and what came out; written whole or not at all
metrics.jsonl   one line per logged step: loss, rate, tokens
events.jsonl    what happened when: start, checkpoints, resume, end
samples.jsonl   what it answered to a few prompts while it was trained, if it was asked
adapter/        the trained adapter, as peft saves it
checkpoints/    what --resume continues from
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from weftlora.disk.files import (
    append_json,
    check_regular,
    read_json,
    read_lines,
    why_no_file,
    write_json,
    write_lines,
    writing,
)
from weftlora.disk.lock import NAME, is_held
from weftlora.disk.ownership import (
    FOLDERS,
    REPLACED,
    check_no_links,
    delete,
    is_temporary,
    move,
    of_run,
    replaced_runs,
    temporary,
    unfinished_files,
    without_empty,
)
from weftlora.errors import AdapterError, ConfigError, RunError
from weftlora.foreign_text import html_table
from weftlora.records import NUMBER, Record, check_kinds
from weftlora.redaction import redacted
from weftlora.settings import is_number, is_whole

FORMAT = 1
"""Version of run.json; a newer one is refused by name."""

SAMPLES = "samples.jsonl"
"""What the run answered to the prompts of `train.samples`, if there are some."""
LOSSES = ("loss", "validation_loss")
"""Of a row of metrics.jsonl, as far as it has them; NaN where training has diverged."""
FREE_ON_RESUME = {
    "train.report_to",
    "train.keep",
    "train.logging_every",
    "train.samples",
    "train.sample_tokens",
    "train.follow_heads",
}
"""Keys that may differ when a run is resumed: they do not touch the adapter."""


@dataclass(frozen=True)
class Run(Record):
    """One training run: what `run.json` holds, and the folder it lies in."""

    format_version: ClassVar[int | None] = FORMAT
    folder: Path
    status: str
    """running, which a process then is that holds the folder's lock; complete, interrupted or failed."""
    recipe: dict[str, Any]
    base_dir: str
    task: str
    seed: int
    steps: int
    versions: dict[str, str]
    device: str
    threads: int
    base: dict[str, Any]
    """Where the base was found, its fingerprint, and the digests of its config, tokenizer and weights."""
    adapter: dict[str, Any]
    """The peft config."""
    parameters: dict[str, int]
    data: dict[str, Any]
    """Hashes of the files, counts of rows, domains and labels."""
    time: dict[str, Any] = field(default_factory=dict)
    """Seconds of each phase, and when they began (UTC)."""
    metrics: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    """What it cost and how large its adapter is, see `weftlora.train.costs`; empty until it is complete."""
    extends: dict[str, Any] = field(default_factory=dict)
    """The run that it goes on with, and from which step; empty for most."""
    processes: int = 1
    """How many processes it was started with. Others may go on with it, if they can take as many rows per step."""

    @property
    def adapter_folder(self) -> Path:
        """Where the trained adapter lies, as peft saved it."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """What a resumed training continues from."""
        return self.folder / "checkpoints"

    def _repr_html_(self) -> str:
        rows = [
            ("status", self.status),
            ("steps", self.steps),
            ("trainable parameters", f"{self.parameters.get('trainable', 0):,}"),
        ]
        rows += [(name.replace("_", " "), f"{value:.4g}") for name, value in sorted(self.metrics.items())]
        rows += [("adapter", self.adapter_folder)] if self.status == "complete" else []
        return html_table(f"Run {self.folder}", ["", ""], rows)

    def save(self) -> None:
        """Write run.json. Raises RunError."""
        write_json(self.folder / "run.json", self.record())

    def whole(self) -> Run:
        """This, if its record has all that every run's has. Raises RunError: it is damaged."""
        check_kinds(vars(self), dict.fromkeys(_EVERY, object), self.folder / "run.json", needed=True)
        return self

    def check_there(self) -> None:
        """Refuse to write on where the folder was taken away meanwhile, or is another run's now. Raises RunError."""
        try:
            there = read_json(self.folder / "run.json").get("time")
        except RunError:
            there = None
        if not isinstance(there, dict) or there.get("started") != self.time.get("started"):
            raise RunError(
                f"the run folder {self.folder} was removed or replaced while it was being written: put it back and continue with "
                "--resume, or start again."
            )

    def event(self, name: str, **facts: Any) -> None:
        """Append to events.jsonl. Raises RunError."""
        append_json(self.folder / "events.jsonl", {"event": name, "time": now(), **facts})

    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; one without a step, or with a loss that is no number, is none."""

        def is_row(row: dict[str, Any]) -> bool:
            return is_whole(row.get("step"), 0) and all(is_number(row[key]) for key in LOSSES if key in row)

        return [row for row in read_lines(self.folder / "metrics.jsonl") if is_row(row)]

    def keep_until(self, step: int, before: Run) -> None:
        """What `before` wrote of its steps up to this one, its metrics and samples, becomes this run's; later rows are left out."""
        write_lines(self.folder / "metrics.jsonl", [row for row in before.history() if row["step"] <= step])
        if samples := before.samples():
            write_lines(self.folder / SAMPLES, [row for row in samples if row["step"] <= step])

    def samples(self) -> list[dict[str, Any]]:
        """The rows of samples.jsonl, in order; none where no samples were asked for, and none that is no answer."""

        def is_row(row: dict[str, Any]) -> bool:
            texts = isinstance(row.get("prompt"), str) and isinstance(row.get("text"), str)
            return texts and is_whole(row.get("step"), 0) and isinstance(row.get("reference", ""), str)

        return [row for row in read_lines(self.folder / SAMPLES) if is_row(row)]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            RunError: no run.json, a damaged one, or one of a newer format.
        """
        path = Path(folder)
        if not (path / "run.json").is_file():
            raise RunError(f"{path} is not a run folder: it has no run.json.")
        for part in (path, path / "adapter"):
            check_regular(part, RunError)
        content = read_json(path / "run.json")
        check_kinds(content, _KINDS, path / "run.json")
        fields = cls.fields_in(content, path / "run.json")
        if fields.get("status") == "running" and not is_held(path):
            fields["status"] = "interrupted"  # whoever ran it was killed before it could say so
        try:
            return cls(**fields | {"folder": path})
        except TypeError as error:
            raise RunError(f"{path / 'run.json'} is damaged: {error}.") from None


_EVERY = (
    *("recipe.model.path", "recipe.data.train", "recipe.adapter", "recipe.train.lr", "parameters.trainable"),
    *("base.source", "base.kind", "base.shapes", "base.values", "data.hashes", "data.labels"),
)
"""What the record of every run has."""
_KINDS: dict[str, type | tuple[type, ...]] = {
    "extends": dict,
    **dict.fromkeys(
        ("recipe.model", "recipe.data", "recipe.adapter", "recipe.train", "data.hashes", "data.counts"), dict
    ),
    **dict.fromkeys(("recipe.model.path", "recipe.out"), str),
    "recipe.data.train": (str, list, dict),
    "base.weights": (str, dict),
    **dict.fromkeys(("base.source", "base.kind", "base.shapes", "base.values", "adapter.peft_type"), str),
    **dict.fromkeys(("recipe.train.lr", "time.train_seconds", "time.search_seconds", "time.search_in_steps"), NUMBER),
    **dict.fromkeys(("adapter.r", "adapter.target_r", "adapter.lora_alpha"), (*NUMBER, type(None))),
    "recipe.adapter.recipe": (str, type(None)),
    "data.labels": (list, type(None)),
    "data.max_length": int,
}
"""What the values inside of run.json's sections are; what is not there is looked for where it is needed."""


def adapter_in(folder: Path) -> Path:
    """The adapter folder of a run folder; an adapter folder is its own."""
    return folder / "adapter" if (folder / "run.json").is_file() else folder


def check_source(folder: Path) -> None:
    """Refuse a path that cannot be a run folder or an adapter folder. Raises AdapterError."""
    if not folder.exists():
        raise AdapterError(
            f"{folder} is not an adapter: there is no folder {str(folder)!r}; give a run folder or an adapter folder."
        )
    if not (folder / "run.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise AdapterError(f"{folder} is not an adapter: give a run folder or a folder with an adapter_config.json.")


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
    if folder.exists() and not _is_empty(folder):
        if overwrite and folder.resolve() == Path.cwd():
            raise RunError(
                f"--overwrite cannot replace the working folder {str(folder)!r}: choose another folder "
                "with out=..., or start elsewhere."
            )
        if not overwrite:
            raise RunError(f"the run folder {folder} is not empty: continue it with --resume, or use --overwrite.")
        if not (folder / "run.json").is_file():
            raise RunError(
                f"--overwrite replaces run folders only, and {folder} holds other files: choose another folder with out=...."
            )
        check_no_links(folder)
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir():
        raise RunError(f"the run folder {folder} cannot be made: {nearest} is a file.")
    if reason := why_no_file(nearest):
        raise RunError(
            f"the run folder {folder} cannot be made: {nearest} takes no new file ({reason}); choose another with out=...."
        )


FREE_TO_EXTEND = FREE_ON_RESUME | {
    "train.steps",
    "train.epochs",
    "train.schedule",
    "train.warmup",
    "train.eval_every",
    "train.eval_rows",
    "train.save_every",
    "train.best",
    "train.early_stopping",
}
"""Keys that may differ in a run that extends another: how long, and how the added steps are gone through."""


def check_extends(run: Run, recipe: dict[str, Any]) -> None:
    """Refuse to extend a run as another one. Raises ConfigError."""
    for key, (before, after) in differences(run.recipe, redacted(recipe), ""):
        if key not in FREE_TO_EXTEND and key != "out":
            raise ConfigError(
                f"{run.folder} was trained with {key}={before!r}, and a run that extends it cannot have {after!r}: leave it out, or "
                "begin a run of its own with train.from."
            )


def check_continues(run: Run, recipe: dict[str, Any]) -> None:
    """Refuse to resume a run with another recipe: it would be neither run.

    Raises:
        ConfigError: the first key that differs, with both values.
    """
    for key, (before, after) in differences(run.recipe, redacted(recipe), ""):
        if key not in FREE_ON_RESUME and key != "out":
            more = f", or train for longer with --extend train.steps={after}" if key == "train.steps" and after else ""
            raise ConfigError(
                f"{run.folder} was started with {key}={before!r}, not {after!r}: resume it as it was{more}."
            )


def differences(a: Any, b: Any, key: str) -> Iterable[tuple[str, tuple[Any, Any]]]:
    """Every key, with dots, at which two mappings differ, and both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)
    elif a != b:
        yield key, (a, b)


def _is_empty(folder: Path) -> bool:
    """Whether there is nothing in it to lose or to resume: at most what a kill left of a start before its first run.json."""
    left = [path for path in folder.iterdir() if path.name != NAME and not (is_temporary(path) and path.is_file())]
    return all(path.name == "checkpoints" and path.is_dir() and not any(path.iterdir()) for path in left)


def is_run(folder: Path) -> bool:
    """Whether a run lies there, perhaps one that was being replaced when weftlora was killed."""
    return folder.is_dir() and ((folder / "run.json").is_file() or bool(replaced_runs(folder)))


def settle(folder: Path) -> None:
    """End what a kill interrupted: a run that was being replaced is put back, unless the one that replaces it had begun.

    Raises:
        RunError: the folder cannot be written.
    """
    with writing(folder):
        for aside in replaced_runs(folder):
            # run.json is moved last: while the rest is being moved, the folder's own is still that of the replaced run
            if (aside / "run.json").is_file() and (folder / "run.json").is_file():
                _forget(aside)
            else:
                move(of_run(aside, vouched=True), aside, folder)
                (folder / "checkpoints").mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
        delete(unfinished_files(folder), folder)


def _forget(aside: Path) -> None:
    gone = temporary(aside.parent / "gone")
    aside.replace(gone)  # half deleted, it must not look like a run to put back
    shutil.rmtree(gone)


class Made:
    """A new run in a folder. The run it replaces waits in it, hidden, so that a start that fails changes nothing.

    What lies in the folder and was not written by a run stays where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.aside = temporary(folder / REPLACED)
        with writing(folder):
            try:
                move(of_run(folder), folder, self.aside)
                (folder / "checkpoints").mkdir(exist_ok=True)
            except OSError:
                self.undo()
                raise

    def undo(self) -> None:
        """Delete what the new run has written and put back what it was to replace. Raises RunError."""
        with writing(self.folder):
            self._undo()

    def _undo(self) -> None:
        if (self.aside / "run.json").is_file() or not self.aside.exists():  # else nothing of the new run is there yet
            delete(of_run(self.folder, vouched=True), self.folder)
            without_empty({self.folder / name for name in FOLDERS}, self.folder)
        if self.aside.exists():
            move(of_run(self.aside, vouched=True), self.aside, self.folder)
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            shutil.rmtree(self.aside)

    def keep(self) -> None:
        """The new run has started: delete the one it replaces. Raises RunError."""
        with writing(self.folder):
            if self.aside.exists():
                _forget(self.aside)
