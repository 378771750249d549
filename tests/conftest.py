"""Shared fixtures: everything offline, on one thread, with a fixed seed. Tiny models and structures: `families.py`."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each kind of tiny base."""
    import tiny_bases as tiny

    top = tmp_path_factory.mktemp("bases")
    return {"llama": tiny.llama(top / "llama"), "bert": tiny.bert(top / "bert"), "t5": tiny.t5(top / "t5")}


@pytest.fixture
def recipe(bases: dict[str, Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A recipe on tiny bases and rows: `recipe("llama", train={"steps": 4})`."""

    def make(
        base: str = "llama", adapter: Any = "peft:lora", train: dict[str, Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        import tiny_bases as tiny

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
