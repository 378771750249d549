from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import recipe

from weftlora.compare import Comparison, compare


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny bases and rows lie."""
    return tmp_path_factory.mktemp("comparisons")


@pytest.fixture(scope="session")
def tried(bases: Path) -> tuple[dict[str, Any], Comparison]:
    """A whole comparison with rates to choose from, a method that cannot be resumed and the frozen base; and its recipe."""
    methods = ["lora", "peft:adalora", "none"]
    gc.freeze()  # collecting what imports have left takes most of a short run
    made = recipe(
        bases,
        methods=methods,
        train={"lr": None},
        rates={"values": [1e-3, 1e-2, 3e-2], "seeds": 2},
        out=str(bases / "tried"),
    )
    return made, compare(made, jobs=0)
