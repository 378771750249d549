"""One of two processes fails, or is killed, at a phase of a sharded run: the other ends too, with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from failing import PHASES
from worlds import run_script

IN_CI = ("ranking", "scoring")
PHASE = [pytest.param(phase, marks=pytest.mark.sharded if phase in IN_CI else pytest.mark.kills) for phase in PHASES]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a phase came to, by the way that process 1 ended; each is tried once."""
    folder, found = tmp_path_factory.mktemp("failing"), dict[str, Any]()

    def of(phase: str) -> Any:
        if phase not in found:
            run_script("failing.py", str(folder), phase)
            found[phase] = json.loads(Path(folder / "found.json").read_text())[phase]
        return found[phase]

    return of


@pytest.mark.parametrize("phase", PHASE)
def test_a_process_that_fails_ends_all(phase: str, failed: Any) -> None:
    found = failed(phase)["raises"]
    assert found["codes"] == [1, 1]
    assert "no luck here" in found["said"][1]
    if phase in ("ranking", "scoring"):
        assert "failed on process 1: no luck here" in found["said"][0]


@pytest.mark.parametrize("phase", PHASE)
def test_a_process_that_is_killed_ends_all(phase: str, failed: Any) -> None:
    found = failed(phase)["killed"]
    assert found["codes"] == [1, -9]
    assert found["said"][0]
    assert found["seconds"] < 200, "before any timeout"
