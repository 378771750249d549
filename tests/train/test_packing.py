"""Rows that are packed together train as rows apart do, and a model that lets them see each other is refused."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_bases import answers, llama, write_rows
from transformers import AutoModelForCausalLM

import weftlora
from weftlora.data import Collator, DataConfig, load
from weftlora.errors import ConfigError
from weftlora.runs import base_model
from weftlora.runs.recipe import ModelConfig
from weftlora.train import prepare
from weftlora.train.prepare import check_packing


def recipe(tmp_path, base, **data):
    write_rows(tmp_path / "rows.jsonl", answers(40))
    return {
        "model": str(base),
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 40, "validation_fraction": 0.2, **data},
        "adapter": {"recipe": "lora", "r": 2},
        "train": {"epochs": 1, "batch_size": 2, "logging_every": 1, "save_every": 0},
        "out": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_of_packed_rows_is_that_of_the_rows_alone(tmp_path, attention):
    folder = llama(tmp_path / "base")
    base = base_model.find(ModelConfig.parse({"path": str(folder), "attn_implementation": attention}), tmp_path)
    model = base_model.load(base, "causal").eval()
    write_rows(tmp_path / "rows.jsonl", answers(40))
    section = {"train": str(tmp_path / "rows.jsonl"), "max_length": 40, "validation_fraction": 0}
    collate = Collator(base.tokenizer.pad_token_id)

    def loss(**more):
        loaded = load(DataConfig.parse({**section, **more}), base.tokenizer)
        rows = [*loaded.train.select_columns(["input_ids", "attention_mask", "labels"])]
        with torch.no_grad():
            return float(model(**collate(rows)).loss), loaded

    check_packing(model, base)
    apart, plain = loss()
    together, held = loss(packing=True)
    assert len(held.train) < len(plain.train) / 2
    assert held.counts["train"].tokens == plain.counts["train"].tokens
    assert held.counts["train"].answer_tokens == plain.counts["train"].answer_tokens
    assert together == pytest.approx(apart, rel=1e-5)
    rows = [*held.train.select_columns(["input_ids", "attention_mask", "labels"])]
    with torch.no_grad():
        batch = Collator(0, flat=True)(rows)
        flat = float(model(**batch).loss)
    assert batch["input_ids"].shape == (1, plain.counts["train"].tokens), "nothing is padded"
    assert flat == pytest.approx(apart, rel=1e-5)


def test_a_run_on_packed_rows(tmp_path):
    given = recipe(tmp_path, llama(tmp_path / "base"), packing=True)
    run = weftlora.train(given)
    assert run.data["counts"]["train"]["rows"] < run.data["counts"]["train"]["kept"] == 32
    assert run.steps == -(-run.data["counts"]["train"]["rows"] // 2)
    assert run.metrics["train_loss"] > 0


def test_rows_without_padding_train_the_same_adapter(tmp_path, monkeypatch, caplog):
    """Flash attention needs a GPU; that batches are flat is decided in one place, and sdpa computes on them as well."""
    given = recipe(tmp_path, llama(tmp_path / "base"), packing=True)
    with caplog.at_level("INFO", "weftlora"):
        padded = weftlora.train(given)
        monkeypatch.setattr(prepare, "takes_flat_rows", lambda model: True)
        flat = weftlora.train(given | {"out": str(tmp_path / "flat")})
    said = [line for line in caplog.messages if line.startswith("packed rows: ")]
    assert ["padded to its longest" in line for line in said] == [True, False]
    first, second = (load_file(run.adapter_folder / "adapter_model.safetensors") for run in (padded, flat))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=1e-3)
    assert flat.metrics["tokens"] < padded.metrics["tokens"]


def test_flash_attention_takes_rows_without_padding():
    class Config:
        _attn_implementation = "sdpa"

    class Model:
        config = Config()

    assert not prepare.takes_flat_rows(Model())
    for name in ("flash_attention_2", "kernels-community/flash-attn"):
        Config._attn_implementation = name
        assert prepare.takes_flat_rows(Model())


def test_a_model_that_lets_packed_rows_see_each_other_is_refused(tmp_path, monkeypatch):
    folder = llama(tmp_path / "base")
    kind = type(AutoModelForCausalLM.from_pretrained(folder))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, position_ids=None, **more: forward(self, *args, **more))
    with pytest.raises(
        ConfigError, match=r"data\.packing cannot be used: rows that are packed together see each other"
    ):
        weftlora.train(recipe(tmp_path, folder, packing=True))
    assert not (tmp_path / "run").exists()


def test_rows_of_like_length_can_go_together(tmp_path):
    given = recipe(tmp_path, llama(tmp_path / "base"))
    given["train"]["args"] = {"train_sampling_strategy": "group_by_length"}
    assert weftlora.train(given).status == "complete"
