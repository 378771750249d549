"""Whatever a user can put right: one sentence on stderr, exit code 1, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_bases as tiny

Weft = Callable[..., object]


def refused(said: object, *parts: str) -> None:
    assert said.code == 1
    assert said.out == ""
    assert said.err.startswith("weftlora: ")
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    for part in parts:
        assert part in said.err


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.train=missing.jsonl", ["missing.jsonl"]),
        ("adapter.heads=1", ["heads=1"]),
        ("adapter.r=0", ["r=0"]),
        ("adapter.heds=3", ["did you mean 'heads'"]),
        ("adapter.recipe=hydra", ["did you mean 'hydralora'"]),
        ("adapter.target_modules=[nothing]", ["nothing"]),
        ("trian.steps=3", ["did you mean 'train'"]),
        ("train.step=3", ["did you mean 'steps'"]),
        ("train.args.learning_rat=3", ["did you mean 'learning_rate'"]),
        ("model=./nowhere", ["no model folder"]),
        ("model.task=seq2seq", ["not an encoder-decoder"]),
        ("adapter=none", ["weftlora eval"]),
    ],
)
def test_a_recipe_that_cannot_work(
    weftlora: Weft, recipe_file: Path, tmp_path: Path, override: str, parts: list[str]
) -> None:
    refused(weftlora("train", recipe_file, override), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_is_not_there(weftlora: Weft, tmp_path: Path) -> None:
    refused(weftlora("train", tmp_path / "missing.yaml"), "missing.yaml")
    refused(weftlora("train", "hydralroa"), "did you mean 'hydralora'")


@pytest.mark.parametrize("row", ['{"prompt": "a"', '{"prompt": "a"}', '["a", "b"]', '{"prompt": "a", "completion": 3}'])
def test_row_17_malformed(weftlora: Weft, recipe_file: Path, tmp_path: Path, row: str) -> None:
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[16] = row
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    refused(weftlora("train", recipe_file), "rows.jsonl", "line 17")
    assert not (tmp_path / "runs").exists()


def test_a_model_folder_without_weights(weftlora: Weft, recipe_file: Path, base: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(weftlora("train", recipe_file, f"model={bare}"), "no weights")
    assert not (tmp_path / "runs").exists()


def test_an_encoder_given_prompts_to_answer(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    refused(weftlora("train", recipe_file, f"model={tiny.bert(tmp_path / 'bert')}"), "encoder and cannot generate")
    assert not (tmp_path / "runs").exists()


def test_a_file_where_the_run_folder_would_be(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    refused(weftlora("train", recipe_file), "is a file")
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only(
    weftlora: Weft, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from weftlora.disk import files

    def sync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "sync", sync)
    refused(weftlora("train", recipe_file), os.strerror(number).lower())
    assert not (tmp_path / "runs").exists()


def test_adapters_that_do_not_belong(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    weftlora("train", recipe_file)
    other = tiny.llama(tmp_path / "other", seed=1)
    refused(weftlora("eval", run, "--base", other), "other weights")
    refused(weftlora("generate", run, "a", "--base", other), "other weights")
    settings = run / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"format_version": 99}))
    refused(weftlora("eval", run), "99", "upgrade")
    refused(weftlora("eval", tmp_path), "no run.json")
    assert not list(run.glob("eval-*"))
