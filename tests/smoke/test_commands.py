"""The commands, where the row has what they need."""

from __future__ import annotations

import importlib.util
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
        "-m", "weftlora", "train", "lora_dash", *ROWS, "adapter.after=2", "train.steps=3", "train.save_every=2",
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


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """The file of a small one, whose runs go into runs/ beside it."""
    file = tmp_path / "compare.yaml"
    file.write_text(
        "{model: demo, data: {train: demo, limit: 8, validation_limit: 4, test_limit: 4}, train: {steps: 1, batch_size: 4}, "
        f"methods: [lora, tied_lora], baseline: lora, seeds: 2, out: {tmp_path / 'runs'}}}",
        encoding="utf-8",
    )
    return file


def test_runs_are_compared_and_drawn(
    weftlora: Callable[..., Any], comparison: Path, tmp_path: Path, needs: Callable[..., None]
) -> None:
    """Statistics, and a page with its charts: what the extras `compare` and `report` are for."""
    needs("scipy", "jinja2", "vl-convert-python", "sacrebleu", "rouge-score")
    done = weftlora("compare", str(comparison), "--quiet", "--json")
    assert done.exit_code == 0, done.output
    page = tmp_path / "page.html"
    done = weftlora("report", str(tmp_path / "runs"), "-o", str(page))
    assert done.exit_code == 0, done.output
    assert "<svg" in page.read_text(encoding="utf-8")


def test_a_search_ends_with_an_export(
    weftlora: Callable[..., Any], tmp_path: Path, needs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest search there is: what the extra `auto` is for."""
    needs("optuna", "scipy", "jinja2", "vl-convert-python")
    from weftlora.auto import plan

    monkeypatch.setattr(plan, "SIZES", (plan.Size(2, 2, 1, 2, 2),))
    done = weftlora(
        "auto", *ROWS, "train.steps=2", "train.batch_size=4", "methods=[lora, tied_lora]", "budget=30m",
        f"out={tmp_path / 'search'}", "--quiet", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert {row["name"] for row in json.loads(done.stdout)["rows"]} >= {"lora", "tied_lora"}
    assert [*(tmp_path / "search").rglob("adapter_model.safetensors")]


def test_a_comparison_runs_on_a_cluster(
    python: Callable[..., subprocess.CompletedProcess[str]], comparison: Path, needs: Callable[..., None]
) -> None:
    """A Ray cluster of this machine alone: what the extra `ray` is for."""
    needs("ray", "scipy")
    done = python("-m", "weftlora", "compare", str(comparison), "--engine", "ray", "--quiet", "--json")
    assert json.loads(done.stdout)["complete"] is True


def test_heads_are_suggested(weftlora: Callable[..., Any], tmp_path: Path, needs: Callable[..., None]) -> None:
    needs("scikit-learn")
    rows = [{"prompt": f"{word} {n}", "completion": word} for n in range(10) for word in ("sum", "colour", "town")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = weftlora("heads", str(tmp_path / "rows.jsonl"), "--largest", "4", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)


def test_a_gguf_file_is_a_base(tmp_path: Path, needs: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    needs("gguf")
    import torch

    from weftlora.runs.base_model import Wanted, find, load

    # The one file of other folders that is used here: it needs gguf and transformers alone.
    written = importlib.util.spec_from_file_location("tiny_gguf", Path(__file__).parents[1] / "tiny_gguf.py")
    tiny = importlib.util.module_from_spec(written)  # type: ignore[arg-type]
    written.loader.exec_module(tiny)  # type: ignore[union-attr]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, ids = tiny.write_gguf(tmp_path / "tiny.gguf"), torch.arange(3, 40)[None]
    with torch.no_grad():
        mine, its = load(find(Wanted(str(tmp_path / "tiny.gguf")), tmp_path), "causal")(ids).logits, model(ids).logits
    assert float((mine - its).norm() / its.norm()) < 0.02  # what eight bits can say
