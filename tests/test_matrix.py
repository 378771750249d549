"""The rows of matrix.toml: on which Python each is built, out of what, and which results are kept. Nothing is installed here."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import matrix
import pytest

HERE = platform.python_version()
MINOR = sys.version_info.minor
PASSED = {"status": "passed", "passed": 3, "failed": 0, "skipped": 0, "failures": [], "left_out": [], "cpu_seconds": 1}


def row(name: str = "host", **fields: Any) -> dict[str, Any]:
    return {"name": name, "host": "a host", "python": ">=3.11", "versions": {"torch": "2.13.0"}, **fields}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Where rows were built: in an environment of their own, or in this one."""
    places: list[str] = []

    def own(row: dict[str, Any]) -> tuple[str, list[str], Path]:
        places.append("own")
        (tmp_path / "own").mkdir()
        return "python", [], tmp_path / "own"

    def shared(row: dict[str, Any]) -> tuple[str, list[str], None]:
        places.append("here")
        return sys.executable, [], None

    monkeypatch.setattr(matrix, "own", own)
    monkeypatch.setattr(matrix, "shared", shared)
    monkeypatch.setattr(matrix, "suite", lambda row, python, path, bounded: {"name": row["name"], **PASSED})
    monkeypatch.setattr(matrix, "version", lambda name: "2.13.0+cpu")
    return places


OTHER = {"python": f">=3.{MINOR + 1}"}


@pytest.mark.parametrize(
    ("fields", "own_python", "on_machine", "place"),
    [
        ({}, True, True, "here"),
        ({"own": True}, True, True, "own"),
        (OTHER, True, True, "own"),
        (OTHER, False, True, "here"),  # in CI
        (OTHER, True, False, "here"),
    ],
)
def test_a_row_runs_on_the_python_of_its_host_and_says_so_where_it_does_not(
    fields: dict[str, Any], own_python: bool, on_machine: bool, place: str,
    built: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(matrix, "interpreter", lambda row: "python" if on_machine else None)
    assert matrix.run(row(**fields), own_python)["status"] == "passed"
    assert built == [place]
    said = f"its host wants Python >=3.{MINOR + 1}; here it runs on {HERE}"
    assert (said in capsys.readouterr().out) == (place == "here" and fields == OTHER)
    assert not (tmp_path / "own").exists()  # removed again


def test_a_row_that_cannot_be_run_says_why(built: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "interpreter", lambda row: None)
    assert matrix.run(row(own=True, python=">=3.99"))["reason"] == "no Python >=3.99 on this machine"
    assert matrix.run(row(versions={"torch": "2.11.0"}))["reason"] == "this environment has torch 2.13.0"
    assert built == []


def test_the_interpreter_is_this_one_or_the_least_that_the_host_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert matrix.interpreter(row()) == sys.executable
    for version in ("3.31.2", "3.32.0"):
        python = tmp_path / ".pyenv" / "versions" / version / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\necho Python {version}\n")
        python.chmod(0o755)
    monkeypatch.setattr(matrix.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(matrix, "MINORS", range(30, 40))
    assert matrix.interpreter(row(python=">=3.30")) == str(
        tmp_path / ".pyenv" / "versions" / "3.31.2" / "bin" / "python"
    )
    assert matrix.interpreter(row(python=">=3.30,<3.31")) is None


def test_an_environment_of_its_own_has_exact_versions_and_nothing_that_must_be_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(matrix.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, "", ""))
    monkeypatch.setattr(matrix.tempfile, "mkdtemp", lambda **kwargs: str(tmp_path))
    monkeypatch.setattr(matrix, "pip", lambda python, *arguments: asked.append(arguments))
    matrix.own(row(versions={"torch": "2.11.0", "peft": "0.21.2"}))
    [arguments] = asked
    assert {"torch==2.11.0", "peft==0.21.2", "pytest==9.2.0", "scipy"} <= {*arguments}
    assert "--ignore-requires-python" not in arguments  # it makes pip take a release that has no wheel for this Python


def test_results_of_other_rows_are_kept_and_those_of_other_versions_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(matrix, "SHIPPED", tmp_path / "shipped.json")
    rows = {name: row(name) for name in ("one", "two", "three")}
    rows["three"] = row("three", reason="it has no torch")
    matrix.write(rows, [{"name": name, **PASSED} for name in ("one", "two")])
    rows["two"] = row("two", versions={"torch": "2.14.1"})
    matrix.write(rows, [{"name": "one", "status": "not run", "reason": "no network"}])
    found = {one["name"]: one for one in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert found["one"] == {"name": "one", **PASSED, "versions": {"torch": "2.13.0"}}
    assert found["two"] == {"name": "two", "status": "not run", "reason": "not tried yet"}
    assert found["three"]["reason"] == "it has no torch"
    shipped = {one["name"]: one["status"] for one in json.loads((tmp_path / "shipped.json").read_text())["rows"]}
    assert shipped == {"one": "passed", "two": "not run", "three": "not run"}
