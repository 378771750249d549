"""What surrounds a command: streams that take nothing or few letters, folders that are gone, pipes in place of files, signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from weftlora.train import train
from weftlora.train.trainer import Recorder

Weft = Callable[..., Any]
SHELL = f"{sys.executable} -m weftlora"


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell, in which `weft` is the command."""
    said = subprocess.run(
        ["bash", "-c", f'weft() {{ {SHELL} "$@"; }}; {line}'],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=120,
    )
    assert "Traceback" not in said.stderr
    assert "Exception ignored" not in said.stderr
    return said


@pytest.mark.parametrize("command", ["recipes", "recipes lora", "recipes --json", "--version", "--help"])
def test_where_what_is_shown_goes_nowhere_that_is_said(tmp_path: Path, command: str) -> None:
    full = shell(f"weft {command} > /dev/full", tmp_path)
    assert (full.returncode, full.stderr) == (
        1,
        "weftlora: the output cannot be written: no space left on device.\n",
    )
    closed = shell(f"weft {command} >&-", tmp_path)
    assert (closed.returncode, closed.stderr) == (0, "")
    assert shell(f"weft {command} | true; exit $PIPESTATUS", tmp_path).stderr == ""


def test_a_terminal_of_few_letters_is_shown_the_others_by_number(tmp_path: Path) -> None:
    few = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert shell("weft recipes", tmp_path, **few).returncode == 0
    said = shell("weft train dé.yaml", tmp_path, **few)
    assert (said.returncode, said.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("command", ["train lora", "search flexora", "doctor", "compare x.yaml"])
def test_in_a_folder_that_was_deleted_that_is_said(tmp_path: Path, command: str) -> None:
    said = shell(f"mkdir gone && cd gone && rmdir ../gone && weft {command}", tmp_path)
    assert (said.returncode, said.stderr.count("\n")) == (1, 1)
    assert said.stderr.startswith("weftlora: ")


@pytest.fixture
def alarm() -> Iterator[None]:
    """An error where something waits for a pipe that nobody writes into."""

    def ring(*given: object) -> None:
        raise TimeoutError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(recipe_file: Path) -> Path:
    return train(str(recipe_file), "adapter={recipe: lora, r: 2}").folder


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize(
    "name",
    ["run.json", "metrics.jsonl", ".weft-lock", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
)
def test_a_pipe_in_a_run_folder_is_not_waited_for(weftlora: Weft, run: Path, tmp_path: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for command in (
        ("eval", run),
        ("generate", run, "x"),
        ("inspect", run, "--no-base"),
        ("export", run, "--out", tmp_path / "out"),
        ("train", run, "--resume"),
        ("doctor", run),
        ("report", run, tmp_path, "-o", tmp_path / "page.html"),
        ("inspect", run / "adapter", "--no-base"),
    ):
        said = weftlora(*command)
        assert said.code in (0, 1)
        assert said.code == 0 or said.err.startswith("weftlora: ")


@pytest.mark.usefixtures("alarm")
def test_a_pipe_is_no_data_no_base_no_recipe_and_no_output(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for override in (f"data.train={pipe}", f"data.test={pipe}", f"model={pipe}", f"adapter.layers={pipe}.json"):
        assert weftlora("train", recipe_file, override).code == 1
    os.mkfifo(tmp_path / "pipe.json")
    assert "is a pipe" in weftlora("train", recipe_file, f"adapter.layers={tmp_path / 'pipe.json'}").err
    assert weftlora("train", pipe).code == 1
    assert "is a pipe" in weftlora("search", recipe_file, "--out", pipe).err
    base = tmp_path / "base"
    shutil.copytree(yaml.safe_load(recipe_file.read_text())["model"], base)
    (base / "tokenizer.json").unlink()
    os.mkfifo(base / "tokenizer.json")
    assert "is a pipe" in weftlora("train", recipe_file, f"model={base}").err


def test_a_prompt_that_is_no_text_is_one_sentence(weftlora: Weft, run: Path) -> None:
    said = weftlora("generate", run, os.fsdecode(b"\xff"))
    assert (said.code, said.err) == (
        1,
        "weftlora: the prompt holds bytes that are not UTF-8 text: write it in UTF-8.\n",
    )


def test_a_run_folder_that_is_another_runs_now_is_not_written_on(
    weftlora: Weft, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted while a run is at work in it, and made anew by the next one."""
    out, there = tmp_path / "runs" / "first", train(str(recipe_file), f"out={tmp_path / 'other'}").folder
    changed = there / "run.json"
    changed.write_text(changed.read_text().replace('"started": "2', '"started": "1'))

    def replaced(self: Recorder, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 1:
            shutil.rmtree(out)
            shutil.copytree(there, out)

    monkeypatch.setattr(Recorder, "on_pre_optimizer_step", replaced)
    said = weftlora("train", recipe_file, "train.save_every=3")
    assert said.code == 1
    assert "was removed or replaced" in said.err
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == {
        p.relative_to(there): p.read_bytes() for p in there.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_run_that_says_so(
    weftlora: Weft, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def stopped(self: Recorder, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), number)

    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Recorder, "on_step_end", stopped)
            assert weftlora("train", recipe_file).code == code
        assert '"status": "interrupted"' in (tmp_path / "runs" / "first" / "run.json").read_text()
        assert weftlora("train", recipe_file, "--resume").code == 0
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_ctrl_c_while_the_command_is_loaded_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    said = shell("weft recipes", tmp_path, PYTHONPATH=path)
    assert (said.returncode, said.stderr) == (130, "weftlora: interrupted.\n")


FORKS = """
import contextlib, os, signal
from weftlora.cli import commands
with contextlib.suppress(SystemExit):
    commands.main(["--version"])
child = os.fork()
if not child:
    signal.pause()
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_process_that_a_command_forks_ends_by_the_signal_that_it_is_sent() -> None:
    """A worker that answered as the command does could miss it, and whoever made it would wait for ever."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"{-signal.SIGTERM} set()"
    assert done.returncode == 128 + signal.SIGTERM
