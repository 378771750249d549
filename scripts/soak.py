"""`make soak`: commands of weftlora killed, stopped and hindered at random moments, over and over, until each has done its work.

    python scripts/soak.py [--minutes 10] [--seed 0] [--fresh 0.06] [--out evidence/soak.json]

A try is one command in a folder of its own, given again after whatever has ended it. Moments are drawn from somewhat more than the
length of the undisturbed command, so trouble comes wherever the process happens to be:

    killed           SIGKILL, to the process alone or to all it has started
    terminated       SIGTERM
    interrupted      SIGINT, to all of them, as Ctrl-C does
    met              a second process gets the same command for the same folder
    full             the folder is a tmpfs that has no room for the result
    read-only        everything in the folder becomes immutable
    gone             the folder is renamed, and later put back, or is deleted for good

Where a kill came is read from what it left behind, or told by the process itself (`stages`). Now and then the folder moves to another
place between two lives. What must hold: nothing that looks finished is anything but what the
undisturbed command has written (or what was there before), what ends itself says why in one sentence, no process outlives
a kill, nobody's file is lost, and in the end the result is the undisturbed one, byte for byte but for times and memory.

Lives are forked from one process that has imported everything: importing is most of a short life, and there is nothing yet to be
harmed. A share of the tries are fresh processes, from the interpreter's start on. A seed is a part: its counts are in the file,
where the parts add up, after every try, and a part that is called again goes on. Exits 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import stages
import torch
import yaml

if __name__ == "__main__":
    stages.watch()  # before weftlora is imported

from transformers import AutoModelForCausalLM, AutoTokenizer

import weftlora
import weftlora.compare.running  # imported once, before the first fork
import weftlora.export.proof
import weftlora.report.comparison.page
import weftlora.train.evaluation
import weftlora.train.loop
from weftlora.cli import main as cli
from weftlora.compare import workers
from weftlora.data.demo import demo_model_path
from weftlora.disk.files import read_json, read_lines
from weftlora.disk.ownership import files_of, is_temporary
from weftlora.runs.run import Run
from weftlora.train import checkpoint

RECIPES = {
    "lora": [],
    "hydralora": [],
    "tied_lora": [],
    "lora_dash": ["adapter.after=6"],
    "lora_init": ["adapter.after=6"],
    "lora_tsd": ["adapter.after=6"],
    "alora": ["adapter.first=4", "adapter.every=2", "adapter.max_rounds=2", "adapter.rows=4"],
    "flexora": ["adapter.steps=6", "adapter.val_size=32", "adapter.outer_batches=2"],
}
LENGTH = "train.steps=12 train.batch_size=8 train.save_every=2 train.logging_every=3 train.num_threads=1"
SETTINGS = [
    *LENGTH.split(),
    "train.schedule=constant",
    "adapter.lora_dropout=0.1",
    "data.limit=200",
    "data.validation_limit=16",
    "data.test_limit=16",
]
COMPARISON = {
    "model": "demo",
    "data": {"train": "demo", "max_length": 64, "limit": 200, "test_limit": 16, "validation_limit": 16},
    "train": {"steps": 6, "batch_size": 8, "save_every": 2, "logging_every": 3, "schedule": "constant"},
    "rates": {"values": [1e-3, 1e-2]},
    "methods": ["lora", "tied_lora"],
    "seeds": 1,
}

# ---------------------------------------------------------------------- what is finished, and how it must be

TIMES = {"time", "peak_bytes", "train_seconds", "cpu_per_step", "tokens_per_s", "timed_steps", "seconds", "step_ratio"}
PLACES = {"out", "folder", "run", "machine", "path"}
MEASURED = TIMES | PLACES | {"events_per_s", "search_seconds"}
"""Keys of records that tell when, where and how fast, and so differ between two runs."""


def steady(value: Any) -> Any:
    """A record without what differs between two equal runs."""
    if isinstance(value, dict):
        return {key: steady(inner) for key, inner in value.items() if key not in MEASURED}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


Pieces = dict[str, Any]
"""What looks finished in a folder, by name."""


def of_run(out: Path) -> Pieces:
    found: Pieces = {}
    for path in checkpoint.marked(out / "checkpoints"):
        if wrong := checkpoint.problem(path):
            found[f"the marker of {path.name}"] = wrong
    if (out / "adapter").is_dir():
        found |= {f"adapter/{path.name}": digest(path) for path in sorted((out / "adapter").iterdir())}
    if (out / "run.json").is_file() and (run := Run.load(out)).status == "complete":
        found["run.json"] = steady(read_json(out / "run.json"))
        found["metrics.jsonl"] = [steady(row) for row in run.history()]
        ends = [row["event"] for row in read_lines(out / "events.jsonl")].count("end")
        found["events.jsonl"] = ends > 0
    for path in out.glob("eval-*.json"):
        found[path.name] = steady(read_json(path))
    return found


def of_comparison(out: Path) -> Pieces:
    found: Pieces = {}
    for folder in sorted(path.parent for path in [*out.glob("*/*/*/run.json"), *out.glob("*/*/*/eval-*.json")]):
        found |= {f"{folder.relative_to(out)}/{name}": piece for name, piece in of_run(folder).items()}
    problems = {path: read_json(path) for path in out.rglob("problem.json")}
    for path, problem in problems.items():
        if problem["status"] != "failed":  # as on a full disk, and what failed is tried again
            found[str(path.relative_to(out))] = problem
    if (out / "comparison.json").is_file():
        record = read_json(out / "comparison.json")
        if record["complete"] and not problems:
            found["comparison.json"] = steady(record)
    return found


def of_folder(out: Path) -> Pieces:
    return {name.as_posix(): digest(out / name) for name in sorted(files_of(out))} if out.is_dir() else {}


def of_file(path: Path) -> Pieces:
    if not path.is_file():
        return {}
    return {path.name: steady(read_json(path)) if path.suffix == ".json" else digest(path)}


# ---------------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Command:
    """A command that writes into a folder: its arguments for what lies there now, and what it leaves."""

    name: str
    arguments: Callable[[Path, bool], list[str]]
    """Of the folder, and whether it has moved since the first life."""
    pieces: Callable[[Path], Pieces]
    phase: Callable[[Path], str]
    """Where a kill came, read from what it left behind; empty where only the process itself can say."""
    begin: Callable[[Path], None]
    """Puts there what lies there before the command is given for the first time."""


NOTES = "notes.txt"
"""A file of the user's in every folder."""


