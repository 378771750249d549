"""A comparison in storage that is no folder of this machine: an object store, or whatever else fsspec knows by a URL.

    compare.json                          the plan
    leases/<job>.<n>.lease                who runs what: see `weftlora.compare.leases`
    takes/<job>.<n>.begun.json            what the n-th to claim a job has put there of it, so that the next one can go on from it
    takes/<job>.<n>.ended.json            the same of a run that has ended: its results, its adapter, or its problem
    runs/<method>/s<seed>/<n>.<step>/...  the files of a run that has come to a checkpoint; tuning/<method>/lr<rate>-s<seed>/ likewise
    runs/<method>/s<seed>/<n>/...         those of one that has ended

A worker runs in a folder of its own, laid out as any comparison's, and what counts is what the storage has. A take is written last,
as one small object with the size and the SHA-256 of each of its files: what has none is not there. Every claim has names of its own,
and every checkpoint, so that a worker that was taken for lost never writes over the one who took over, whenever it comes back, and one
that is killed in the middle leaves the take before as it was; of two takes of a job the later one counts. Nothing is locked, renamed
or appended to.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weftlora.compare.leases import Files, name_of
from weftlora.compare.plan import Plan
from weftlora.disk.files import file_digest, replacing, writing
from weftlora.disk.ownership import CHECKPOINT, delete, files_of, inside, is_temporary, of_run
from weftlora.errors import RunError
from weftlora.foreign_text import from_json
from weftlora.train import checkpoint

PLAN = "compare.json"
TAKES = "takes"
_TAKE = re.compile(r"(?P<job>.+)\.(?P<n>\d{1,9})\.(?P<state>begun|ended)\.json")
FORMAT = 1


@dataclass(frozen=True)
class Take:
    """What the n-th to claim a job has put into the storage of it."""

    job: str
    n: int
    state: Literal["begun", "ended"]

    @property
    def name(self) -> str:
        return f"{self.job}.{self.n}.{self.state}.json"

    def place(self, folder: str, step: int) -> str:
        """Where its files are, of a run's folder and the step that the take is of."""
        return f"{folder}/{self.n}" if self.state == "ended" else f"{folder}/{self.n}.{step}"


def is_url(place: object) -> bool:
    """Whether this names storage rather than a folder of this machine."""
    return isinstance(place, str) and "://" in place


