"""`weftlora export` from the shell's side, on a run of three steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weftlora.cli.export import lora_text
from weftlora.export.record import Approximation, LoraExport, Proof
from weftlora.train import train

Weft = Callable[..., Any]


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain and a routed run."""
    import tiny_bases as tiny

    top = tmp_path_factory.mktemp("runs")
    tiny.write_rows(top / "rows.jsonl", tiny.answers(48))
    recipe = {
        "model": str(base),
        "data": {"train": str(top / "rows.jsonl")},
        "train": {"steps": 3, "batch_size": 8, "save_every": 0, "lr": 1e-2},
    }
    made = {}
    for name in ("lora", "hydralora"):
        made[name] = top / name
        train({**recipe, "adapter": {"recipe": name, "r": 2}, "out": str(made[name])})
    return made


def test_a_run_leaves_as_stock_lora_proved_on_its_own_validation_rows(weftlora: Weft, runs: dict[str, Path]) -> None:
    """The real process without weftlora; the other tests here do not wait for it."""
    said = weftlora("export", runs["lora"], "--json")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert record["folder"] == str(runs["lora"] / "lora")
    assert record["proof"]["error"] < 1e-5
    assert record["proof"]["inputs"] == "5 rows of the run's validation data"
    card = (runs["lora"] / "lora" / "README.md").read_text()
    assert "| recipe | lora |" in card
    assert "| optimiser steps | 3 |" in card
    assert "rows.jsonl (sha256" in card
    for place in (runs["lora"].parent, Path.home(), Path.cwd()):
        assert str(place) not in card
    said = weftlora("export", runs["lora"])
    assert said.code == 1
    assert "is not empty: choose another folder" in said.err


def test_what_was_lost_is_on_the_screen(weftlora: Weft, runs: dict[str, Path], tmp_path: Path) -> None:
    said = weftlora(
        "export", runs["lora"], "--uniform", "--dtype", "bfloat16", "--no-verify", "--out", tmp_path / "lora"
    )
    assert said.code == 0, said.err
    assert "stock LoRA, uniform, rank 2 at 14 modules, bfloat16" in said.out
    assert "not verified" in said.out
    assert "rounding to bfloat16 loses" in said.out
    said = weftlora(
        "export", runs["lora"], "--to", "merged", "--no-verify", "--out", tmp_path / "merged", "--accept-loss"
    )
    assert said.code == 0, said.err
    assert "all 14 modules" in said.out
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_an_adapter_folder_goes_beside_itself(weftlora: Weft, runs: dict[str, Path]) -> None:
    said = weftlora("export", runs["lora"] / "adapter", "--server-ranks", "--no-verify", "--json")
    assert said.code == 0, said.err
    record = json.loads(said.out)
    assert record["folder"] == str(runs["lora"] / "adapter-lora")
    assert set(record["ranks"].values()) == {8}


def test_from_inside_an_adapter_folder_it_goes_beside_it_too(
    weftlora: Weft, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (runs["lora"] / "another").mkdir()
    for file in (runs["lora"] / "adapter").iterdir():
        shutil.copy(file, runs["lora"] / "another")
    monkeypatch.chdir(runs["lora"] / "another")
    said = weftlora("export", ".", "--no-verify", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["folder"] == str(runs["lora"] / "another-lora")


def test_a_routed_run_needs_an_approximation(weftlora: Weft, runs: dict[str, Path], tmp_path: Path) -> None:
    said = weftlora("export", runs["hydralora"])
    assert said.code == 1
    assert "depends on the token" in said.err
    assert "--approximate mean-gate" in said.err
    rows = runs["lora"].parent / "rows.jsonl"
    options = ["--approximate", "mean-gate", "--data", rows, "--rows", 10, "--no-verify", "--out", tmp_path / "lora"]
    said = weftlora("export", runs["hydralora"], *options)
    assert said.code == 0, said.err
    assert not (runs["hydralora"] / "lora").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "merged", "--uniform"], "--uniform means nothing with --to merged"),
        (["--accept-loss"], "--accept-loss means nothing with --to lora"),
        (["--to", "gguf"], "gguf"),
        (["--dtype", "int8"], "not a dtype to write"),
        (["--approximate", "mean-gate"], "belong together"),
        (["--out", "RUN/adapter"], "holds the adapter itself"),
        (["--base", "nowhere/at/all"], "no model folder"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    weftlora: Weft, runs: dict[str, Path], arguments: list[str], sentence: str
) -> None:
    said = weftlora("export", runs["lora"], *(word.replace("RUN", str(runs["lora"])) for word in arguments))
    assert said.code == (2 if arguments == ["--to", "gguf"] else 1)  # 2: no such option
    assert sentence in said.err
    assert said.err.startswith("weftlora: ")
    assert said.err.count("\n") == 1


def test_the_proof_and_what_an_approximation_costs_are_on_the_screen() -> None:
    proof = Proof("8 rows of the run's validation data", 3e-7, 0.5, 1e-5)
    cost = Approximation("64 rows of demo", 0.21, 0.155, 0.9274, 0.9744, 3.1836, {})
    found = LoraExport(Path("x"), ("default",), "uniform", "float32", {"q": 2}, ["v"], 10, [], proof, cost)
    said = lora_text(found)
    assert "largest logit difference from the live adapter: 3e-07 of the largest logit (allowed 1e-05)" in said
    assert "by stock peft without weftlora, on 8 rows of the run's validation data" in said
    assert "mean gates over 64 rows of demo" in said
    assert "0.21 of the largest logit; 15.5% of the adapter's change of the logits is lost" in said
    assert "loss: live 0.9274, mean gate 0.9744, no adapter 3.1836" in said
    assert "1 modules without a live slot left out" in said