def phase_of_run(out: Path) -> str:
    """Where a kill came, read from what it left behind."""
    if not (out / "run.json").is_file():
        return "before run.json"
    if Run.load(out).status == "complete":
        return "after the end"
    if any(out.glob(".adapter.weft-*")) or out.joinpath("adapter").exists():
        return "writing the adapter or run.json"
    every = checkpoint.folders(out / "checkpoints")
    if any(not checkpoint.is_marked(path) for path in every):
        return "writing a checkpoint"
    events = out / "events.jsonl"
    if events.exists() and '"dash_launch"' in events.read_text(encoding="utf-8"):
        return "training, after a launch"
    if (out / "search").is_dir() and not (out / "selection.json").is_file():
        return "searching layers"
    return "training" if every or (out / "metrics.jsonl").exists() else "before the first step"


def phase_of_comparison(out: Path) -> str:
    if not (out / "compare.json").is_file():
        return "before the plan"
    if (out / "comparison.json").is_file():
        return "after the end"
    states = [Run.load(path.parent).status for path in out.glob("*/*/*/run.json")]
    return f"{states.count('complete')} runs trained, {len(states) - states.count('complete')} at work"


def commands(top: Path) -> dict[str, Command]:
    """All of them; `top` has two trained runs, `ran-lora` and `ran-tied_lora`, and an earlier one of each kind of output."""

    def notes(place: Path) -> None:
        place.mkdir(exist_ok=True)
        (place / NOTES).write_text("mine", encoding="utf-8")

    def earlier(name: str, to: str) -> Callable[[Path], None]:
        def begin(place: Path) -> None:
            notes(place)
            source, target = top / name, place / to
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)

        return begin

    def training(recipe: str) -> Command:
        def arguments(place: Path, moved: bool) -> list[str]:
            out = place / "run"
            if moved and (out / "run.json").is_file():
                return ["train", str(out), "--resume"]
            resume = ["--resume"] if (out / "run.json").is_file() else []
            return ["train", recipe, f"out={out}", *SETTINGS, *RECIPES[recipe], *resume]

        def phase(place: Path) -> str:
            return phase_of_run(place / "run")

        return Command(f"train {recipe}", arguments, lambda place: of_run(place / "run"), phase, notes)

    def again(place: Path, moved: bool) -> list[str]:
        out = place / "run"
        mine = (out / "run.json").is_file() and read_json(out / "run.json")["seed"] == 1
        return ["train", "lora", f"out={out}", "train.seed=1", *SETTINGS, "--resume" if mine else "--overwrite"]

    def comparing(place: Path, moved: bool) -> list[str]:
        return ["compare", str(top / "comparison.yaml"), f"out={place / 'comparison'}", "--jobs", "2"]

    def searching(place: Path, moved: bool) -> list[str]:
        short = [
            "data.limit=200",
            "data.validation_limit=16",
            *RECIPES["flexora"],
            "train.batch_size=8",
            "train.num_threads=1",
        ]
        return ["search", "flexora", *short, "--out", str(place / "selection.json")]

    def exporting(*more: str) -> Callable[[Path, bool], list[str]]:
        def arguments(place: Path, moved: bool) -> list[str]:
            there = ["--overwrite"] if (place / "export").exists() else []  # a kill came after the end
            return ["export", str(top / "ran-lora"), "--out", str(place / "export"), *more, *there]

        return arguments

    def reporting(place: Path, moved: bool) -> list[str]:
        return ["report", str(top / "ran-lora"), str(top / "ran-tied_lora"), "-o", str(place / "page.html")]

    def measuring(place: Path, moved: bool) -> list[str]:
        return ["eval", str(place / "run"), "--max-new-tokens", "4"]

    def output(name: str) -> dict[str, Any]:
        read = of_folder if name == "export" else of_file
        return {
            "pieces": lambda place: read(place / name),
            "phase": lambda place: "",
        }

    of_run_there = {"pieces": lambda place: of_run(place / "run"), "phase": lambda place: phase_of_run(place / "run")}
    compared = {
        "pieces": lambda place: of_comparison(place / "comparison"),
        "phase": lambda place: phase_of_comparison(place / "comparison"),
    }
    every = [
        *map(training, RECIPES),
        Command("train --overwrite", again, **of_run_there, begin=earlier("ran-lora", "run")),
        Command(
            "eval",
            measuring,
            of_run_there["pieces"],
            lambda place: "",
            earlier("ran-lora", "run"),
        ),
        Command("compare --jobs 2", comparing, **compared, begin=notes),
        Command("search", searching, **output("selection.json"), begin=notes),
        Command("export", exporting(), **output("export"), begin=notes),
        Command("export --to merged", exporting("--to", "merged"), **output("export"), begin=notes),
        Command(
            "export --overwrite", exporting("--overwrite"), **output("export"), begin=earlier("exported", "export")
        ),
        Command("report", reporting, **output("page.html"), begin=earlier("page.html", "page.html")),
    ]
    return {each.name: each for each in every}


