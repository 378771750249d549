from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import tiny_bases as tiny

from weftlora.cli import main


@dataclass(frozen=True)
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def weftlora(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run a command in this process: `weftlora("train", file, "--json")`."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        torch.set_num_threads(1)
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Said(int(left.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture
def recipe_file(base: Path, tmp_path: Path) -> Path:
    """A recipe that trains three steps; relative paths count from its folder."""
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.answers(48))
    tiny.write_rows(tmp_path / "test.jsonl", tiny.answers()[48:])
    recipe = {
        "model": str(base),
        "data": {"train": "rows.jsonl", "test": "test.jsonl"},
        "adapter": {"recipe": "hydralora", "r": 2},
        "train": {"steps": 3, "batch_size": 8, "save_every": 0},
        "out": str(tmp_path / "runs" / "first"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
