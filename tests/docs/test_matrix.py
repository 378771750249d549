"""The rows of matrix.toml, what is kept of them, and what the package ships agree."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matrix
import pytest

ROWS = {row["name"]: row for row in tomllib.loads(matrix.ROWS.read_text(encoding="utf-8"))["row"]}
RESULTS = {row["name"]: row for row in json.loads(matrix.RESULTS.read_text(encoding="utf-8"))["rows"]}


def test_the_package_ships_the_rows() -> None:
    shipped = json.loads(matrix.SHIPPED.read_text(encoding="utf-8"))["rows"]
    assert shipped == matrix.shipped(ROWS, [*RESULTS.values()]), (
        "run make matrix, or scripts/matrix.py of the changed row"
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_result_is_of_the_rows_versions(name: str) -> None:
    assert RESULTS[name]["status"] in ("passed", "not run")
    if RESULTS[name]["status"] == "passed":
        assert RESULTS[name]["versions"] == ROWS[name]["versions"]
        assert not RESULTS[name]["failed"]
        assert (
            RESULTS[name]["cpu_seconds"] <= matrix.BOUND or "source" not in RESULTS[name]
        )  # of before there was a bound
        assert not [reason for reason in RESULTS[name]["left_out"] if matrix.reason_of(reason) != reason]
    else:
        assert RESULTS[name]["reason"]


def test_three_rows_are_run_on_every_change() -> None:
    assert {name for name, row in ROWS.items() if row.get("ci")} == {"oldest", "axolotl", "quantised"}


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["--ci"], "passed", 0),
        (["--ci"], "not run", 1),
        (["axolotl"], "not run", 1),
        ([], "not run", 0),
        ([], "failed", 1),
    ],
)
def test_a_row_that_was_asked_for_and_could_not_be_run_is_no_success(
    arguments: list[str], status: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(row: dict[str, Any], own_python: bool = True, bounded: bool = True) -> dict[str, Any]:
        ran.append(row["name"])
        counts = {"passed": 1, "failed": 0, "skipped": 0, "cpu_seconds": 1, "failures": []}
        return {"name": row["name"], "status": status, "reason": "no Python", **counts}

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(matrix, "write", lambda rows, results: None)
    monkeypatch.setattr("sys.argv", ["matrix.py", *arguments])
    assert matrix.main() == code
    assert set(ran) == ({"oldest", "axolotl", "quantised"} if "--ci" in arguments else {*arguments} or {*ROWS})


def test_what_a_row_leaves_out_is_said_without_folders_of_the_machine() -> None:
    assert (
        matrix.reason_of("cannot import name 'a' from 'b' (/home/me/b.py), so") == "cannot import name 'a' from 'b', so"
    )
    assert matrix.reason_of("this row has no trl") == "this row has no trl"
    assert matrix.reason_of("got empty parameter set for (package)") is None


def test_a_row_begins_with_what_it_has_imported_and_fails_where_that_is_not_the_row(tmp_path: Path) -> None:
    row = {"name": "wrong", "versions": {"packaging": "0.1"}, "without": []}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        str(tmp_path / "pytest.ini"),
        "--import-mode=importlib",
    ]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    smoke = matrix.ROOT / "tests" / "smoke"
    done = subprocess.run(
        [*command, f"--rootdir={smoke}", f"--confcutdir={smoke}", "-x", str(smoke)],
        env={**os.environ, "WEFT_MATRIX_ROW": json.dumps(row)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"row wrong: python {platform.python_version()}, packaging {version('packaging')}" in done.stdout
    assert "1 failed" in done.stdout
    assert "passed" not in done.stdout


def test_a_result_of_other_versions_is_dropped(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(matrix, "SHIPPED", tmp_path / "shipped.json")
    rows = {"a": {"name": "a", "host": "a", "python": ">=3.11", "versions": {"torch": "1"}}}
    passed = {"name": "a", "status": "passed", "passed": 3, "failed": 0, "skipped": 0}
    matrix.write(rows, [dict(passed)])
    assert json.loads(matrix.RESULTS.read_text())["rows"][0]["status"] == "passed"
    matrix.write(rows, [{"name": "a", "status": "not run", "reason": "no Python"}])  # what is known is kept
    assert json.loads(matrix.RESULTS.read_text())["rows"][0]["status"] == "passed"
    rows["a"]["versions"] = {"torch": "2"}
    matrix.write(rows, [])
    assert json.loads(matrix.SHIPPED.read_text())["rows"][0]["status"] == "not run"
