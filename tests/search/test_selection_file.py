"""The file of a selection: it comes back as it was, and a value in it that cannot be is named when it is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from searching import searched

from weftlora.errors import ConfigError
from weftlora.search import Selection


def test_a_selection_survives_its_file_and_is_small(tmp_path: Path):
    _, selection = searched()
    selection.save(tmp_path / "selection.json")
    again = Selection.load(tmp_path / "selection.json")
    assert again.layers == selection.layers
    assert again.candidates == selection.candidates
    assert again.record == selection.record
    assert json.loads((tmp_path / "selection.json").read_text())["layers"] == list(selection.blocks)
    assert (tmp_path / "selection.json").stat().st_size < 10_000


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 99}', '{"r": 8}'])
def test_a_file_that_is_no_selection_is_refused_in_a_sentence(content: str, tmp_path: Path):
    (tmp_path / "selection.json").write_text(content)
    with pytest.raises(ConfigError, match=r"selection\.json"):
        Selection.load(tmp_path / "selection.json")


DAMAGE = {
    "layers a number": ("layers", 3),
    "layers that nobody selected": ("layers", [0]),
    "no candidates": ("candidates", []),
    "candidates no list": ("candidates", {"0": {}}),
    "a candidate no object": ("candidates.0", [1, 2]),
    "a name that is none": ("candidates.1.name", 7),
    "alpha a string": ("candidates.0.alpha", "0.3"),
    "alpha no number": ("candidates.0.alpha", float("nan")),
    "alpha_hat missing": ("candidates.0.alpha_hat", ...),
    "selected a number": ("candidates.0.selected", 1),
    "a block below zero": ("candidates.0.block", -1),
    "a block that is half": ("candidates.0.block", 0.5),
    "modules a string": ("candidates.0.modules", "blocks.0.up"),
    "modules empty": ("candidates.0.modules", []),
    "distance null": ("candidates.2.distance", None),
    "a candidate with more": ("candidates.0.alhpa", 0.3),
    "granularity unknown": ("granularity", "layer"),
    "adapter a list": ("adapter", ["r", 8]),
    "r a string": ("adapter.r", "8"),
    "rank_pattern a list": ("adapter.rank_pattern", [1]),
    "a search with a wrong setting": ("search.inner_steps", "many"),
    "a search with another setting": ("search.inner_stpes", 2),
    "inner with a wrong setting": ("inner.lr", None),
    "record missing": ("record", ...),
    "seconds a string": ("seconds", "12 s"),
    "something that is not there": ("layer", [1]),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_malformed_value_is_named_with_its_file_and_key_when_the_file_is_read(damage: str, tmp_path: Path):
    _, selection = searched()
    path, (key, value) = tmp_path / "selection.json", DAMAGE[damage]
    selection.save(path)
    content = json.loads(path.read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    inside = content
    for part in parents:
        inside = inside[part]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=str(last)) as raised:
        Selection.load(path)
    assert str(path) in str(raised.value)
    assert "search again, or name the blocks by hand" in str(raised.value)
    assert type(raised.value) is ConfigError
    assert len(str(raised.value)) < 400  # the value that is wrong, not the whole file


def test_a_selection_in_which_nothing_is_selected_is_refused(tmp_path: Path):
    """Or the empty list would reach peft, which takes it for all layers."""
    _, selection = searched()
    none = [dataclasses.replace(c, selected=False) for c in selection.candidates]
    path = tmp_path / "selection.json"
    content = {"format": 1, "layers": [], **dataclasses.asdict(selection), "candidates": [vars(c) for c in none]}
    path.write_text(json.dumps(content, default=str))
    with pytest.raises(ConfigError, match="none is selected"):
        Selection.load(path)


def test_what_is_no_ordinary_file_is_not_read() -> None:
    """Of a pipe there would be no end."""
    with pytest.raises(ConfigError, match=r"^/dev/null is a pipe, a socket or a device"):
        Selection.load("/dev/null")
