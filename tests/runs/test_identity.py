"""A run is resumed, measured, answered from and exported with its own inputs, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
from interrupting import Interrupt, weights
from safetensors.torch import load_file, save_file

import weftlora
from weftlora.disk.files import read_json
from weftlora.errors import WeftError
from weftlora.runs import identity
from weftlora.train import checkpoint

Make = Callable[..., dict[str, Any]]
LENGTH = {"steps": 6, "save_every": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weftlora" / "hashes"


@pytest.fixture
def given(recipe: Make, tmp_path: Path) -> dict[str, Any]:
    """A recipe on a base of its own, which a test may change."""
    made = recipe(adapter="lora", train=LENGTH) | {"model": str(tiny.llama(tmp_path / "base"))}
    tiny.write_rows(tmp_path / "validation.jsonl", tiny.answers(12))
    made["data"] = made["data"] | {"validation": str(tmp_path / "validation.jsonl")}
    return made


def edit(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def one_value(folder: Path) -> None:
    """Another base in one value, which the fingerprint's sample does not see."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"].view(-1)[3] += 1.0
    save_file(tensors, file, {"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a value": (lambda top: one_value(top / "base"), "other weights"),
    "hidden_act": (lambda top: edit(top / "base" / "config.json", hidden_act="gelu"), "another config"),
    "rms_norm_eps": (lambda top: edit(top / "base" / "config.json", rms_norm_eps=1e-2), "another config"),
    "tokenizer": (lambda top: edit(top / "base" / "tokenizer_config.json", clean_up=True), "another tokenizer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_base_is_refused_by_all_that_uses_a_run(given: dict[str, Any], tmp_path: Path, change: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(3)])
    shutil.copytree(given["out"], tmp_path / "done")
    done = weftlora.train(str(tmp_path / "done"), resume=True)
    work, said = CHANGES[change]
    work(tmp_path)
    for use in (
        lambda: weftlora.train(given, resume=True),
        lambda: weftlora.evaluate(done.folder, answers=False),
        lambda: weftlora.generate(done.folder, "a ->"),
        lambda: weftlora.export_lora(done.folder, tmp_path / "lora", verify=False),
    ):
        with pytest.raises(WeftError, match=said):
            use()
    assert not (tmp_path / "lora").exists()


def test_swapped_rows_are_other_rows(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(3)])
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    train.rename(tmp_path / "aside")
    validation.rename(train)
    (tmp_path / "aside").rename(validation)
    with pytest.raises(WeftError, match=r"the data of .* has changed"):
        weftlora.train(given, resume=True)


def test_the_same_rows_as_other_tokens_are_refused(given: dict[str, Any]) -> None:
    """As where another version of weftlora tokenised them: the files are the same, and what is trained on is not."""
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(3)])
    record = Path(given["out"]) / "run.json"
    data = read_json(record)["data"]
    data["counts"]["train"]["answer_tokens"] -= 1
    edit(record, data=data)
    with pytest.raises(WeftError, match=r"the train rows of .* are the same and their tokens are not .*--overwrite"):
        weftlora.train(given, resume=True)


def test_the_same_base_elsewhere_is_the_same(given: dict[str, Any], tmp_path: Path) -> None:
    run = weftlora.train(given)
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    shutil.rmtree(tmp_path / "base")
    assert weftlora.evaluate(run.folder, base=str(tmp_path / "copy"), answers=False).scores.rows == 12
    sha = hashlib.sha256((tmp_path / "copy" / "model.safetensors").read_bytes()).hexdigest()
    assert read_json(run.folder / "run.json")["base"]["weights"] == {"model.safetensors": sha}


def test_a_base_that_changes_under_a_run_marks_no_checkpoint(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are read while the first steps run: what is found then is found before a checkpoint counts."""
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(3)])
    edit(
        Path(given["out"]) / "run.json",
        base=read_json(Path(given["out"]) / "run.json")["base"] | {"weights": {"a": "b"}},
    )
    with pytest.raises(WeftError, match="other weights"):
        weftlora.train(given, resume=True)
    assert [checkpoint.step_of(path) for path in checkpoint.marked(Path(given["out"]) / "checkpoints")] == [2]


def test_no_verify_base_reads_nothing_and_says_so(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "digest", lambda path: pytest.fail(f"{path} was read"))
    run = weftlora.train(given, verify_base=False)
    assert run.base["weights"] == "not verified"
    assert weftlora.evaluate(run.folder, answers=False).scores.rows == 12


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    first = identity.digest(file)
    assert first == hashlib.sha256(b"one").hexdigest()
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(identity.hashlib, "file_digest", lambda *given: pytest.fail("it was read again"))
        assert identity.digest(file) == first
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert identity.digest(file) == hashlib.sha256(b"two").hexdigest()
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"whatever")
    (tmp_path / "link.safetensors").symlink_to(blob)
    assert identity.digest(tmp_path / "link.safetensors") == "0" * 64, "the hub's cache has hashed it already"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert identity.digest(tmp_path / "file") == hashlib.sha256(b"").hexdigest()


# ---------------------------------------------------------------------- checkpoints

DAMAGE: dict[str, Callable[[Path], None]] = {
    "optimizer missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "scheduler missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "optimizer cut": lambda folder: (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:-9]),
    "adapter changed": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99),
    "state of another step": lambda folder: edit(folder / "trainer_state.json", global_step=2),
    "marker of another step": lambda folder: edit(folder / "complete.json", step=2),
    "marker damaged": lambda folder: (folder / "complete.json").write_text("[]"),
    "marker leads out": lambda folder: edit(folder / "complete.json", files={"../../run.json": [1, "x"]}),
    "state damaged": lambda folder: (folder / "trainer_state.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    given: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole = weftlora.train(given | {"out": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(5)])
    checkpoints = Path(given["out"]) / "checkpoints"
    assert [path.name for path in checkpoint.marked(checkpoints)] == ["checkpoint-2", "checkpoint-4"]
    DAMAGE[damage](checkpoints / "checkpoint-4")
    resumed = weftlora.train(given, resume=True)
    assert resumed.time["resumed_from"] == 2
    assert "checkpoint-4 is damaged" in caplog.text
    assert weights(resumed) == weights(whole)


def test_with_no_whole_checkpoint_left_it_says_so(given: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(3)])
    folder = Path(given["out"]) / "checkpoints" / "checkpoint-2"
    DAMAGE["optimizer missing"](folder)
    with pytest.raises(WeftError, match=r"optimizer\.pt is missing, and there is no earlier complete one"):
        weftlora.train(given, resume=True)
