"""One input after another through a reader or writer, in a process of its own, inside bounds that are watched.

    CPU       an input that takes more than 5 seconds of it is a hang: a timer interrupts Python, the parent kills what no timer reaches
    memory    the process may take 1 GiB more than it has before the first input
    disk      everything but the case's folder is watched: a file that is opened to be written, removed or moved elsewhere, and any look
              into the folder beside it, is a fault, and so is a process that is started or a connection that is made
    errors    what is not of weftlora's tree, or has a message that is long or not fit to be shown, is a fault

An input that takes an arm (`arms`) that none before it took joins those that further inputs are made of.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arms import arms
from mutations import Case
from readers import Target, check_message

CPU, MEMORY = 5.0, 1 << 30
"""Seconds of CPU that an input may take, and bytes that a process may take beyond what it starts with."""
ROOM = 4 << 20
"""Bytes that an input may be written in, for whoever finds the process dead."""
MOST = 1500
"""Inputs that further ones are made of."""


class Hang(BaseException):
    """An input has had its seconds."""


@dataclass
class Fault:
    """Something that must not be: what, of which target, and an input that shows it."""

    target: str
    kind: str
    detail: str
    case: Case
    number: int
    """Of the input, within its target."""
    by: str
    """seed, found or mutation."""


@dataclass
class Outcome:
    """What came of one slice of a target."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    peak: int = 0
    """Bytes beyond those at the start."""
    grew: int = 0
    """The input that last took a new arm."""
    reached: int = 0
    of: int = 0
    corpus: list[Case] = field(default_factory=list)
    faults: dict[str, Fault] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    """How often each kind of fault was met."""
    apart: int = 0
    """How often what is not promised was met."""


# ---------------------------------------------------------------------- what is watched

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PLACES = {
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.rmtree",
}
_NEVER = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.startfile",
    "socket.connect",
    "socket.bind",
    "pty.spawn",
}


