from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
from peft import PeftModel, get_peft_model

import weftlora
from families import FAMILIES, randomise
from weftlora.export import proof, stock_process


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a folder."""
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    base: Any = FAMILIES["llama"].build()
    base.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture
def adapted(llama_folder: Path) -> Callable[..., PeftModel]:
    """The tiny Llama from its folder with an adapter whose values have moved: `adapted(weftlora.PlainLoraConfig(r=2))`."""

    def make(config: weftlora.WeftConfig, size: float = 0.1, **options: Any) -> PeftModel:
        cls: Any = type(FAMILIES["llama"].build())
        model = get_peft_model(cls.from_pretrained(llama_folder, **options), config)
        randomise(model, size=size)
        return model.eval()

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Stock peft in this process, which is quicker; the jobs it was given. `test_every_cell` and the command use the real one."""
    seen: list[Mapping[str, Any]] = []

    def run(jobs: Sequence[Mapping[str, Any]], scratch: Path) -> list[str | None]:
        seen.extend(jobs)
        return [stock_process._told(dict(job)) for job in jobs]

    monkeypatch.setattr(proof, "run_jobs", run)
    return seen
