"""Exports of experts: the layout that stock peft reads, and modules whose names it would change."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import weftlora
from weftlora import Hydra, Reallocate, WeftConfig
from weftlora.errors import MergeError
from weftlora.export.factors import Pair, Stack
from weftlora.host.stock_lora import renamed_targets

SIDES = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2,
}  # fmt: skip
IDS = torch.arange(24).view(2, 12) * 7 % 32


def qwen() -> nn.Module:
    """Experts [E, out, in] in the second block, a dense MLP, whose modules stock peft would rename, in the first."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIDES, intermediate_size=24, moe_intermediate_size=12, num_experts=4, mlp_only_layers=[0])
    return Qwen3MoeForCausalLM(config).eval()


def gpt_oss() -> nn.Module:
    """Transposed experts, with biases."""
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIDES, intermediate_size=12, num_local_experts=4, sliding_window=8)).eval()


def llama4() -> nn.Module:
    """Transposed experts without a flag that says so: stock peft takes their sides for one another."""
    torch.manual_seed(0)
    own = {"intermediate_size": 12, "intermediate_size_mlp": 24, "num_local_experts": 4, "moe_layers": [1]}
    return Llama4ForCausalLM(Llama4TextConfig(**SIDES, **own, pad_token_id=0)).eval()


def adapted(make: Any, **fields: Any) -> nn.Module:
    model = get_peft_model(make(), WeftConfig(r=3, init_lora_weights=False, **fields)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("structure.B"):
                p.mul_(0.1)
    return model


@pytest.mark.parametrize("make", [qwen, gpt_oss, llama4])
def test_stock_peft_in_this_process_computes_the_export(make: Any, tmp_path: Path) -> None:
    """What the proof does in a process of its own, without its seconds: the tensors into a stock model of that config."""
    model = adapted(make, rank_pattern={"experts.down_proj.2": 5})
    export = weftlora.export_lora(model, tmp_path / "lora", verify=False)
    last = f"model.layers.1.{'feed_forward' if make is llama4 else 'mlp'}.experts."
    assert export.ranks[last + "down_proj"] == 5
    assert export.ranks[last + "gate_up_proj"] == 3
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    stock = get_peft_model(make(), LoraConfig.from_pretrained(str(tmp_path / "lora"))).eval()
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    own = stock.state_dict()
    placed = {name.replace(".weight", ".default.weight"): value for name, value in tensors.items()}
    assert placed.keys() == {name for name in own if ".lora_" in name}
    stock.load_state_dict(placed, strict=False)
    wrapped = {m.parameter_name for m in stock.modules() if isinstance(m, ParamWrapper)}
    assert {"gate_up_proj", "down_proj"} <= wrapped
    assert said["target_parameters"] == sorted(said["target_parameters"])
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-6)


def test_modules_that_stock_peft_would_rename_are_told_as_parameters(tmp_path: Path) -> None:
    model = adapted(qwen)
    assert {"gate_proj", "up_proj", "down_proj"} <= renamed_targets(model.get_base_model())
    weftlora.export_lora(model, tmp_path / "lora", verify=False)
    said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert "model.layers.0.mlp.down_proj.weight" in said["target_parameters"]
    assert not any(name.endswith("_proj.weight") for name in said["target_modules"])
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" in load_file(
        tmp_path / "lora" / "adapter_model.safetensors"
    )


def test_names_that_stock_peft_changes_on_load_are_written_as_it_reads_them(tmp_path: Path) -> None:
    kind = getattr(transformers, "LagunaForCausalLM", None)
    if kind is None:
        pytest.skip("this transformers has no family whose shared experts are renamed on load")
    torch.manual_seed(0)
    own = {"num_experts": 4, "intermediate_size": 24, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8}
    made = kind(kind.config_class(**SIDES, **own, mlp_only_layers=[0])).eval()
    model = adapted(lambda: copy.deepcopy(made))
    weftlora.export_lora(model, tmp_path / "lora", verify=False, base="memory")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        stock = PeftModel.from_pretrained(made, str(tmp_path / "lora")).eval()
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-6)


def test_a_stack_is_the_matrices_of_its_experts() -> None:
    pairs = tuple(Pair(torch.randn(r, 6).double(), torch.randn(5, r).double()) for r in (2, 0, 3))
    stack = Stack(pairs).padded(4)
    assert (stack.rank, stack.a.shape, stack.b.shape) == (4, (12, 6), (5, 12))
    a, b = stack.a.view(3, 4, 6), stack.b.view(5, 4, 3)
    for e, pair in enumerate(pairs):
        torch.testing.assert_close(b[:, :, e] @ a[e], pair.delta())


def test_an_adapter_that_cannot_leave_says_so_before_it_is_trained(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be exported later, at its mean gate neither"):
        model = get_peft_model(qwen(), WeftConfig(r=3, structure=Hydra(heads=2)))
    with pytest.raises(MergeError, match="routers are not approximated"):
        weftlora.export_lora(model, tmp_path / "lora", approximate="mean-gate", data=[{"input_ids": IDS}])


@pytest.mark.slow
@pytest.mark.parametrize("make", [qwen, gpt_oss])
def test_the_proof_holds_for_moved_ranks(make: Any, tmp_path: Path) -> None:
    model = adapted(make, ranks=Reallocate(score="random", first=1, every=1, max_rounds=1, move=4))
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-3))
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    export = weftlora.export_lora(model, tmp_path / "lora", inputs=[{"input_ids": IDS}])
    assert export.proof is not None
    assert export.proof.error < 1e-5 < export.proof.adapter_effect
    merged = weftlora.merge(model, tmp_path / "merged", inputs=[{"input_ids": IDS}])
    assert merged.proof is not None
    assert merged.proof.error < 1e-5


class Sixteenths(nn.Module):
    """A parametrisation as bitsandbytes makes one of experts: whole numbers are kept, and their sixteenths computed with."""

    def forward(self, kept: torch.Tensor) -> torch.Tensor:
        return kept.float() / 16


@pytest.mark.filterwarnings("ignore:Could not find any LoRA")
def test_stock_peft_computes_no_experts_in_4_bits_twice_so_exports_are_for_the_plain_base(tmp_path: Path) -> None:
    """Why docs/experts.md says so. On a parameter that torch's parametrisation computes, stock peft 0.21 nests the parameters of a
    module in another order, and leaves its ΔW in the parameter after each forward: the second one has it twice."""
    model = adapted(gpt_oss, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    weftlora.export_lora(model, tmp_path / "lora", verify=False)
    config = LoraConfig.from_pretrained(str(tmp_path / "lora"))
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    base = gpt_oss()
    for layer in base.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            whole = (getattr(layer.mlp.experts, name).detach() * 16).round().to(torch.int8)
            setattr(layer.mlp.experts, name, nn.Parameter(whole, requires_grad=False))
            parametrize.register_parametrization(layer.mlp.experts, name, Sixteenths(), unsafe=True)
    stock = get_peft_model(base, config).eval()
    shapes = {n.replace(".default", ""): p.shape for n, p in stock.state_dict().items() if ".lora_" in n}
    assert shapes.keys() == tensors.keys()
    assert shapes != {name: value.shape for name, value in tensors.items()}, (
        "the names mean what they do on a plain base"
    )
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if ".lora_" in name:
                p.normal_(std=0.2)
        one, two = stock(IDS).logits, stock(IDS).logits
    assert not torch.allclose(one, two), "stock peft takes its ΔW out again: exports for such bases can be offered"
