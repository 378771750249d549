"""One process at a time in a run folder, and a run.json that tells the truth about who is at work there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupting import Interrupt
from transformers import TrainerCallback

import weftlora
from weftlora.disk import lock
from weftlora.disk.files import read_json, read_lines
from weftlora.errors import RunError
from weftlora.runs.run import Run

Make = Callable[..., dict[str, Any]]


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a copy of this process; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_second_process_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(RunError, match=rf"process {os.getppid()} on .* \(weftlora train, since 20"), taken():
            pass

    def taken() -> Any:
        return lock.holding(tmp_path, "weftlora eval")

    with lock.holding(tmp_path, "weftlora train"):
        assert lock.is_held(tmp_path)
        assert in_child(second) == 0
        assert lock.is_held(tmp_path)
    assert not lock.is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    def dies() -> None:
        with lock.holding(tmp_path, "weftlora train"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(dies) == -signal.SIGKILL
    assert (tmp_path / lock.NAME).is_file(), "the file stays, and means nothing"
    assert not lock.is_held(tmp_path)
    with lock.holding(tmp_path, "weftlora train"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_child_of_the_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A data loader's worker may outlive its parent for a moment."""
    with lock.holding(tmp_path, "weftlora train"):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with lock.holding(tmp_path, "weftlora train"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_who_looks_whether_it_is_held_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).touch()
    end = time.monotonic() + 2

    def looks() -> None:
        while time.monotonic() < end:
            lock.is_held(tmp_path)

    looker = multiprocessing.get_context("fork").Process(target=looks)
    looker.start()
    while time.monotonic() < end:
        with lock.holding(tmp_path, "weftlora train"):
            pass
        (tmp_path / lock.NAME).touch()
    looker.join()


def test_a_lock_file_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(tmp_path / "thesis")
    with pytest.raises(RunError, match="cannot write"), lock.holding(tmp_path / "run", "weftlora train"):
        pass
    assert (tmp_path / "thesis").read_text() == "mine"


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(self: Any, *given: Any, **more: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(lock.FileLock, "acquire", none)
    with lock.holding(tmp_path, "weftlora train"):
        pass
    assert "without locks" in caplog.text


# ---------------------------------------------------------------------- runs


class Meanwhile(TrainerCallback):
    """Does something while a run is alive."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.work()


def test_a_run_that_is_alive_is_neither_resumed_nor_replaced_nor_joined(recipe: Make) -> None:
    given, seen = recipe(), []

    def others() -> None:
        before = {path: path.stat().st_mtime_ns for path in Path(given["out"]).rglob("*")}
        for how in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(RunError, match=r"is in use by process|is not empty") as said:
                weftlora.train(given, **how)
            seen.append("in use" in str(said.value))
        with pytest.raises(RunError, match="is in use by process"):
            weftlora.train(given["out"], resume=True)
        assert Run.load(given["out"]).status == "running"
        assert {path: path.stat().st_mtime_ns for path in Path(given["out"]).rglob("*")} == before

    run = weftlora.train(given, callbacks=[Meanwhile(others)])
    assert seen == [True, True, True]
    assert run.status == "complete"
    steps = [row["step"] for row in run.history()]
    assert steps == sorted(set(steps))


def test_of_two_that_start_at_once_one_trains_and_one_is_refused(recipe: Make, tmp_path: Path) -> None:
    """Each waits for the other before it looks at the folder; neither sees a run there."""
    given = recipe()
    gates = [os.pipe() for _ in range(2)]

    def trains(number: int) -> Callable[[], None]:
        def work() -> None:
            from weftlora.train import loop

            describe = loop._describe

            def wait(*more: Any) -> Any:
                os.write(gates[1 - number][1], b".")
                os.read(gates[number][0], 1)
                return describe(*more)

            loop._describe = wait
            try:
                weftlora.train(given)
            except RunError as error:
                (tmp_path / f"refused{number}").write_text(str(error))

        return work

    children = []
    for number in range(2):
        if not (child := os.fork()):
            try:
                trains(number)()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    [refused] = tmp_path.glob("refused*")
    assert "in use by process" in refused.read_text() or "is not empty" in refused.read_text()
    run = Run.load(given["out"])
    assert run.status == "complete"
    assert [row["step"] for row in run.history() if "loss" in row] == [1, 2, 3, 4]
    assert [row["event"] for row in read_lines(run.folder / "events.jsonl")] == ["start", "end"]


def test_the_state_of_a_run_is_true(recipe: Make) -> None:
    given = recipe()

    def dies() -> None:
        weftlora.train(given, callbacks=[Meanwhile(lambda: os.kill(os.getpid(), signal.SIGKILL))])

    assert in_child(dies) == -signal.SIGKILL
    file = Path(given["out"]) / "run.json"
    assert read_json(file)["status"] == "running", "nobody could write it"
    assert Run.load(given["out"]).status == "interrupted"
    assert weftlora.train(given, resume=True).status == "complete"
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, overwrite=True, callbacks=[Interrupt(2)])
    assert read_json(file)["status"] == "interrupted"


def test_sigterm_ends_a_run_as_interrupted(recipe: Make, tmp_path: Path) -> None:
    """What a scheduler sends: the run says so in run.json itself, and the code is the shell's for it."""
    given = recipe(train={"steps": 100000, "save_every": 2})
    (tmp_path / "recipe.yaml").write_text(json.dumps(given))
    code = textwrap.dedent("""
        import sys
        from weftlora.cli import main
        main(["train", sys.argv[1], "--quiet"])
    """)
    path = os.pathsep.join([str(Path(weftlora.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "recipe.yaml")],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not list(Path(given["out"]).glob("checkpoints/*/complete.json")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert read_json(Path(given["out"]) / "run.json")["status"] == "interrupted"
    assert "Traceback" not in said
    assert not (Path(given["out"]) / lock.NAME).exists()
