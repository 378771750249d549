"""The rows of matrix.toml, what is kept of them, and what the package ships agree."""

from __future__ import annotations

import json
import tomllib

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
    else:
        assert RESULTS[name]["reason"]


def test_two_rows_are_run_on_every_change() -> None:
    assert {name for name, row in ROWS.items() if row.get("ci")} == {"oldest", "axolotl"}


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
