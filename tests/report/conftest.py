"""Adapters of every recipe on the embedded demo model, each trained for a few steps once, and a browser where there is one."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from looking import CONFIGS, train_a_little
from peft import PeftModel, get_peft_model

import weftlora
from families import FAMILIES, adapter_config, randomise
from weftlora.report.result import Inspection


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