# ---------------------------------------------------------------------- lives


@dataclass
class Life:
    """One process of a command, with all that it starts, and what it says."""

    process: int
    log: Path
    code: int | None = None

    @property
    def stage(self) -> str:
        """The part of its work that it is in, or was when it ended."""
        return stages.read(stage_of(self.log))

    def ended(self) -> bool:
        if self.code is None:
            found, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code is not None

    def wait(self, seconds: float) -> bool:
        """Whether it ends by itself within so many seconds."""
        last = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > last:
                return False
            time.sleep(0.004)
        return True

    def signal(self, number: int, all_of_them: bool) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, number) if all_of_them else os.kill(self.process, number)

    def survivors(self) -> list[int]:
        """The processes that it has started and that are still there."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(fields[3]) == self.process and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


FRESH = """
import pathlib, sys
sys.path.append(sys.argv.pop(1))
import stages
sys.path.pop()
stages.watch()
stages.tell(pathlib.Path(sys.argv.pop(1)))
from weftlora.cli import main
main(sys.argv[1:])
"""
"""The program of a new process."""


def stage_of(log: Path) -> Path:
    """Where the life that writes a log tells which part of its work it is in."""
    return log.with_suffix(".stage")


def born(arguments: list[str], log: Path, fresh: bool) -> Life:
    """Start a command: a copy of this process, or a new one."""
    stage_of(log).write_bytes(b"\0")
    child = os.fork()
    if child:
        return Life(child, log)
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell lets what it starts with & ignore Ctrl-C
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT and not fresh else signal.SIG_DFL
            )
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(written, 1)
        os.dup2(written, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        if fresh:
            os.execv(
                sys.executable,
                [sys.executable, "-c", FRESH, str(Path(__file__).parent), str(stage_of(log)), *arguments],
            )
        stages.tell(stage_of(log))
        server: Any = forkserver
        server.ensure_running = server._forkserver.ensure_running = lambda: None  # it runs, and is no child of this one
        cli(arguments)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


# ---------------------------------------------------------------------- trouble

_GET_FLAGS, _SET_FLAGS, _IMMUTABLE = 0x80086601, 0x40086602, 0x10


def immutable(top: Path, is_so: bool) -> None:
    """Let nothing below a folder be changed, or everything again; root may write where a mode says that nobody may."""
    for path in [*sorted(top.rglob("*"), reverse=True), top]:
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            continue
        with contextlib.suppress(OSError):  # it has gone meanwhile
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                flags = array.array("l", [0])
                fcntl.ioctl(descriptor, _GET_FLAGS, flags)
                flags[0] = flags[0] | _IMMUTABLE if is_so else flags[0] & ~_IMMUTABLE
                fcntl.ioctl(descriptor, _SET_FLAGS, flags)
            finally:
                os.close(descriptor)


def tmpfs(place: Path, size: int, how: str = "size={}") -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", how.format(size), "tmpfs", str(place)], check=True)


@contextlib.contextmanager
def room(place: Path, size: int | None) -> Iterator[None]:
    """The folder as a file system of its own with so many bytes, or as it is."""
    if size is not None:
        tmpfs(place, max(size, 4096))
    try:
        yield
    finally:
        if size is not None:
            subprocess.run(["umount", "-l", str(place)], check=True)


# ---------------------------------------------------------------------- a try


class Counts:
    """A dataclass of numbers, of how often each of several things was, and of lists."""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            key: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for key, value in vars(self).items()
        }


@dataclass
class Tally(Counts):
    """What happened to one command."""

    tries: int = 0
    identical: int = 0
    lives: int = 0
    fresh_lives: int = 0
    kills: int = 0
    fresh_kills: int = 0
    moved: int = 0
    refused: int = 0
    """Second processes that were told that the folder is in use."""
    troubles: Counter[str] = field(default_factory=Counter)
    """How often each was made; a signal may find that its life has just ended, so there are fewer kills than were tried."""
    phases: Counter[str] = field(default_factory=Counter)
    """Of kills: where they came."""
    failures: list[str] = field(default_factory=list)


KILLS = {"compare --jobs 2": 14, "export": 14, "export --to merged": 14, "export --overwrite": 14}
"""How many a command is to have, beside the 36 of one whose life costs little."""
TROUBLES = ("killed", "terminated", "interrupted", "met", "full", "read-only", "gone")
MOST = 8
"""Lives of a try that trouble may end; the next one is left alone."""
SURVIVAL = 10.0
"""Seconds in which the processes that a life has started are to follow it."""
PATIENCE = 300.0
"""Seconds after which a life that nobody has ended hangs; in a machine that is busy with other things."""


@dataclass
class Try:
    """A command in a folder, until it is done."""

    command: Command
    place: Path
    whole: Pieces
    seconds: float
    tally: Tally
    draw: random.Random
    fresh: bool
    moved: bool = False
    gone: Path | None = None
    before: Pieces = field(default_factory=dict)
    checkpoint: int = 0
    alive: list[Life] = field(default_factory=list)
    said: bytes = b""
    """run.json before the present life."""

    def run(self) -> None:
        """Give the command, and again, until it has done its work, and compare."""
        self.command.begin(self.place)
        self.before = self.command.pieces(self.place)
        wanted = self.trouble()
        size = None
        if wanted == "full":
            size = self.draw.randrange(self.needed())
        shelf = self.place.with_suffix(".before")
        if size is not None:
            self.place.rename(shelf)
            self.place.mkdir()
        with room(self.place, size):
            if size is not None:
                try:
                    shutil.copytree(shelf, self.place, dirs_exist_ok=True)
                except OSError:  # not even for what was there before
                    tmpfs(self.place, 2 * self.needed(), "remount,size={}")
                    shutil.copytree(shelf, self.place, dirs_exist_ok=True)
                shutil.rmtree(shelf)
            try:
                self.lives(wanted, size is not None)
            finally:
                for each in self.alive:
                    if not each.ended():
                        each.signal(signal.SIGKILL, True)
                        each.wait(10)
                immutable(self.place, False)

    def lives(self, wanted: str, mounted: bool) -> None:
        for number in range(MOST + 1):
            left = number == MOST
            code = self.life("" if left else wanted, number)
            if mounted:
                tmpfs(self.place, 4 * self.needed(), "remount,size={}")
            self.look()
            if code == 0 and wanted != "gone":
                break
            if code == 0 and self.command.pieces(self.place) == self.whole:
                break
            if left:
                self.fail(f"left alone, it ends with {code}")
                return
            if wanted in ("killed", "terminated") and not mounted and self.draw.random() < 0.2:
                self.move()
            wanted = self.trouble("full")
            if mounted and wanted in ("gone", "read-only"):
                wanted = "killed"
        self.tally.tries += 1
        found = self.command.pieces(self.place)
        if found == self.whole:
            self.tally.identical += 1
        else:
            names = sorted(name for name in found.keys() | self.whole.keys() if found.get(name) != self.whole.get(name))
            self.fail(f"another result than the undisturbed one's: {', '.join(names)}")
        left_over = [path for path in self.place.rglob(".*") if is_temporary(path) or path.name.endswith("weft-lock")]
        if left_over:
            self.fail(f"unfinished at the end: {left_over[0].relative_to(self.place)}")

    def needed(self) -> int:
        """Bytes of what it writes, about."""
        return {"export --to merged": 6_000_000, "report": 4_000_000, "search": 40_000, "eval": 9_000_000}.get(
            self.command.name, 9_000_000
        )

    def trouble(self, *but: str) -> str:
        """The next one: mostly a kill, else what this command has met least."""
        if self.draw.random() < 0.7:
            return "killed"
        counts = {name: self.tally.troubles[name] for name in TROUBLES[1:] if name not in but}
        return min(counts, key=lambda name: (counts[name], self.draw.random()))

    def fail(self, what: str) -> None:
        self.tally.failures.append(f"{self.place.name}: {what}")
        print(f"FAILED {self.command.name}: {self.tally.failures[-1]}", flush=True)

    def life(self, wanted: str, number: int) -> int | None:
        """One life with one trouble; its exit code, or None for a kill."""
        log = self.place.parent / f"{self.place.name}.{number}.log"
        arguments = self.command.arguments(self.place, self.moved)
        record = self.place / "run" / "run.json"
        self.said = record.read_bytes() if record.is_file() else b""
        began, life = time.monotonic(), born(arguments, log, self.fresh)
        self.tally.lives += 1
        self.tally.fresh_lives += self.fresh
        self.alive = others = [life]
        early = (
            self.draw.random() < 0.8
        )  # a life that goes on is shorter, and several deaths make the most of what they cost
        moment = self.seconds * (self.draw.uniform(0, 0.75) if early else self.draw.uniform(0.75, 1.2))
        if wanted and wanted != "full" and not life.wait(moment):
            others += self.act(wanted, life, number)
            self.tally.troubles[wanted] += 1
        elif wanted == "full":
            self.tally.troubles[wanted] += 1
        else:
            wanted = ""
            if number == 0 and life.wait(PATIENCE):  # the machine may be busier now than it was at the start
                self.seconds = 0.7 * self.seconds + 0.3 * (time.monotonic() - began)
        for each in others:
            if not each.wait(PATIENCE):
                self.fail(f"hangs after it was {wanted or 'left alone'}")
                each.signal(signal.SIGKILL, True)
                each.wait(10)
            self.check_end(each, wanted)
        immutable(self.place, False)
        if self.gone is not None:
            if self.place.exists():  # what it has written where the folder had been
                self.look()
                shutil.rmtree(self.place)
            if self.gone.exists():
                self.gone.rename(self.place)
            self.gone = None
        if not self.place.exists():
            self.command.begin(self.place)
            self.checkpoint = 0
        if life.code == -signal.SIGKILL:
            self.tally.kills += 1
            self.tally.fresh_kills += self.fresh
            found = self.command.pieces(self.place)
            place = "after the end" if found == self.whole else self.command.phase(self.place) or life.stage
            self.tally.phases[place] += 1
            return None
        return max((each.code for each in others if each.code is not None), default=1) if wanted == "met" else life.code

    def act(self, wanted: str, life: Life, number: int) -> list[Life]:
        """Make trouble now; the lives that it began."""
        if wanted == "killed":
            life.signal(signal.SIGKILL, self.draw.random() < 0.5)
        elif wanted == "terminated":
            life.signal(signal.SIGTERM, False)
        elif wanted == "interrupted":
            life.signal(signal.SIGINT, True)
        elif wanted == "met":
            log = self.place.parent / f"{self.place.name}.{number}.met.log"
            return [born(self.command.arguments(self.place, self.moved), log, self.fresh)]
        elif wanted == "read-only":
            immutable(self.place, True)
        elif wanted == "gone":
            gone = self.place.with_suffix(".gone")
            self.place.rename(gone)
            self.gone = gone
            if self.draw.random() < 0.5:
                shutil.rmtree(gone)
        return []

    def check_end(self, life: Life, wanted: str) -> None:
        """How a life may end, and what must not be left of it."""
        said, code = life.said(), life.code
        allowed = {"killed": {-9}, "terminated": {143, -15}, "interrupted": {130, -2}}.get(wanted, {1}) | {0}
        if not wanted:
            allowed = {0}
        if code not in allowed:
            self.fail(f"{wanted or 'left alone'}, it ends with {code}: {said[-600:]}")
        elif (
            code == 1
            and "is tried again" not in said
            and (last := said.strip().splitlines())
            and not last[-1].startswith("weftlora: ")
        ):
            self.fail(f"{wanted}: no sentence: {said[-300:]}")
        if "Traceback" in said and not (self.fresh and code in (130, -2)):
            self.fail(f"{wanted or 'left alone'}: a traceback: {said[-1500:]}")
        if wanted == "met" and code == 1:
            self.tally.refused += "in use by" in said
        last = time.monotonic() + SURVIVAL
        while (alive := life.survivors()) and time.monotonic() < last:
            time.sleep(0.02)
        if alive:
            self.fail(f"{wanted}: {len(alive)} processes outlive it by {SURVIVAL:g} seconds")
            for process in alive:
                os.kill(process, signal.SIGKILL)
        out = self.place / "run" / "run.json"
        if (
            code in (143, 130)
            and out.is_file()
            and out.read_bytes() != self.said
            and read_json(out)["status"] == "running"
        ):
            self.fail(f"{wanted}, it still says that it is running")

    def look(self) -> None:
        """What looks finished must be the undisturbed command's, or what was there before."""
        if not self.place.exists():
            return
        found = self.command.pieces(self.place)
        names = [
            min(
                (
                    sorted(name for name in found if found[name] != state.get(name))
                    for state in (self.whole, self.before)
                ),
                key=len,
            )
        ]
        if names[0]:
            self.fail(f"looks finished, and is neither the old nor the new: {', '.join(names[0])}")
        if self.gone is None and (self.place / NOTES).read_text(encoding="utf-8") != "mine":
            self.fail("the user's file is not what it was")
        newest = checkpoint.newest(self.place / "run" / "checkpoints") if self.command.name in TRAINED else None
        step = checkpoint.step_of(newest) if newest else 0
        if self.command.name in TRAINED and self.gone is None:
            if step < self.checkpoint:
                self.fail(f"checkpoint {self.checkpoint} was lost")
            self.checkpoint = step

    def move(self) -> None:
        to = self.place.with_name(f"{self.place.name}-moved")
        if not to.exists():
            self.place.rename(to)
            self.place, self.moved = to, True
            self.tally.moved += 1


