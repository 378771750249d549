"""Inputs that cannot mean what they say: each is one sentence, and nothing is written."""

import json
import shutil

import pytest

import weftlora
from weftlora.runs.recipe import Recipe, read_yaml


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps='3'", "valid integer"),
        ("train.steps=true", "valid integer"),
        ("train.lr=.inf", "finite"),
        ("out=''", "out"),
    ],
)
def test_values_are_not_converted_in_silence(recipe, override, words):
    with pytest.raises(weftlora.ConfigError, match=words):
        Recipe.read(recipe("llama"), override)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("train.report_to=nonsense", weftlora.ConfigError, "is not a logger"),
        ("adapter.target_modules='((('", weftlora.ConfigError, "not a regular expression"),
        ("adapter.rank_pattern={'((': 4}", weftlora.ConfigError, "not a regular expression"),
        ("adapter.modules_to_save=[lm_hed]", weftlora.TargetError, "did you mean 'lm_head'"),
    ],
)
def test_what_cannot_work_is_a_sentence(recipe, tmp_path, override, error, words):
    with pytest.raises(error, match=words):
        weftlora.train(recipe("llama", adapter="lora"), override)
    assert not (tmp_path / "run").exists()


def test_an_optimiser_under_which_slots_cannot_move_is_refused_before_a_folder_exists(recipe, tmp_path):
    given = recipe(
        "llama", adapter={"recipe": "alora", "score": "random", "first": 1, "every": 1, "max_rounds": 1, "move": 1}
    )
    with pytest.raises(
        weftlora.ConfigError, match=r"Adafactor keeps .* rank cannot move between modules: train with AdamW"
    ):
        weftlora.train(given, "train.optimizer=adafactor")
    assert not (tmp_path / "run").exists()


def test_a_key_written_twice_is_refused():
    with pytest.raises(weftlora.ConfigError, match="is given twice"):
        read_yaml("train: {steps: 1}\ntrain: {steps: 2}", "r.yaml")
    assert read_yaml("a: {b: [1, {c: 2}]}", "r.yaml") == {"a": {"b": [1, {"c": 2}]}}


@pytest.mark.parametrize("base", ["llama", "bert"])
def test_weights_that_do_not_fit_their_config_are_refused(recipe, bases, tmp_path, base):
    copy = tmp_path / "copy"
    shutil.copytree(bases[base], copy)
    config = json.loads((copy / "config.json").read_text())
    config["intermediate_size"] += 16
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(weftlora.ModelError):
        weftlora.train(recipe(base) | {"model": str(copy)})


def test_damaged_weights_are_refused(recipe, bases, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bases["llama"], copy)
    (copy / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(weftlora.ModelError):
        weftlora.train(recipe("llama") | {"model": str(copy)})


def test_a_run_is_evaluated_as_it_was_trained(recipe):
    run = weftlora.train(recipe("llama", adapter="lora"))
    with pytest.raises(weftlora.ConfigError, match="only data"):
        weftlora.evaluate(run, "adapter.r=99")


def test_a_diverged_run_is_no_success(recipe, monkeypatch):
    from weftlora.train import loop

    monkeypatch.setattr(loop, "_final", lambda *_: {"train_loss": float("nan")})
    with pytest.raises(weftlora.RunError, match="diverged"):
        weftlora.train(recipe("llama", adapter="lora"))
