"""The commands, where the row has what they need."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NEEDED = ("typer", "rich", "pydantic", "datasets", "accelerate")
ROWS = ("model=demo", "data=demo", "data.limit=12", "data.validation_limit=4")


@pytest.fixture(autouse=True, scope="module")
def extras(needs: Callable[..., None]) -> None:
    needs(*NEEDED)


@pytest.fixture
def weftlora() -> Callable[..., Any]:
    """Calls the command line in this process, which has already paid for its imports."""
    from typer.testing import CliRunner

    from weftlora.cli.commands import app

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False)

    return call


@pytest.fixture(scope="module")
def run(
    extras: None, python: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    python(
        "-m", "weftlora.cli", "train", "lora_dash", *ROWS, "adapter.after=2", "train.steps=3", "train.save_every=2",
        "train.warmup=0.4", "train.gradient_checkpointing=true", f"out={folder}", "--quiet",
    )  # fmt: skip
    return folder


def test_train_writes_a_run(run: Path) -> None:
    assert json.loads((run / "run.json").read_text())["status"] == "complete"
    assert "dash_launch" in (run / "events.jsonl").read_text()


def test_eval_measures_it(run: Path, weftlora: Callable[..., Any]) -> None:
    done = weftlora("eval", str(run), "--limit", "4", "--max-new-tokens", "2", "--json", "--quiet")
    assert json.loads(done.stdout)


def test_export_proves_it(run: Path, weftlora: Callable[..., Any], tmp_path: Path) -> None:
    done = weftlora("export", str(run), "--out", str(tmp_path / "stock"))
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "stock" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_train_on_trls_trainer(weftlora: Callable[..., Any], tmp_path: Path, needs: Callable[..., None]) -> None:
    needs("trl")
    done = weftlora("train", "lora", *ROWS, "train.steps=2", "train.trainer=sft", f"out={tmp_path / 'run'}", "--quiet")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_doctor_names_the_nearest_row(weftlora: Callable[..., Any]) -> None:
    assert json.loads(weftlora("doctor", "--json").stdout)["nearest"]["name"]