TRAINED = {f"train {recipe}" for recipe in RECIPES}

# ---------------------------------------------------------------------- all tries


def undisturbed(top: Path, command: Command, fresh: bool = False) -> tuple[Pieces, float]:
    """What a command leaves when nothing happens to it, and how long it takes. Ends the program where it fails."""
    place = top / f"whole-{command.name.replace(' ', '-')}{'-fresh' * fresh}"
    command.begin(place)
    began = time.monotonic()
    life = born(command.arguments(place, False), top / f"{place.name}.log", fresh)
    if not life.wait(2 * PATIENCE) or life.code != 0:
        sys.exit(f"{command.name} ends with {life.code}: {life.said()}")
    return command.pieces(place), time.monotonic() - began


def furnish(top: Path) -> None:
    """What commands read, and earlier outputs for them to replace."""
    (top / "comparison.yaml").write_text(yaml.safe_dump(COMPARISON), encoding="utf-8")
    ran, other = top / "ran-lora", top / "ran-tied_lora"
    for arguments in (
        *(["train", name, f"out={top / f'ran-{name}'}", *SETTINGS] for name in ("lora", "tied_lora")),
        *(["eval", str(run), "--max-new-tokens", "4"] for run in (ran, other)),
        ["export", str(ran), "--out", str(top / "exported"), "--uniform", "--dtype", "bfloat16", "--no-verify"],
        ["report", str(other), str(ran), "--title", "An earlier page", "-o", str(top / "page.html")],
    ):
        life = born(arguments, top / "furnish.log", False)
        if not life.wait(2 * PATIENCE) or life.code != 0:
            sys.exit(f"{' '.join(arguments)} ends with {life.code}: {life.said()}")
    (ran / "eval-test.json").unlink()  # for `eval`, which writes it


