"""The smoke suite: weftlora on whatever versions it is run with. `make matrix` runs it in every row of matrix.toml.

It uses weftlora, what the row has, and pytest; it imports nothing from other folders of tests, which may need more.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROW: dict[str, Any] = json.loads(os.environ.get("WEFT_MATRIX_ROW", "null")) or {}
"""The row this process stands for, as `scripts/matrix.py` gives it; empty where the suite is run by itself."""


def installed(package: str) -> bool:
    """Whether this row has a package: one that it leaves out may still be in the environment below."""
    if package in ROW.get("without", ()):
        return False
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def lacks_triton() -> bool:
    """Whether trl's SFTTrainer cannot run here with any adapter: trl 1.15 has one loss, a Triton kernel, or None in its place."""
    return getattr(importlib.import_module("trl.trainer.utils"), "_ChunkedLogProbFunction", True) is None


MODULES = {
    "pyyaml": "yaml",
    "rouge-score": "rouge_score",
    "scikit-learn": "sklearn",
    "vl-convert-python": "vl_convert",
    "protobuf": "google.protobuf",
    "rpds_py": "rpds",
}
"""What is imported of a package that has another name."""


def imported(package: str) -> str:
    """The version that the package says itself once it is imported; what its metadata says, where it says none."""
    module = importlib.import_module(MODULES.get(package, package))
    return str(getattr(module, "__version__", None) or version(package)).partition("+")[0]


@pytest.fixture(scope="session")
def version_of() -> Callable[[str], str]:
    return imported


def pytest_report_header() -> list[str]:
    names = [*ROW.get("versions", ())] or ["torch", "transformers", "peft", "trl", "datasets", "accelerate"]
    found = (f"{name} {imported(name) if installed(name) else 'none'}" for name in names)
    return [f"row {ROW.get('name', 'of this environment')}: python {sys.version.split()[0]}, {', '.join(found)}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here belongs to the slow part of the check."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)
    if ROW:  # whether this is the row at all is said before anything else is tried in it
        items.sort(key=lambda item: item.path.name != "test_versions.py")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny decoder of four layers, so that a search and Only have something to choose."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs this Python in a fresh process that sees the row's packages."""

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, done.stderr[-3000:] or done.stdout[-3000:]
        return done

    return run


@pytest.fixture(scope="session")
def needs() -> Callable[..., None]:
    """Skips where this row lacks a package."""

    def skip(*packages: str) -> None:
        if missing := [name for name in packages if not installed(name)]:
            pytest.skip(f"this row has no {missing[0]}")
        if "trl" in packages and lacks_triton():
            pytest.skip(
                "this trl computes its loss by Triton alone, which this torch does not bring; stock LoRA fails too"
            )

    return skip


def train_loop(model: Any, steps: int = 3) -> None:
    """A loop of one's own: three steps of AdamW on a fixed batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(3, 35).reshape(4, 8)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="session")
def train() -> Callable[..., None]:
    return train_loop
