"""Bases beside a plain decoder: mixtures of experts, whichever of the two ways this transformers offers, and bases in fewer bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import weftlora

IDS = torch.arange(3, 19).reshape(2, 8)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.contiguous()


def door() -> bool:
    """Whether this transformers lets experts be computed by a function of another package."""
    try:
        return hasattr(importlib.import_module("transformers.integrations.moe"), "ALL_EXPERTS_FUNCTIONS")
    except ImportError:
        return False


@pytest.fixture
def mixture() -> GptOssForCausalLM:
    """A tiny gpt-oss, the one fused mixture that every version claimed has."""
    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, head_dim=8, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, pad_token_id=0,
        )
    )  # fmt: skip


def test_experts_train_come_back_and_leave_as_stock_lora(
    mixture: GptOssForCausalLM, train: Callable[..., None], tmp_path: Path
) -> None:
    mixture.save_pretrained(tmp_path / "base")
    before = logits(mixture)
    model = get_peft_model(mixture, weftlora.PlainLoraConfig(r=2, target_parameters=EXPERTS))
    torch.testing.assert_close(logits(model), before)
    train(model)
    found = logits(model)
    assert not torch.allclose(found, before)
    model.save_pretrained(str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))), found)
    weftlora.export_lora(model, tmp_path / "lora", verify=False)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "lora"))
    assert type(stock.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(stock), found, rtol=1e-3, atol=1e-4)


def test_a_router_per_token_needs_the_door_and_says_so_where_there_is_none(
    mixture: GptOssForCausalLM, train: Callable[..., None]
) -> None:
    config = weftlora.HydraLoraConfig(r=2, target_parameters=EXPERTS)
    if not door():
        with pytest.raises(weftlora.TargetError, match=r"has no door for an experts function .* router per token"):
            get_peft_model(mixture, config)
        return
    before = logits(mixture)
    model = get_peft_model(mixture, config)
    train(model)
    assert not torch.allclose(logits(model), before)


FORMS: dict[str, tuple[str, Callable[[], Any]]] = {
    "nf4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao": ("torchao", lambda: _torchao()),
}


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_base_trains_ranks_directions_comes_back_and_exports(
    form: str, train: Callable[..., None], needs: Callable[..., None], tmp_path: Path
) -> None:
    package, config = FORMS[form]
    needs(package)
    torch.manual_seed(0)
    sides = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # blocks of 64 fit
    LlamaForCausalLM(LlamaConfig(**sides, num_attention_heads=2, pad_token_id=0)).save_pretrained(tmp_path / "base")

    def quantised() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config(), dtype=torch.float32
        )

    model = get_peft_model(quantised(), weftlora.LoraTsdConfig(r=2, directions=2, after=2))
    weftlora.attach(model, total_steps=3)
    train(model)
    found = logits(model)
    with model.disable_adapter():
        bare = logits(model)
    assert not torch.allclose(bare, found)
    happened = [e["event"] for s in weftlora.state_dict(model).values() for e in s["events"]]
    assert {"dash_launch", "start_switch"} <= set(happened)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(PeftModel.from_pretrained(quantised(), str(tmp_path / "adapter"))), found)
    weftlora.export_lora(model, tmp_path / "lora", verify=False, base="memory")
    stock = PeftModel.from_pretrained(
        quantised(), str(tmp_path / "lora")
    ).train()  # evaluated, bitsandbytes rounds more
    with torch.no_grad():
        off = (stock(input_ids=IDS).logits - found).norm() / (found - bare).norm()
    assert off < (
        0.1 if form == "int8" else 1e-3
    )  # int8 rounds x too, so a sum in another order is rounded to another step
