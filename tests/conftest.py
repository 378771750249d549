"""Shared fixtures: everything offline, on one thread, with a fixed seed. Tiny models and structures: `families.py`."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from families import FAMILIES, Family

torch.set_num_threads(1)
pytest_plugins = ["looking", "small_runs"]  # adapters that were trained a little and a browser; recipes on tiny bases


@pytest.fixture(autouse=True, scope="module")
def _garbage_is_only_of_this_module() -> None:
    """Takes what is loaded by now from the collector's sight.

    A Trainer collects garbage at every start, and with all tests and libraries in sight that is half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def weft_data() -> Path:
    """The folder of real models and data; skips where there is none, fails in CI, where there must be one."""
    folder = os.environ.get("WEFT_DATA", "")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = f"WEFT_DATA={folder!r} is not a folder with the real models and data"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{reason}, and CI=true requires it")
    pytest.skip(reason)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Every base family in turn."""
    return FAMILIES[request.param]


@pytest.fixture
def llama() -> torch.nn.Module:
    """A tiny Llama-type decoder: 2 layers, hidden 32, GQA, vocabulary 64."""
    return FAMILIES["llama"].build()


@pytest.fixture
def bert() -> torch.nn.Module:
    """A tiny BERT-type encoder with a head for 3 classes."""
    return FAMILIES["bert"].build()


@pytest.fixture
def token_batch() -> dict[str, torch.Tensor]:
    """input_ids and labels, 2 × 7 tokens."""
    return FAMILIES["llama"].batch()