def source() -> str:
    """A digest of the code that was tried."""
    top, whole = Path(weftlora.__file__).parent, hashlib.sha256()
    for path in sorted(top.rglob("*.py")):
        whole.update(f"{path.relative_to(top)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:16]


def shown(arguments: list[str]) -> list[str]:
    """Arguments without those that only name a folder of this machine."""
    kept: list[str] = []
    for argument in arguments:
        if argument.startswith("/"):
            kept.pop()
        elif "=/" not in argument:
            kept.append(argument)
    return kept


def read_parts(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text(encoding="utf-8"))["parts"] if out.is_file() else {}


def of_engines(out: Path) -> dict[str, Any]:
    """What scripts/soak_engines.py has put into the file."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    return {"engines": found["engines"]} if "engines" in found else {}


def tallies_of(part: dict[str, Any]) -> dict[str, Tally]:
    counted = {"troubles", "phases"}
    return {
        name: Tally(**{key: Counter(value) if key in counted else value for key, value in tally.items()})
        for name, tally in part["commands"].items()
    }


def record(parts: dict[str, Any]) -> dict[str, Any]:
    """What evidence/soak.json holds: the sums, and every part with its own command."""
    every = [tally for part in parts.values() for tally in tallies_of(part).values()]
    return {
        "command": "python scripts/soak.py --minutes 30",
        "settings": SETTINGS,
        "recipes": RECIPES,
        "comparison": COMPARISON,
        **{
            name: sum(getattr(tally, name) for tally in every)
            for name in ("tries", "identical", "lives", "kills", "fresh_lives", "fresh_kills", "moved", "refused")
        },
        "troubles": dict(sorted(sum((tally.troubles for tally in every), Counter()).items())),
        "failures": sum(len(tally.failures) for tally in every),
        "seconds": sum(part["seconds"] for part in parts.values()),
        "parts": parts,
    }


def soak(top: Path, minutes: float, seed: int, share: float, out: Path, only: list[str]) -> int:
    """Tries, each of the command that has been killed least, for about so many minutes; how many failures."""
    began = time.monotonic()
    furnish(top)
    every = {name: each for name, each in commands(top).items() if not only or name in only}
    parts = read_parts(out)
    part = parts.setdefault(str(seed), {"commands": {}, "seconds": 0})
    part |= {
        "command": f"python {shlex.join(['scripts/soak.py', *shown(sys.argv[1:])])}",
        "source": source(),
        "versions": f"torch {torch.__version__}, {platform.machine()}",
    }
    tallies = {name: tallies_of(part).get(name, Tally()) for name in every}
    before, wholes, importing = part["seconds"], {}, 0.0
    for name, command in every.items():
        wholes[name] = undisturbed(top, command)
        print(f"{name}: {wholes[name][1]:.1f} s", flush=True)
    if share:
        first = next(iter(every))
        whole, took = undisturbed(top, every[first], fresh=True)
        importing = max(took - wholes[first][1], 0.0)
        if whole != wholes[first][0]:
            sys.exit("a fresh process has another result")
    while time.monotonic() - began < 60 * minutes:
        name, tally = min(tallies.items(), key=lambda item: (item[1].kills / KILLS.get(item[0], 36), item[1].lives))
        number = tally.tries + len(tally.failures)
        draw = random.Random(f"{seed} {name} {number}")
        fresh = draw.random() < share
        whole, seconds = wholes[name]
        place = top / f"{name.replace(' ', '-')}-{number}"
        attempt = Try(every[name], place, whole, seconds + importing * fresh, tally, draw, fresh)
        wrong = len(tally.failures)
        attempt.run()
        wholes[name] = whole, attempt.seconds - importing * fresh
        if len(tally.failures) == wrong:
            for path in top.glob(f"{place.name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        part["commands"] = {each: found.plain() for each, found in tallies.items()}
        part["seconds"] = before + round(time.monotonic() - began)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record(parts) | of_engines(out), indent=1) + "\n", encoding="utf-8")
        print(f"{place.name}: {tally.kills} kills, {tally.identical}/{tally.tries} identical", flush=True)
    return sum(len(tally.failures) for tally in tallies.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the part")
    parser.add_argument("--fresh", type=float, default=0.06, help="the share of tries whose lives are new processes")
    parser.add_argument("--only", action="append", default=[], help="a command, such as 'train lora'; repeatable")
    parser.add_argument("--folder", type=Path, help="keep what failed here")
    parser.add_argument("--out", type=Path, default=Path("evidence/soak.json"))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what is mounted is taken away again
    torch.set_num_threads(1)
    AutoModelForCausalLM.from_pretrained(demo_model_path())
    AutoTokenizer.from_pretrained(demo_model_path())
    with contextlib.ExitStack() as held:
        folder = given.folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="weft-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(workers.Pool(2, folder, 0))  # the server of runs, for all lives
        failures = soak(folder, given.minutes, given.seed, given.fresh, given.out, given.only)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
