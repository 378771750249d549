"""A process forked from the server is what a new one would be: its own state, folder, files, environment and end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import check_docs
import preloaded
import pytest

PROGRAMS = """
import os, sys, time
seen = []
def show():
    seen.append(1)
    print(len(seen), sys.argv[1:], os.getcwd(), os.environ["TOLD"], sys.stdin.read(), "weftlora" in sys.modules)
def leave(): sys.exit(3)
def say(): sys.exit("a sentence")
def fail(): raise ValueError("planted")
def die(): os.kill(os.getpid(), 9)
def wait():
    open("pid.part", "w").write(str(os.getpid()))
    os.rename("pid.part", "pid")
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "programs.py").write_text(PROGRAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with preloaded.server(["programs"]) as found:
            yield found


def answer(address: str, function: str, folder: Path, **given: object) -> tuple[int, str]:
    """Exit code and output of one of PROGRAMS, with "x y" for input."""
    given_files = folder / "in", folder / "out"
    given_files[0].write_text("x y")
    with given_files[0].open() as read, given_files[1].open("w+") as shown:
        files = (read.fileno(), shown.fileno(), shown.fileno())
        code = preloaded.ask(address, f"programs:{function}", ["a b"], files=files, folder=folder, **given)
        shown.seek(0)
        return code, shown.read()


def test_state_arguments_folder_environment_and_input_are_of_the_request(address: str, tmp_path: Path) -> None:
    for told in ("first", "second"):
        code, shown = answer(address, "show", tmp_path, environment={"TOLD": told})
        assert (code, shown) == (0, f"1 ['a b'] {tmp_path} {told} x y False\n")


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [("leave", 3, ""), ("say", 1, "a sentence"), ("fail", 1, "planted"), ("die", 137, "")],
)
def test_how_a_program_ends_is_told(address: str, tmp_path: Path, function: str, code: int, words: str) -> None:
    found, shown = answer(address, function, tmp_path)
    assert found == code
    assert words in shown


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_program_ends_with_its_caller(address: str, tmp_path: Path) -> None:
    ask = [sys.executable, preloaded.__file__, "ask", address, "programs:wait"]
    with subprocess.Popen(ask, cwd=tmp_path) as caller:
        until((tmp_path / "pid").exists)
        caller.kill()
    until(lambda: ended(int((tmp_path / "pid").read_text())))


def test_no_caller_waits_for_longer_than_it_says(address: str, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        answer(address, "wait", tmp_path, seconds=0.1)


def test_a_library_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="did not start"), preloaded.server(["no_such_library"]):
        pass


def test_the_server_never_loads_weft() -> None:
    assert [name for name in preloaded.LIBRARIES if name.startswith("weftlora")] == []


def test_a_page_runs_what_the_installed_command_runs(address: str, tmp_path: Path) -> None:
    script = check_docs._command(tmp_path, address) / "weftlora"
    assert f"ask {address} weftlora.cli:main" in script.read_text()
    script.write_text(script.read_text().replace("weftlora.cli:main", "programs:show"))
    shown = subprocess.run(
        [script, "two words"], input="in", env={**os.environ, "TOLD": "x"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.stdout == f"1 ['two words'] {tmp_path} x in False\n", shown.stderr
    assert sys.executable in script.read_text()


def test_a_page_is_checked_apart(address: str, tmp_path: Path) -> None:
    (page := tmp_path / "page.md").write_text("```bash\nfalse\n```\n")
    assert "page.md:2: exit code 1" in (check_docs.check_apart(page, address) or "")
    page.write_text("```python\nopen('made', 'w').close()\n```\n```bash\ntest -f made\n```\n")
    assert check_docs.check_apart(page, address) is None
    assert not Path("made").exists()
