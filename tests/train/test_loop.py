from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import weftlora
from weftlora.disk import files
from weftlora.errors import ConfigError, ModelError, RunError, TargetError, WeftError
from weftlora.runs.run import Run
from weftlora.train import Tick
from weftlora.train.layer_search import search_recipe

Make = Callable[..., dict[str, Any]]


def test_a_run_folder_says_what_was_done(recipe: Make, tmp_path: Path) -> None:
    run = weftlora.train(recipe(adapter="hydralora", train={"steps": 6, "eval_every": 3, "save_every": 2}))
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept["status"] == run.status == "complete"
    assert kept["recipe"]["adapter"] == {"recipe": "hydralora", "r": 4}
    assert kept["adapter"]["structure"]["heads"] == 3
    assert kept["parameters"]["trainable"] > 0
    assert set(kept["data"]["hashes"]) == {str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")}
    assert kept["data"]["counts"]["train"]["rows"] == 43
    assert kept["versions"]["peft"] == "0.21.2"
    assert kept["metrics"]["validation_loss"] > 0
    assert Run.load(run.folder) == run
    steps = [row["step"] for row in run.history() if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in run.history() if "validation_loss" in row] == [3, 6]
    events = [json.loads(line)["event"] for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "checkpoint", "checkpoint", "checkpoint", "end"]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    readme = (run.adapter_folder / "README.md").read_text()
    assert "`import weftlora`" in readme.splitlines()[0]
    assert "Trained by weftlora" in readme
    assert not list(run.folder.rglob(".*"))


@pytest.mark.parametrize("keys", [{"lora_plus_ratio": 16}, {"freeze_down": True}])
def test_roles_are_refused_for_pefts_own_adapters_before_anything_is_written(
    recipe: Make, keys: dict[str, Any]
) -> None:
    given = recipe(adapter="peft:lora", train=keys)
    with pytest.raises(
        ConfigError, match=r"is for weftlora's adapters, and peft:lora is peft's own: use adapter: lora"
    ):
        weftlora.train(given)
    with pytest.raises(ConfigError, match="starts at zero, so the update would stay zero"):
        weftlora.train(recipe(adapter={"recipe": "tied_lora", "train": "A"}, train={"freeze_down": True}))
    with pytest.raises(ConfigError, match="the B of weftlora's adapters, and none is trained"):
        weftlora.train(recipe(adapter={"recipe": "tied_lora", "train": "vera"}, train={"lora_plus_ratio": 16}))
    assert not Path(given["out"]).exists()


def test_a_frozen_a_is_what_the_seed_drew_and_is_not_counted(recipe: Make, tmp_path: Path) -> None:
    def factors(name: str, **train: Any) -> dict[str, torch.Tensor]:
        run = weftlora.train(recipe(adapter="lora", train=train, out=str(tmp_path / name)))
        return load_file(run.adapter_folder / "adapter_model.safetensors")

    one, four, free = (
        factors("one", steps=1, freeze_down=True),
        factors("four", steps=4, freeze_down=True),
        factors("free", steps=4),
    )
    downs = [name for name in one if name.endswith(".A")]
    assert downs
    assert all(torch.equal(one[name], four[name]) and not torch.equal(four[name], free[name]) for name in downs)
    counted = [Run.load(tmp_path / name).parameters["trainable"] for name in ("four", "free")]
    assert counted[1] - counted[0] == sum(one[name].numel() for name in downs)


def test_nothing_is_written_outside_the_run_folder(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    weftlora.train(recipe())
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize(
    "adapter", ["lora", "hydralora", "tied_lora", "peft:lora", {"structure": {"hydra": {"heads": 2}}, "r": 2}]
)
def test_training_lowers_the_loss(recipe: Make, adapter: Any) -> None:
    run = weftlora.train(recipe(adapter=adapter, train={"steps": 12, "lr": 2e-2}))
    losses = [row["loss"] for row in run.history()]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_a_classifier_is_trained_with_its_head(recipe: Make, bases: dict[str, Path], base: str) -> None:
    given = recipe("bert", adapter="lora") | {"model": str(bases[base])}
    run = weftlora.train(given)
    head = "classifier" if base == "bert" else "score"
    saved = load_file(run.adapter_folder / "adapter_model.safetensors")
    assert any(head in name for name in saved)
    assert run.data["labels"] == ["high", "low"]
    assert 0 <= run.metrics["validation_accuracy"] <= 1


def test_an_encoder_decoder_is_trained_on_text_to_text(recipe: Make) -> None:
    run = weftlora.train(recipe("t5", adapter="lora", train={"steps": 8, "lr": 2e-2}))
    losses = [row["loss"] for row in run.history()]
    assert run.task == "seq2seq"
    assert losses[-1] < losses[0]


def test_sft_gives_the_adapter_that_trainer_gives(recipe: Make, tmp_path: Path) -> None:
    ours = weftlora.train(recipe(out=str(tmp_path / "a")))
    theirs = weftlora.train(recipe(train={"trainer": "sft"}, out=str(tmp_path / "b")))
    a, b = (load_file(run.adapter_folder / "adapter_model.safetensors") for run in (ours, theirs))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [True, "reentrant", "non_reentrant"])
def test_checkpointing_activations_changes_nothing(recipe: Make, tmp_path: Path, kind: Any) -> None:
    plain = weftlora.train(recipe(adapter="lora", train={"steps": 2}, out=str(tmp_path / "a")))
    other = weftlora.train(
        recipe(adapter="lora", train={"steps": 2, "gradient_checkpointing": kind}, out=str(tmp_path / "b"))
    )
    a, b = (load_file(run.adapter_folder / "adapter_model.safetensors") for run in (plain, other))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-6, rtol=1e-5)


