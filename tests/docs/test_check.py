"""`make check` runs all of its parts, says what each took, and fails where one failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import check

ROOT = Path(__file__).parents[2]
MAKEFILE = """\
well:
\t@echo "3 passed in 0.10s"
slow:
\t@sleep 0.4
broken:
\t@exit 7
"""


def checked(folder: Path, *parts: str) -> subprocess.CompletedProcess[str]:
    (folder / "Makefile").write_text(MAKEFILE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = [sys.executable, str(ROOT / "scripts" / "check.py"), *parts]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_part_that_fails_stops_no_other_and_fails_the_check(tmp_path: Path):
    done = checked(tmp_path, "broken well", "1", "well", "2")
    assert done.returncode == 2  # make's own, of a target that failed
    assert done.stdout.splitlines().count("3 passed in 0.10s") == 1  # "well" alone: make stops within a part
    assert re.search(r"^broken well +0\.0 +1  FAILED with exit status 2$", done.stdout, re.MULTILINE)
    assert re.search(r"^well +0\.0 +2$", done.stdout, re.MULTILINE)


def test_a_part_over_its_budget_is_marked_and_fails_nothing(tmp_path: Path):
    done = checked(tmp_path, "slow", "0.001", "well", "1")
    assert done.returncode == 0
    assert re.search(r"^slow +0\.0 +0\.001  over$", done.stdout, re.MULTILINE)
    assert re.search(r"^together +0\.0 +1\.001$", done.stdout, re.MULTILINE)


def test_the_table_adds_up():
    shown = check.table([check.Part("unit", 9, 8.25, 0), check.Part("grid", 4, 5.5, 2)])
    assert [line.split() for line in shown.splitlines()] == [
        ["minutes", "budget"],
        ["unit", "8.2", "9"],
        ["grid", "5.5", "4", "over,", "FAILED", "with", "exit", "status", "2"],
        ["together", "13.8", "13"],
    ]


def test_pytests_closing_lines_are_found_in_what_the_check_prints(tmp_path: Path):
    pattern = re.search(r"grep -E '(.+)' \"\$log\"", (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    found = subprocess.run(
        ["grep", "-E", pattern[1]], input=checked(tmp_path, "well", "1").stdout, capture_output=True, text=True
    )
    assert found.stdout == "3 passed in 0.10s\n"
