"""The files of a new term work as they are, and say what is left to fill in."""

from __future__ import annotations

import errno
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weftlora.errors import ConfigError, RunError
from weftlora.terms import registry
from weftlora.terms.axes import AXES
from weftlora.terms.scaffold import new_term
from weftlora.testing import check_term


@pytest.fixture(params=AXES)
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The axis, the folder and the class of a new term, importable for one test."""
    name = f"fresh_{request.param}"
    new_term(name, request.param, tmp_path / name)
    monkeypatch.setattr(registry, "_local", {})
    monkeypatch.syspath_prepend(str(tmp_path / name))
    yield request.param, tmp_path / name, getattr(importlib.import_module(name), f"Fresh{request.param.capitalize()}")
    sys.modules.pop(name)


def test_it_keeps_the_contract_as_it_is_written(written) -> None:
    axis, folder, cls = written
    found = check_term(cls(), processes=False)
    assert found.axis == axis
    assert "export" in found.held
    with pytest.raises(AssertionError, match="still to be filled in"):
        check_term(cls(), processes=False, card=folder / f"fresh_{axis}.md")


def test_its_metadata_offers_it_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    new_term("quiet_start", "start", tmp_path)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["weftlora.terms"] == {"quiet_start": "quiet_start:QuietStart"}
    assert project["tool"]["setuptools"]["py-modules"] == ["quiet_start"]


def test_its_own_tests_fail_until_it_is_filled_in(tmp_path: Path) -> None:
    new_term("quiet_start", "start", tmp_path)
    test = tmp_path / "test_quiet_start.py"
    test.write_text(test.read_text().replace("card=CARD", "card=CARD, processes=False"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 failed" in done.stdout, done.stdout[-2000:]
    assert "is still to be filled in" in done.stdout
    assert "write what QuietStart claims" in done.stdout


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "quiet.md").write_text("mine")
    with pytest.raises(RunError, match=r"quiet\.md already exists"):
        new_term("quiet", "start", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quiet.md"]
    assert (tmp_path / "quiet.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "axis", "said"),
    [
        ("Quiet", "start", "not a name of a term"),
        ("class", "start", "not a name of a term"),
        ("../quiet", "start", "not a name of a term"),
        ("dash", "start", "a term of weftlora's on the axis boost"),
        ("hydra_", "start", "not a name of a term"),
        ("none", "boost", "nothing on an axis"),
        ("torch", "start", "a module that Python has here already"),
        ("json", "start", "a module that Python has here already"),
        ("setup", "start", "runs by itself"),
        ("tensor", "structure", "would be the class Tensor"),
        ("start", "start", "would be the class Start"),
        ("quiet", "strat", "did you mean 'start'"),
    ],
)
def test_what_cannot_be_a_term_is_refused(tmp_path: Path, name: str, axis: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        new_term(name, axis, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_link_to_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "quiet.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(RunError, match=r"quiet\.py already exists"):
        new_term("quiet", "start", tmp_path)
    assert not (tmp_path / "elsewhere.py").exists()


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weftlora.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["new-term", "quiet", "--axis", "ranks"])
    assert left.value.code in (0, None)
    assert "test_quiet.py" in capsys.readouterr().out
    assert (tmp_path / "quiet" / "quiet.py").is_file()
    with pytest.raises(SystemExit) as left:
        main(["new-term", "quiet", "--axis", "ranks"])
    assert left.value.code == 1
    assert "already exists" in capsys.readouterr().err


def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, opened = Path.open, []

    def full(path: Path, mode: str = "r", **settings: Any) -> Any:
        if mode == "x":
            opened.append(path)
            if len(opened) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, **settings)

    monkeypatch.setattr(Path, "open", full)
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(RunError, match="no space left on device; choose another folder"):
        new_term("quiet_start", "start", tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt"]
