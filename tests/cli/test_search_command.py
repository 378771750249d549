"""`weftlora search` at the shell: a table for people, a record for programs, a file for the next recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Weft = Callable[..., Any]
SMALL = ("adapter.layers={search: {steps: 2, val_size: 8, outer_batches: 2}}",)


def test_a_selection_is_shown_with_its_controls_and_written(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "selection.json"
    said = weftlora("search", recipe_file, *SMALL, "--out", out, "--seeds", "2", "--rows", "24")
    assert said.code == 0, said.err
    for shown in (
        *("model.layers.0", "layers: [", "2 seeds agree", "by chance", "compare with adapter.layers: all [0, 1]"),
        *("2 sizes of the search set agree", "on 24 rows: [", "cost: worth", "training steps", "of the recipe's"),
        "other selections of this size: 1",
    ):
        assert shown in said.out.replace("\n", " ") or shown in said.out, shown
    layers = json.loads(out.read_text())["layers"]
    trained = weftlora("train", recipe_file, f"adapter.layers={out}", "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["adapter"]["layers"]["blocks"] == layers


def test_what_was_added_for_min_layers_and_an_error_asked_for_instead_are_shown(
    weftlora: Weft, recipe_file: Path, tmp_path: Path
) -> None:
    """Of two blocks at most one is above their mean."""
    out = tmp_path / "selection.json"
    asked = "steps: 2, val_size: 8, outer_batches: 2, min_layers: 2"
    said = weftlora("search", recipe_file, f"adapter.layers={{search: {{{asked}}}}}", "--out", out)
    assert said.code == 0, said.err
    assert "added for min_layers: model.layers." in said.out
    refused = weftlora(
        "search", recipe_file, f"adapter.layers={{search: {{{asked}, when_fewer: error}}}}", "--out", out
    )
    assert refused.code == 1
    assert "fewer than min_layers=2" in refused.err


def test_the_record_has_every_selection(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    said = weftlora("search", recipe_file, *SMALL, "--out", tmp_path / "selection.json", "--json")
    record = json.loads(said.out)
    assert len(record["selections"]) == 1
    assert record["stability"] is None
    assert record["stability_by_rows"] is None
    assert record["seconds"][0] > 0
    assert record["controls"]["all"] == [0, 1]
    assert record["selections"][0]["record"]["steps"] == 2


def test_a_trained_run_shows_what_was_selected_what_it_cost_and_what_to_compare_it_with(
    weftlora: Weft, recipe_file: Path, tmp_path: Path
) -> None:
    said = weftlora("train", recipe_file, *SMALL)
    assert said.code == 0, said.err
    for shown in ("search:  layers [", "training steps (+", "compare with adapter.layers: all [0, 1]", "last ["):
        assert shown in said.out, shown


def test_what_cannot_work_is_one_sentence(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    for given, message in (
        (("--out", tmp_path / "no" / "selection.json"), "choose another file"),
        (("adapter={recipe: peft:lora}", "--out", tmp_path / "s.json"), "no layer gates"),
        (("adapter.layers=search", "--out", tmp_path / "s.json"), "val_size"),
        (("--rows", 9999), "rows=9999 are more than the"),
    ):
        said = weftlora("search", recipe_file, *given)
        assert said.code == 1
        assert message in said.err
        assert len(said.err.strip().splitlines()) == 1
    missing = weftlora("train", recipe_file, f"adapter.layers={tmp_path / 'none.json'}")
    assert missing.code == 1
    assert "is not a saved selection" in missing.err