class Watch:
    """An audit hook; there is one a process, and it looks only while `on` is true."""

    def __init__(self) -> None:
        self.on, self.top, self.outside, self.seen = False, "", "\0", list[str]()
        sys.addaudithook(self._look)

    def _look(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = given
            if isinstance(path, (str, bytes)):
                self._opened(os.fsdecode(path), isinstance(flags, int) and bool(flags & _WRITING))
        elif event in _PLACES:
            for path in given[:2]:
                if isinstance(path, (str, bytes)):
                    self._touched(event, os.fsdecode(path))
        elif event in _NEVER:
            self.seen.append(f"{event} was called")

    def _opened(self, path: str, writes: bool) -> None:
        if writes and "__pycache__" not in path and path != os.devnull:
            self._touched("open", path)
        elif "outside" in path or os.path.islink(path):
            with self._off():
                real = os.path.realpath(path)
            if real.startswith(self.outside):
                self.seen.append("a file beside the folder was opened")

    def _touched(self, event: str, path: str) -> None:
        with self._off():
            real = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
            if event == "open":
                real = os.path.realpath(path)
        if not real.startswith(self.top):
            self.seen.append(f"{event} outside of the folder")

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True


_watch: list[Watch] = []


def watch() -> Watch:
    if not _watch:
        _watch.append(Watch())
    return _watch[0]


# ---------------------------------------------------------------------- one input


class Sandbox:
    """A folder in memory for cases, and one beside it that nothing may look into."""

    def __init__(self, top: Path, target: Target) -> None:
        self.folder, self.outside, self.target = top / "inside", top / "outside", target
        self.base = target.base()
        victim = self.outside / "victim"
        victim.mkdir(parents=True, exist_ok=True)
        for folder in (victim, victim / "s0", victim / "base", self.outside / "lr0.001-s1000"):
            folder.mkdir(exist_ok=True)
            for name in (
                "run.json",
                "metrics.jsonl",
                "compare.json",
                "eval-test.json",
                "problem.json",
                "complete.json",
                "trainer_state.json",
            ):
                (folder / name).write_text("{}", encoding="utf-8")
        self.there: Case = {}

    def put(self, case: Case) -> None:
        """The case, and what lies beside it, as files; what the last call has changed is put right."""
        wanted = {**self.base, **case}
        if self._untouched():
            for name in self.there.keys() - wanted.keys():
                self._path(name).unlink(missing_ok=True)
            changed = {name: content for name, content in wanted.items() if self.there.get(name) != content}
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            for entry in os.scandir(self.folder):  # the folder itself stays: it is where the process works
                shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
            changed = wanted
        for name, content in changed.items():
            self._write(self._path(name), content)
        self.there = wanted

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _untouched(self) -> bool:
        if not self.there or any("/" in name or isinstance(content, str) for name, content in self.there.items()):
            return False
        return {entry.name for entry in os.scandir(self.folder)} == self.there.keys()

    def _write(self, path: Path, content: bytes | str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have is no case
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.unlink(missing_ok=True)
                path.symlink_to(content)
            elif path.name and not str(path).endswith("/"):
                path.write_bytes(content)


def _interrupt(number: int, frame: object) -> None:
    raise Hang


def tried(
    target: Target, sandbox: Sandbox, case: Case, must_work: bool = False, seconds: float | None = None
) -> tuple[str, str]:
    """Run one input. The kind of fault and its detail; empty where there is none.

    Args:
        must_work: it is as it should be, and to refuse it is a fault.
        seconds: of CPU that it may take, `CPU` by default; 0 is no bound.
    """
    from weftlora.errors import WeftError

    eyes = watch()
    sandbox.put(case)
    eyes.seen.clear()
    signal.setitimer(
        signal.ITIMER_PROF, CPU if seconds is None else seconds, 0.2
    )  # again and again: a finaliser swallows what is raised in it
    eyes.on = True
    try:
        target.call(sandbox.folder, case)
    except WeftError as error:
        eyes.on = False
        if must_work:
            return f"a good input is refused at {_place(error)}", str(error)[:300]
        try:
            check_message(error)
        except AssertionError as said:
            return _without_values(str(said)), repr(str(error))[:300]
    except AssertionError as error:
        eyes.on = False
        return f"{_place(error)}: {_without_values(str(error))}", str(error)[:300]
    except Hang:
        return f"a hang at {_place(sys.exc_info()[1])}", ""
    except MemoryError as error:
        return f"memory at {_place(error)}", ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        eyes.on = False
        return f"{type(error).__name__} at {_place(error)}", str(error)[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        eyes.on = False
    return (eyes.seen[0], "") if eyes.seen else ("", "")


def _without_values(sentence: str) -> str:
    """What a kind of fault is called: the sentence without what it was about this time."""
    return re.sub(r"[\[{'\"0-9].*", "", sentence, flags=re.DOTALL).strip()[:100]


def _place(error: BaseException | None) -> str:
    """The innermost function of weftlora's that an exception came through; of the fuzzer's, where there is none."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    ours = [frame for frame in frames if "/weftlora/" in frame.filename] or frames[-1:]
    if not ours:
        return "nowhere"
    name = ours[-1].filename.rpartition("/weftlora/")[2].rpartition("/tests/")[2]
    return f"{name}:{ours[-1].name}"


def shrunk(target: Target, sandbox: Sandbox, case: Case, kind: str, tries: int = 150) -> Case:
    """A smaller case of the same fault: files without what does not matter to it."""
    for name, content in case.items():
        if not isinstance(content, bytes):
            continue
        size = max(1, len(content) // 2)
        while size >= 1 and tries > 0 and len(content) > 1:
            at, smaller = 0, False
            while at < len(content) and tries > 0:
                less = content[:at] + content[at + size :]
                tries -= 1
                if tried(target, sandbox, {**case, name: less})[0] == kind:
                    content, smaller = less, True
                    case = {**case, name: content}
                else:
                    at += size
            size = size if smaller and size > 1 else size // 2
    return case


# ---------------------------------------------------------------------- one slice, in a process of its own


@dataclass(frozen=True)
class Slice:
    """What a process is to do."""

    target: Target
    seed: str
    first: int
    """Number of its first input."""
    seconds: float
    most: int
    found: list[Case]
    """Inputs that once were faults."""
    corpus: list[Case]
    """Inputs that have taken new arms before; they are tried again and not counted."""
    fault: Callable[[], None] | None = None
    """Puts a fault back."""
    until_fault: bool = False


def carry_out(work: Slice, top: Path, note: mmap.mmap) -> Outcome:
    """Try inputs until the time is over."""
    target, out = work.target, Outcome(work.target.name)
    sandbox = Sandbox(top, target)
    eyes = watch()
    eyes.top, eyes.outside = os.path.realpath(top / "inside"), os.path.realpath(top / "outside")
    sandbox.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(sandbox.folder)
    if work.fault is not None:
        work.fault()
    signal.signal(signal.SIGPROF, _interrupt)
    _bound_memory()
    arms.forget()
    began, start = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seeds = target.seeds()
    out.corpus = [*seeds, *work.corpus]
    for case in work.corpus:
        _note(note, out.inputs, case)
        tried(target, sandbox, case)
    known = arms.reached()
    for number, (by, case) in enumerate(_inputs(work, seeds, out.corpus), work.first):
        if out.inputs >= work.most or (by == "mutation" and time.monotonic() - began > work.seconds):
            break
        _note(note, out.inputs + 1, case)
        before = time.process_time()
        kind, detail = tried(target, sandbox, case, must_work=by == "seed")
        out.slowest = max(out.slowest, time.process_time() - before)
        out.inputs += 1
        if kind:
            out.times[kind] = out.times.get(kind, 0) + 1
            if kind not in out.faults:
                small = (
                    case
                    if kind.startswith(("a hang", "memory")) or work.until_fault
                    else shrunk(target, sandbox, case, kind)
                )
                out.faults[kind] = Fault(target.name, kind, detail, small, number, by)
                if work.until_fault:
                    break
        elif (now := arms.reached()) > known:
            known, out.grew = now, number
            if by == "mutation" and len(out.corpus) < MOST:
                out.corpus.append(case)
    names, out.of = arms.of_entered("weftlora")
    out.reached, out.seconds = len(names), time.monotonic() - began
    out.peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
    out.corpus = out.corpus[len(seeds) :]
    return out


def _inputs(work: Slice, seeds: list[Case], corpus: list[Case]) -> Iterator[tuple[str, Case]]:
    for case in seeds:
        yield "seed", case
    for case in work.found:
        yield "found", case
    number = work.first
    while True:
        number += 1
        rng = random.Random(f"{work.seed} {work.target.name} {number}")
        base = rng.choice(corpus[-40:] if rng.random() < 0.4 else corpus)
        yield "mutation", work.target.mutate(rng, base)


def _note(note: mmap.mmap, number: int, case: Case) -> None:
    """The input that is tried now, for the parent."""
    packed = pickle.dumps(case)
    size = len(packed) if len(packed) < ROOM - 16 else 0
    note[:16] = number.to_bytes(8, "little") + size.to_bytes(8, "little")
    note[16 : 16 + size] = packed[:size]


def _bound_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@dataclass
class Running:
    """A slice that is being carried out."""

    work: Slice
    child: int
    top: Path
    note: mmap.mmap
    number: int = 0
    cpu: float = 0.0
    """Of the child, when it began its present input."""


def start(work: Slice, top: Path) -> Running:
    """Fork a process for a slice; `top` is a folder of its own."""
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    note = mmap.mmap(-1, ROOM)
    child = os.fork()
    if child:
        return Running(work, child, top, note)
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        log = os.open(top / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 2)
        warnings.simplefilter("ignore")
        out = carry_out(work, top, note)
        (top / "outcome").write_bytes(pickle.dumps(out))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def look(running: Running) -> Outcome | None:
    """The outcome of a slice that has ended; None while it goes on. One that hangs where no signal reaches it is killed."""
    found, status = os.waitpid(running.child, os.WNOHANG)
    if not found:
        number = int.from_bytes(running.note[:8], "little")
        used = _cpu_of(running.child)
        if number != running.number:
            running.number, running.cpu = number, used
        elif used - running.cpu > 2 * CPU and number:
            os.kill(running.child, signal.SIGKILL)
        return None
    number, size = (int.from_bytes(running.note[at : at + 8], "little") for at in (0, 8))
    if (running.top / "outcome").is_file():
        out: Outcome = pickle.loads((running.top / "outcome").read_bytes())
    else:
        code = os.waitstatus_to_exitcode(status)
        log = (running.top / "log").read_text(encoding="utf-8", errors="replace")[-290:]
        case = pickle.loads(running.note[16 : 16 + size]) if size else {}
        kind = "a hang in C" if code == -signal.SIGKILL else f"the process ended with {code}"
        fault = Fault(running.work.target.name, kind, log, case, running.work.first + number, "mutation")
        out = Outcome(
            running.work.target.name, number, faults={kind: fault}, times={kind: 1}, corpus=running.work.corpus
        )
    shutil.rmtree(running.top, ignore_errors=True)
    return out


def _cpu_of(child: int) -> float:
    try:
        fields = Path(f"/proc/{child}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
