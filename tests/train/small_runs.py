"""Fixtures of whoever trains in the tests: tiny bases in folders, and a recipe on them with rows of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each kind of tiny base."""
    top = tmp_path_factory.mktemp("bases")
    kinds = {"llama": tiny.llama, "bert": tiny.bert, "t5": tiny.t5, "mixture": tiny.mixture}
    return {name: make(top / name) for name, make in kinds.items()}


@pytest.fixture
def recipe(bases: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe on tiny bases and rows: `recipe("llama", train={"steps": 4})`."""

    def make(
        base: str = "llama", adapter: Any = "peft:lora", train: dict[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        rows = tiny.classified() if base == "bert" else tiny.answers()
        rows, test = rows[:48], rows[48:]
        data = {
            "train": str(tiny.write_rows(tmp_path / "train.jsonl", rows)),
            "test": str(tiny.write_rows(tmp_path / "test.jsonl", test)),
        }
        return {
            "model": str(bases[base]),
            "data": data,
            "adapter": {"recipe": adapter, "r": 4} if isinstance(adapter, str) else adapter,
            "train": {"steps": 4, "batch_size": 8, "lr": 1e-2, "save_every": 0, "logging_every": 1, **(train or {})},
            "out": str(tmp_path / "run"),
            **more,
        }

    return make
