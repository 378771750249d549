"""Adapters of every recipe on the bundled demo model, trained for a few steps in a bare loop.

model = train_a_little(CONFIGS["hydralora"]())

Adapters of every recipe on the bundled demo model, each trained for a few steps once, and a browser where there is one.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import weftlora
from families import FAMILIES, adapter_config, randomise
from weftlora.data.demo import demo_model_path, demo_rows
from weftlora.inspection.record import Inspection

STEPS = 6

CONFIGS: dict[str, Callable[[], weftlora.WeftConfig]] = {
    "lora": lambda: weftlora.PlainLoraConfig(r=2),
    "hydralora": lambda: weftlora.HydraLoraConfig(r=2, heads=3),
    "tied_lora": lambda: weftlora.TiedLoraConfig(r=2),
    "lora_dash": lambda: weftlora.LoraDashConfig(r=2, directions=3, after=2),
    "lora_init": lambda: weftlora.LoraInitConfig(r=2, after=2),
    "lora_tsd": lambda: weftlora.LoraTsdConfig(r=2, directions=3, after=2),
    "alora": lambda: weftlora.AllocLoraConfig(r=2, first=2, every=2, max_rounds=2, score="random"),
    "flexora": lambda: weftlora.PlainLoraConfig(r=2, layers=weftlora.Only([0, 2])),
}


def demo_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Some demo rows as a padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [f"{row['prompt']}{row['completion']}" for row in demo_rows("validation")[:rows]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def train_a_little(config: weftlora.WeftConfig, steps: int = STEPS, seed: int = 0) -> PeftModel:
    """`config` on the demo model, trained in a bare loop."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(demo_model_path()), config)
    weftlora.attach(model, total_steps=steps)
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=3e-3))
    batch = demo_batch()
    model.train()
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="session")
def adapted() -> Callable[[str], PeftModel]:
    """The adapter of a recipe in memory; shared, so look and do not touch."""
    made: dict[str, PeftModel] = {}

    def of(name: str) -> PeftModel:
        if name not in made:
            made[name] = train_a_little(CONFIGS[name]())
        return made[name]

    return of


@pytest.fixture(scope="session")
def saved(adapted: Callable[[str], PeftModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a recipe's adapter, which names no base."""
    top = tmp_path_factory.mktemp("adapters")

    def of(name: str) -> Path:
        if not (top / name).is_dir():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted(name).save_pretrained(str(top / name))
        return top / name

    return of


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run folder of a recipe on the demo data, trained once per session."""
    top = tmp_path_factory.mktemp("runs")

    def of(name: str, *overrides: str) -> Path:
        if not (top / name).is_dir():
            data = {"train": "demo", "limit": 64, "validation_limit": 32}
            recipe: dict[str, Any] = {"data": data, "adapter": name, "train": {"batch_size": 8}, "out": str(top / name)}
            weftlora.train(recipe, "adapter.r=2", "train.save_every=0", *overrides)
        return top / name

    return of


@pytest.fixture(scope="session")
def hydra_run(run: Callable[..., Path]) -> Path:
    return run("hydralora", "train.steps=3")


@pytest.fixture(scope="session")
def alora_run(run: Callable[..., Path]) -> Path:
    return run(
        "alora", "train.steps=6", "adapter.first=2", "adapter.every=2", "adapter.max_rounds=2", "adapter.score=random"
    )


@pytest.fixture(scope="session")
def flexora_run(run: Callable[..., Path]) -> Path:
    return run("flexora", "train.steps=2", "adapter.steps=2", "adapter.val_size=8")


@pytest.fixture(scope="session")
def inspections(
    hydra_run: Path,
    alora_run: Path,
    flexora_run: Path,
    adapted: Callable[[str], PeftModel],
    saved: Callable[[str], Path],
) -> dict[str, Inspection]:
    """What pages are made of: between them they have every section there is, and one has two stacks of twelve kinds of modules."""
    wide = get_peft_model(FAMILIES["t5"].build(), adapter_config("hydra", "t5"))
    randomise(wide)
    return {
        "hydralora": weftlora.inspect(hydra_run, rows=4, spectra=2),
        "alora": weftlora.inspect(alora_run, spectra=0),
        "flexora": weftlora.inspect(flexora_run, spectra=1),
        "lora_tsd": weftlora.inspect(adapted("lora_tsd"), spectra=2),
        "tied_lora": weftlora.inspect(saved("tied_lora"), base=False),
        "t5": weftlora.inspect(wide, inputs={"a rather long name of a domain": [FAMILIES["t5"].batch()]}, spectra=1),
    }


# ---------------------------------------------------------------------- the browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium as the machine has it; nothing is downloaded. Skips without one, fails in CI, where there must be one."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        reason = "no chromium on this machine: install it (Debian: apt-get install chromium) to open the pages"
        if os.environ.get("CI", "").lower() == "true" and not os.environ.get("WEFT_NO_CHROMIUM"):
            pytest.fail(reason)
        pytest.skip(reason)
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()
