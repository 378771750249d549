"""What is shown, kept and read back as plain data is one thing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from weftlora.errors import RunError
from weftlora.records import Record, check_kinds


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


@dataclass(frozen=True)
class Typed(Record):
    count: int
    share: float | None
    names: list[str]
    parts: dict[str, Part]
    kind: Literal["a", "b"] = "a"
    rest: dict[str, Any] = field(default_factory=dict)


GOOD = {"count": 1, "share": 1, "names": ["x"], "parts": {"a": {"size": 1}}, "rest": {"of": [None]}}


def test_values_of_other_types_than_the_fields_are_refused_by_their_names() -> None:
    assert Typed.fields_in(GOOD, FILE) == GOOD
    assert Typed.fields_in(GOOD | {"share": None, "kind": "b"}, FILE)["kind"] == "b"
    for wrong, name in (
        ({"count": True}, "count is True"),
        ({"count": 1.5}, "count is 1.5"),
        ({"share": "x"}, "share is 'x'"),
        ({"names": "x"}, "names is 'x'"),
        ({"names": ["x", {}]}, r"names.1 is {}"),
        ({"parts": {"a": {"size": "x"}}}, "parts.a.size is 'x'"),
        ({"parts": [1]}, r"parts is \[1\]"),
        ({"kind": ["a"]}, r"kind is \['a'\]"),
        ({"kind": "c"}, "kind is 'c'"),
    ):
        with pytest.raises(RunError, match=rf"^kept\.json is damaged: {name}\.$"):
            Typed.fields_in(GOOD | wrong, FILE)


def test_what_must_be_there_is_missed_by_its_name() -> None:
    kinds = {"a.b": int, "c": (int, float)}
    check_kinds({"a": {"b": 1}, "c": 0.5}, kinds, FILE, needed=True)
    check_kinds({}, kinds, FILE)
    for content, says in (
        ({"a": 3, "c": 1}, "it has no a.b"),
        ({"a": {"b": "x"}}, "a.b is 'x'"),
        ({"a": {"b": True}}, "a.b is True"),
    ):
        with pytest.raises(RunError, match=says):
            check_kinds(content, kinds, FILE, needed=True)
