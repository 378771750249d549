"""What is shown, kept and read back as plain data is one thing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from weftlora.errors import RunError
from weftlora.records import Record


@dataclass(frozen=True)
class Part:
    size: int


@dataclass(frozen=True)
class Found(Record):
    folder: Path
    parts: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class Kept(Found):
    format_version: ClassVar[int | None] = 3


FILE = Path("kept.json")


def test_a_record_is_plain_data() -> None:
    plain = Found(Path("runs/a"), [Part(2)]).record()
    assert json.loads(json.dumps(plain)) == plain == {"folder": "runs/a", "parts": [{"size": 2}]}


def test_what_lies_in_files_says_its_format_first_and_is_read_back() -> None:
    plain = Kept(Path("runs/a")).record()
    assert next(iter(plain.items())) == ("format", 3)
    assert Kept.fields_in(plain | {"of_another_version": 1}, FILE) == {"folder": "runs/a", "parts": []}
    assert Kept.fields_in({"folder": "b"}, FILE) == {"folder": "b"}


def test_a_newer_format_is_refused_by_the_name_of_its_file() -> None:
    with pytest.raises(RunError, match=r"^kept\.json was written by a newer weftlora: update weftlora to read it\.$"):
        Kept.fields_in({"format": 4}, FILE)
