"""docs/architecture.md names what there is: every room and every file in it, and nothing that has gone."""

from __future__ import annotations

import re
from pathlib import Path

import weftlora

SOURCE = Path(weftlora.__file__).parent
TEXT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
LISTED_ELSEWHERE = {"recipes": "a file per paper", "report": "two packages", "cli": "a file per command"}


def layout() -> dict[str, str]:
    """What the Layout says of each room and file, by its name."""
    block = TEXT.split("```text\nsrc/weftlora/\n")[1].split("```")[0]
    said: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        if line[:3].strip():
            names = line[2:38].split()
            said |= dict.fromkeys(names, "")
        for name in names:
            said[name] += " " + line[38:]
    return said


def test_every_room_and_file_is_in_the_layout() -> None:
    said = layout()
    assert {name.removesuffix("/") for name in said if name.endswith("/")} == ROOMS | {"assets"}
    files = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"}
    assert {name for name in said if name.endswith(".py")} == files
    for room in sorted(ROOMS - LISTED_ELSEWHERE.keys()):
        stems = {path.stem for path in (SOURCE / room).rglob("*.py")} - {"__init__"}
        assert stems <= set(re.findall(r"\w+", said[f"{room}/"])), f"the Layout does not name all files of {room}"


def test_every_module_that_is_named_exists() -> None:
    named = re.findall(rf"`((?:{'|'.join(sorted(ROOMS))})(?:\.\w+)+)`", TEXT)
    assert len(named) > 10, "the ways of x and of a rank decision name the files that they go through"
    for name in named:
        parts = name.split(".")
        places = [SOURCE.joinpath(*parts[:k]) for k in range(2, len(parts) + 1)]
        assert any(p.with_suffix(".py").is_file() or p.is_dir() for p in places), name
