"""Where a command writes one file: what is there and is something else stays, unless `--overwrite` says otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weftlora.train import train

Weft = Callable[..., Any]


@pytest.fixture
def run(recipe_file: Path) -> Path:
    return train(str(recipe_file), "adapter={recipe: lora, r: 2}").folder


@pytest.mark.parametrize("name", ["report", "inspect", "search", "directions", "bench"])
def test_a_file_that_is_something_else_is_kept(
    weftlora: Weft, run: Path, recipe_file: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out.file"
    given = {
        "report": ("report", run, "-o", out),
        "inspect": ("inspect", run, "--no-base", "--html", out),
        "search": (
            *("search", recipe_file, "--out", out, "adapter={recipe: lora, r: 2}"),
            "adapter.layers={search: {steps: 2, val_size: 8, outer_batches: 2}}",
        ),
        "directions": ("directions", run, "--out", out),
        "bench": ("bench", "launch", "--quick", "--layers", 0, "--out", out),
    }[name]
    for mine in ("mine", '{"mine": 1}', "<html>mine</html>"):
        out.write_text(mine)
        said = weftlora(*given)
        assert said.code == 1
        assert "already exists and is not" in said.err
        assert said.err.count("\n") == 1
        assert out.read_text() == mine
    (tmp_path / "thesis").write_text("mine")
    out.unlink()
    out.symlink_to(tmp_path / "thesis")
    assert "is a link" in weftlora(*given, "--overwrite").err
    out.unlink()
    (tmp_path / "out.file.part").symlink_to(tmp_path / "thesis")  # what a guessable name would write through
    for more in ((), (), ("--overwrite",)):  # a first one, one over it, one over anything
        said = weftlora(*given, *more)
        assert said.code == 0, said.err
        assert "mine" not in out.read_text()[:20]
        if more == () and name in ("report", "inspect"):
            assert '<meta name="generator" content="weftlora">' in out.read_text()
    assert (tmp_path / "thesis").read_text() == "mine"
    assert (tmp_path / "out.file.part").is_symlink()
    if name not in ("report", "inspect"):
        assert json.loads(out.read_text())