def test_accumulation_is_one_larger_batch(recipe: Make, tmp_path: Path) -> None:
    whole = weftlora.train(recipe(train={"steps": 2, "batch_size": 16}, out=str(tmp_path / "a")))
    parts = weftlora.train(recipe(train={"steps": 2, "batch_size": 4, "accumulation": 4}, out=str(tmp_path / "b")))
    a, b = (load_file(run.adapter_folder / "adapter_model.safetensors") for run in (whole, parts))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-4, rtol=1e-3)


def test_bf16_autocast_trains(recipe: Make) -> None:
    run = weftlora.train(recipe(adapter="hydralora", train={"precision": "bf16"}))
    assert run.metrics["train_loss"] > 0


def test_stock_adalora_moves_its_ranks(recipe: Make) -> None:
    adapter = {"recipe": "peft:adalora", "r": 2, "init_r": 4, "tinit": 1, "tfinal": 1, "deltaT": 1}
    run = weftlora.train(recipe(adapter=adapter, train={"steps": 8}))
    kept = json.loads((run.adapter_folder / "adapter_config.json").read_text())
    assert kept["total_step"] == 8
    assert any(False in mask for mask in kept["rank_pattern"].values())


def test_stock_adalora_is_measured_without_its_penalty_and_once_it_is_loaded(recipe: Make) -> None:
    adapter = {"recipe": "peft:adalora", "r": 2, "init_r": 4, "tinit": 1, "tfinal": 1, "orth_reg_weight": 100.0}
    run = weftlora.train(recipe(adapter=adapter, train={"steps": 4}))
    loaded = weftlora.evaluate(run, split="validation", max_new_tokens=1).scores.loss
    assert run.metrics["validation_loss"] == pytest.approx(loaded, rel=1e-5)


def test_progress_is_told_every_step(recipe: Make) -> None:
    ticks: list[Tick] = []
    weftlora.train(recipe(train={"steps": 3}), progress=ticks.append)
    train = [tick for tick in ticks if tick.phase == "train"]
    assert [(tick.done, tick.total) for tick in train] == [(1, 3), (2, 3), (3, 3)]
    assert train[-1].loss is not None
    assert train[-1].tokens_per_s is not None


def test_overrides_of_a_mapping(recipe: Make) -> None:
    assert weftlora.train(recipe(), "train.steps=2", "adapter.r=3").adapter["r"] == 3


# What cannot work leaves nothing behind.

