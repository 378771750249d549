"""Killed at any point and given again, a comparison ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import killed_comparison
import pytest
from comparing import quality

pytestmark = pytest.mark.kills

KILLS = 5


def test_a_comparison_killed_five_times_ends_as_the_uninterrupted_one(tmp_path: Path):
    command = [sys.executable, killed_comparison.__file__, str(tmp_path), str(KILLS)]
    parts = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # where pytest finds what tests share
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=parts)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "deaths.json").read_text(encoding="utf-8"))) == KILLS
    whole, killed = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("whole", "killed"))
    assert {outcome["status"] for outcome in killed["outcomes"]} == {"complete"}
    assert quality(killed) == quality(whole)
