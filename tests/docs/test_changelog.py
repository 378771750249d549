"""The changelog is made of the fragments by towncrier: every fragment has a kind, and a release takes them all."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import weftlora

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", re.MULTILINE)


def towncrier(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "towncrier", "build", "--version", "9.9", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_newest_section_is_of_this_version_and_every_version_has_one() -> None:
    versions = SECTION.findall((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert versions[0] == weftlora.__version__
    assert len(versions) == len(set(versions)), "towncrier adds a second section where the version was not raised"


def test_every_fragment_is_of_a_kind() -> None:
    done = towncrier(ROOT, "--draft")
    assert done.returncode == 0, done.stderr


def test_a_release_takes_the_fragments_of_every_kind_and_leaves_what_was_released(tmp_path: Path) -> None:
    kinds = re.findall(r"`(\w+)`", (ROOT / "changes" / "README.md").read_text(encoding="utf-8").partition("Kinds:")[2])[
        :5
    ]
    assert kinds == ["added", "changed", "fixed", "removed", "speed"]
    (tmp_path / "changes").mkdir()
    for name in ("pyproject.toml", "CHANGELOG.md", "changes/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for kind in kinds:
        (tmp_path / "changes" / f"subject.{kind}.md").write_text(f"What was {kind}\nin two lines.\n")
    before = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")

    done = towncrier(tmp_path, "--yes")
    assert done.returncode == 0, done.stderr
    head, _, released = before.partition("\n## ")
    now = (tmp_path / "CHANGELOG.md").read_text(encoding="utf-8")
    assert now.startswith(f"{head}\n## 9.9 (")
    assert now.endswith(f"\n## {released}")
    new = now.removeprefix(head).removesuffix(f"\n## {released}")
    assert re.findall(r"^- What was (\w+)\n  in two lines\.$", new, re.MULTILINE) == [
        "added",
        "changed",
        "speed",
        "fixed",
        "removed",
    ]
    assert [path.name for path in (tmp_path / "changes").iterdir()] == ["README.md"]


def test_a_fragment_of_no_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "changes").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "changes" / "subject.bugfix.md").write_text("What was mended.\n")
    done = towncrier(tmp_path, "--draft")
    assert done.returncode != 0
    assert "subject.bugfix.md" in done.stderr