WRONG: dict[str, tuple[dict[str, Any], type[WeftError], str]] = {
    "heads=1": ({"adapter": {"recipe": "hydralora", "heads": 1}}, ConfigError, "heads=1"),
    "rank 0": ({"adapter": {"recipe": "lora", "r": 0}}, ConfigError, "r=0"),
    "rank 0 of peft": ({"adapter": {"recipe": "peft:lora", "r": 0}}, ConfigError, "0"),
    "unknown recipe": ({"adapter": {"recipe": "hydralor"}}, ConfigError, "did you mean 'hydralora'"),
    "unknown field": ({"adapter": {"recipe": "hydralora", "heds": 3}}, ConfigError, "did you mean 'heads'"),
    "unknown field of plain": (
        {"adapter": {"recipe": "lora", "lora_alpa": 3}},
        ConfigError,
        "did you mean 'lora_alpha'",
    ),
    "unknown axis": ({"adapter": {"structur": "hydra"}}, ConfigError, "did you mean 'structure'"),
    "unknown field of peft": (
        {"adapter": {"recipe": "peft:lora", "lora_alpa": 3}},
        ConfigError,
        "did you mean 'lora_alpha'",
    ),
    "no target": ({"adapter": {"recipe": "lora", "target_modules": ["nothing"]}}, TargetError, "nothing"),
    "no target in peft": ({"adapter": {"recipe": "peft:lora", "target_modules": ["nothing"]}}, TargetError, "nothing"),
    "no adapter": ({"adapter": "none"}, ConfigError, "weftlora eval"),
    "missing base": ({"model": "./nowhere"}, ModelError, "no model folder"),
    "schedule that needs more": (
        {"train": {"steps": 1, "schedule": "cosine_with_min_lr"}},
        ConfigError,
        "lr_scheduler_kwargs",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_one_sentence_and_leaves_nothing(recipe: Make, tmp_path: Path, case: str) -> None:
    change, kind, says = WRONG[case]
    given = recipe(out=str(tmp_path / "deep" / "run")) | change
    with pytest.raises(kind) as raised:
        weftlora.train(given)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "deep").exists()


def test_sft_is_for_causal_models(recipe: Make) -> None:
    with pytest.raises(ConfigError, match="causal"):
        weftlora.train(recipe("bert", train={"trainer": "sft"}))


def test_a_folder_in_use_is_kept(recipe: Make, tmp_path: Path) -> None:
    first = weftlora.train(recipe())
    with pytest.raises(RunError, match="--resume"):
        weftlora.train(recipe(train={"steps": 2}))
    assert Run.load(first.folder).steps == 4
    second = weftlora.train(recipe(train={"steps": 2}), overwrite=True)
    assert Run.load(second.folder).steps == 2
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_overwrite_spares_a_folder_that_is_no_run(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match="other files"):
        weftlora.train(recipe(), overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_file_in_the_way(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("file", "file/run"):
        with pytest.raises(RunError, match="file"):
            weftlora.train(recipe(out=str(tmp_path / out)))


def test_a_read_only_place_is_refused_before_anything_is_loaded(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc takes no file of anybody, root included, whose permissions say that it may."""
    monkeypatch.setattr("weftlora.runs.base_model.load", lambda *_, **__: pytest.fail("the model was loaded"))
    for start in (
        lambda: weftlora.train(recipe(out="/proc/run")),
        lambda: search_recipe(recipe(), out="/proc/selection.json"),
    ):
        with pytest.raises(RunError, match=r"/proc takes no new file"):
            start()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_full_at_the_start_changes_nothing(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        weftlora.train(recipe())
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def sync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    given = recipe()
    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(RunError, match="no space left"):
        weftlora.train(given, overwrite=overwrite)
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - {Path("train.jsonl"), Path("test.jsonl")}
    assert sorted(after) == [path for path in before if path.suffix != ".jsonl" or len(path.parts) > 1]


class _FillsDisk(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_full_on_the_way_leaves_what_resume_needs(recipe: Make) -> None:
    given = recipe(train={"save_every": 2})
    with pytest.raises(RunError, match="--resume"):
        weftlora.train(given, callbacks=[_FillsDisk()])
    run = Run.load(given["out"])
    assert run.status == "failed"
    assert not run.adapter_folder.exists()
    assert weftlora.train(given, resume=True).status == "complete"


class _Saves(TrainerCallback):
    """What Trainer does of optimiser and schedule, where the disk refuses it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            torch.save({"state": torch.zeros(10**5)}, self.path)


@pytest.mark.parametrize("path", ["/dev/full", "/proc/version"])
def test_whatever_torch_says_of_a_disk_that_refuses_a_file_is_one_sentence(recipe: Make, path: str) -> None:
    with pytest.raises(RunError, match="the disk refused it; free space on it and continue with --resume"):
        weftlora.train(recipe(train={"save_every": 2}), callbacks=[_Saves(path)])


class _Stops(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_run_stopped_before_its_launch_says_so(recipe: Make) -> None:
    given = recipe(adapter={"recipe": "lora_dash", "r": 2, "after": 3}, train={"steps": 6})
    with pytest.warns(UserWarning, match=r"2 steps and is still without the launch of Dash \(due after step 3\)"):
        weftlora.train(given, callbacks=[_Stops()])


class _Likes(TrainerCallback):
    """An evaluation that step 2 wins."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        metrics["eval_loss"] = abs(state.global_step - 2)


def test_the_best_checkpoint_is_not_rotated_away(recipe: Make) -> None:
    given = recipe(train={"save_every": 1, "keep": 1, "eval_every": 1, "args": {"load_best_model_at_end": True}})
    given["data"]["validation_fraction"] = 0.25
    run = weftlora.train(given, callbacks=[_Likes()])
    files = [folder / "adapter_model.safetensors" for folder in (run.adapter_folder, run.checkpoints / "checkpoint-2")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