class Store:
    """The storage of one comparison. Every method may raise OSError where it cannot be reached, and RunError where it is damaged."""

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")
        self.top, self.takes, self.leases = (
            Files(path) for path in (self.place, f"{self.place}/{TAKES}", f"{self.place}/leases")
        )
        self.brought: dict[str, int] = {}
        """Job → the take of its ended run that is in our folder."""

    # ------------------------------------------------------------------ the plan

    def bring_plan(self, folder: Path) -> Plan | None:
        """The plan, which is then in `folder` too; None where there is none yet."""
        text = self.top.read(PLAN)
        return None if text is None else _plan_in(folder, text)

    def put(self, folder: Path, name: str) -> None:
        """A file of the comparison itself, under its name."""
        self.top.write(name, (folder / name).read_text(encoding="utf-8"))

    # ------------------------------------------------------------------ runs

    def latest(self) -> dict[str, Take]:
        """Job → what counts of it: how it ended, or else how far the last one came."""
        found: dict[str, Take] = {}
        for name in self.takes.names():
            if match := _TAKE.fullmatch(name):
                state: Any = match["state"]
                take = Take(match["job"], int(match["n"]), state)
                best = found.get(take.job)
                if best is None or (take.state == "ended", take.n) > (best.state == "ended", best.n):
                    found[take.job] = take
        return found

    def bring(self, runs: Iterable[str], folder: Path, whole: bool = False) -> set[str]:
        """Have what ended of these runs in `folder`, without their adapters unless `whole`; those of them that ended."""
        latest = self.latest()
        ended = set()
        for run in runs:
            take = latest.get(name_of(run))
            if take is None or take.state != "ended":
                continue
            if self.brought.get(take.job) != take.n:
                self._fetch(take, run, folder, lambda name: whole or "/" not in name)
                self.brought[take.job] = take.n
            ended.add(run)
        return ended

    def go_on(self, name: str, folder: Path) -> None:
        """Have what others came to in a run that has not ended, unless this folder is as far as they are."""
        take = self.latest().get(name_of(name))
        if take is None or take.state != "begun":
            return
        manifest = self._manifest(take)
        run = inside(folder, name)
        if manifest is None or newest_step(run) >= manifest["step"]:
            return
        with writing(run):
            delete(of_run(run, vouched=True), folder)
        self._fetch(take, name, folder, lambda name: True)

    def put_run(
        self,
        name: str,
        n: int,
        folder: Path,
        state: Literal["begun", "ended"],
        is_ours: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Put a run there, as the n-th to claim it; False where it was not ours any more, or changed too much meanwhile to be whole.

        Args:
            name: its folder in the comparison's, as a job has it.
            state: begun: with its newest checkpoint; ended: without checkpoints.
            is_ours: asked before the take is written.
        """
        run, take = inside(folder, name), Take(name_of(name), n, state)
        step = newest_step(run)
        if state == "begun" and step < 0:
            return False
        files: dict[str, dict[str, Any]] = {}
        try:
            for path in _of_take(run, state):
                if not is_ours():
                    return False
                file = path.relative_to(run).as_posix()
                files[file] = self.top.upload(path, f"{take.place(name, step)}/{file}")
        except FileNotFoundError as error:
            if state == "ended" or Path(str(error.filename)).exists():
                raise
            return False  # the training has dropped this checkpoint for a newer one
        if not is_ours() or (state == "begun" and f"checkpoints/checkpoint-{step}/{checkpoint.MARKER}" not in files):
            return False
        before = self._manifest(take) if state == "begun" else None
        content = {"format": FORMAT, "folder": name, "step": step, "files": files}
        self.takes.write(take.name, json.dumps(content, indent=1))
        if before is not None and before["step"] != step:
            self._remove(take.place(name, before["step"]), before)
        if state == "ended":
            self.brought[take.job] = n
            self._tidy(take, name)
        return True

    def _tidy(self, ended: Take, folder: str) -> None:
        """Take away what was there only to go on from, as far as that can be done."""
        for name in self.takes.names():
            match = _TAKE.fullmatch(name)
            if match is None or match["job"] != ended.job or match["state"] != "begun":
                continue
            begun = Take(ended.job, int(match["n"]), "begun")
            with suppress(OSError, RunError):
                manifest = self._manifest(begun)
                self.takes.remove(name)  # first: what it names is no more
                if manifest is not None:
                    self._remove(begun.place(folder, manifest["step"]), manifest)

    def _remove(self, place: str, manifest: dict[str, Any]) -> None:
        """Delete the files of a take that is no more, as far as that can be done."""
        for name in manifest["files"]:
            with suppress(OSError):
                self.top.remove(f"{place}/{name}")

    def _manifest(self, take: Take) -> dict[str, Any] | None:
        """What a take says is there; None where it is gone. Raises RunError."""
        text = self.takes.read(take.name)
        if text is None:
            return None
        try:
            content = from_json(text)
            if content["format"] > FORMAT:
                raise RunError(
                    f"{self.place}/{TAKES}/{take.name} was written by a newer weftlora: update weftlora to read it."
                )
            files = {str(name): (int(each["bytes"]), str(each["sha256"])) for name, each in content["files"].items()}
            return {"step": int(content["step"]), "files": files}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{self.place}/{TAKES}/{take.name} is damaged ({type(error).__name__}): delete it and its lease, and the run is "
                "carried out again."
            ) from None

    def _fetch(self, take: Take, folder: str, top: Path, wanted: Callable[[str], bool]) -> None:
        """Have the files of a take in a run's folder; run.json, which vouches for it, last."""
        manifest = self._manifest(take)
        if manifest is None:
            return
        run, place = inside(top, folder), take.place(folder, manifest["step"])
        for name in sorted(filter(wanted, manifest["files"]), key=lambda name: (name == "run.json", name)):
            size, digest = manifest["files"][name]
            path = inside(run, name)
            if path.is_file() and path.stat().st_size == size and file_digest(path) == digest:
                continue
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                if self.top.download(f"{place}/{name}", file) != {"bytes": size, "sha256": digest}:
                    raise RunError(
                        f"{self.place}/{place}/{name} is not what {TAKES}/{take.name} says it is: delete that take and its "
                        "lease, and the run is carried out again."
                    )


def _plan_in(folder: Path, text: str) -> Plan:
    """The plan that a text is, which is then in `folder`."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PLAN) as file:
        file.write(text.encode())
    return Plan.load(folder)


def newest_step(run: Path) -> int:
    """The step of a run's newest complete checkpoint; -1 where it has none."""
    found = checkpoint.marked(run / "checkpoints")
    return checkpoint.step_of(found[-1]) if found else -1


def _of_take(run: Path, state: str) -> Iterator[Path]:
    """The files of a run that are put into the storage."""
    newest = checkpoint.marked(run / "checkpoints")[-1:] if state == "begun" else []
    for path in of_run(run, vouched=True):
        if is_temporary(path) or (CHECKPOINT.fullmatch(path.name) and path not in newest):
            continue
        if path.is_dir():
            yield from (path / name for name in sorted(files_of(path)) if not (path / name).is_symlink())
        else:
            yield path


def fetch(place: str, folder: Path, whole: bool = True) -> None:
    """A comparison out of storage into a folder, as far as it has come: what ended, `whole` with its adapters.

    Raises:
        RunError: there is no comparison, the storage cannot be reached or is damaged, or the folder holds something else.
    """
    with answering(place):
        store = Store(place)
        text = store.top.read(PLAN)
        if text is None:
            raise RunError(f"there is no comparison at {place}: it has no {PLAN}.")
        if (folder / PLAN).is_file():
            before = Plan.load(folder)
            with tempfile.TemporaryDirectory() as looked_at:
                there = _plan_in(Path(looked_at), text)
            if (before.hashes, before.slugs) != (there.hashes, there.slugs):
                raise RunError(f"{folder} holds another comparison than {place}: choose another folder with --out.")
        elif folder.is_dir() and (other := next(folder.iterdir(), None)) is not None:
            raise RunError(f"{folder} holds other files, such as {other.name}: choose another folder with --out.")
        store.bring(_plan_in(folder, text).every_run(), folder, whole)


@contextmanager
def answering(place: str) -> Iterator[None]:
    """Around calls of a store: what it does not answer is one sentence. Raises RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{place} cannot be reached: {said(error)}; give the same command again once it can.") from None


def said(error: OSError) -> str:
    """Why storage did not answer, on one line."""
    return " ".join((error.strerror or str(error) or type(error).__name__).split())[:300]
