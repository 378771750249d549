"""A classifier whose checkpoint lacks its pooler: loading draws it at random, so it leaves with the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification

import weftlora
from families import FAMILIES, logits, randomise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model: no pooler and no classifier in it."""
    folder = tmp_path_factory.mktemp("bert") / "mlm"
    config = FAMILIES["bert"].build().config
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def model(folder: Path, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification.from_pretrained(folder, num_labels=3).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
def test_a_pooler_that_was_drawn_comes_along_with_its_update(
    targets: Any, checkpoint: Path, in_process: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    config = weftlora.PlainLoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])
    adapted = get_peft_model(model(checkpoint, 1), config)
    randomise(adapted)
    found = weftlora.export_lora(adapted.eval(), tmp_path / "lora")
    assert found.proof is not None
    assert found.proof.error < 1e-5
    assert found.whole_modules == ["bert.pooler.dense", "classifier"]
    assert not [name for name in found.ranks if "pooler" in name]
    stock = PeftModel.from_pretrained(model(checkpoint, 2), tmp_path / "lora").eval()
    expected = logits(adapted, FAMILIES["bert"].batch())
    assert torch.allclose(logits(stock, FAMILIES["bert"].batch()), expected, atol=1e-5)
    pooler = load_file(tmp_path / "lora" / "adapter_model.safetensors")["base_model.model.bert.pooler.dense.weight"]
    layer: Any = adapted.get_base_model().bert.pooler.dense
    assert torch.equal(pooler, layer.weight) == (targets != "all-linear")


def test_a_checkpoint_that_has_its_pooler_keeps_it(in_process: list[Mapping[str, Any]], tmp_path: Path) -> None:
    FAMILIES["bert"].build().save_pretrained(tmp_path / "bert")
    adapted = get_peft_model(model(tmp_path / "bert", 1), weftlora.PlainLoraConfig(r=2, modules_to_save=["classifier"]))
    randomise(adapted)
    found = weftlora.export_lora(adapted.eval(), tmp_path / "lora")
    assert found.whole_modules == ["classifier"]
    assert "bert.pooler.dense" in found.ranks


def test_a_classifier_of_tokens_has_as_many_labels_where_the_proof_runs(
    checkpoint: Path, in_process: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    base = BertForTokenClassification.from_pretrained(checkpoint, num_labels=5)
    adapted = get_peft_model(base, weftlora.PlainLoraConfig(r=2, task_type="TOKEN_CLS", target_modules=["query"]))
    randomise(adapted)
    found = weftlora.export_lora(adapted.eval(), tmp_path / "lora")
    assert found.proof is not None
    assert found.proof.error < 1e-5
    assert found.whole_modules == ["classifier"]
    assert "num_labels=5" in (tmp_path / "lora" / "README.md").read_text()
