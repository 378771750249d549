"""HydraLoRA has no exact export; at the mean router output over data it is one LoRA, whose error is measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import weftlora
from families import FAMILIES, randomise
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import MergeError
from weftlora.export import live
from weftlora.export.live import mean_gates

Adapted = Callable[..., PeftModel]
Jobs = list[Mapping[str, Any]]


def batch() -> dict[str, Tensor]:
    return FAMILIES["llama"].batch()


def other() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (3, 5), generator=torch.Generator().manual_seed(9))
    return {"input_ids": ids, "labels": ids}


def test_an_exact_export_is_refused_with_the_reason(adapted: Adapted, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"depends on the token.*mean-gate"):
        weftlora.export_lora(adapted(weftlora.HydraLoraConfig(r=2)), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("router_input", ["x", "Ax"])
def test_the_mean_gate_is_the_mean_over_tokens_that_are_not_padding(router_input: str, adapted: Adapted) -> None:
    model = adapted(weftlora.HydraLoraConfig(r=2, heads=3, router_input=router_input, target_modules=["q_proj"]))
    padded = batch()["input_ids"].clone()
    mask = torch.ones_like(padded)
    mask[1, 4:] = 0
    padded[1, 4:] = 0
    seen: dict[str, list[Tensor]] = {}
    with live.shell(model, ["default"]) as own:
        for layer in (m for m in own.modules() if isinstance(m, WeftLinear)):
            layer.site("default").gate_meter = seen.setdefault(layer.module_name, []).append
        with torch.no_grad():
            own(input_ids=padded, attention_mask=mask)
            own(**other())
        gates = mean_gates(own, ["default"], [{"input_ids": padded, "attention_mask": mask}, other()])["default"]
    assert gates.keys() == seen.keys()
    for name, (first, second) in seen.items():
        tokens = torch.cat([first[0], first[1, :4], second.flatten(0, 1)]).double()
        assert torch.allclose(gates[name], tokens.mean(0), atol=1e-6)
        assert float(gates[name].sum()) == pytest.approx(1, abs=1e-6)


def test_the_export_is_the_adapter_at_its_mean_gates_and_says_what_that_costs(
    adapted: Adapted, in_process: Jobs, tmp_path: Path
) -> None:
    model = adapted(weftlora.HydraLoraConfig(r=2, heads=3, boost=weftlora.Dash(directions=2)))
    with torch.no_grad():  # routers that really choose
        for name, p in model.named_parameters():
            if name.endswith("router"):
                p.mul_(8)
    found = weftlora.export_lora(model, tmp_path / "lora", approximate="mean-gate", data=[other()], inputs=[batch()])
    assert set(found.ranks.values()) == {2}  # A is shared: the rank of one head
    assert found.proof
    assert found.proof.error < 1e-5
    assert found.proof.inputs == "the inputs that were given"
    cost = found.approximation
    assert cost is not None
    assert cost.gates == "the data given"

    from peft import PeftModel as Stock

    base: Any = type(model.get_base_model()).from_pretrained(model.get_base_model().name_or_path)
    with torch.no_grad():
        first, plain = model(**batch()), base(**batch())
        second = Stock.from_pretrained(base, tmp_path / "lora")(**batch())
    far = (first.logits - second.logits).abs().max() / first.logits.abs().max()
    lost = (first.logits - second.logits).norm() / (first.logits - plain.logits).norm()
    assert cost.error == pytest.approx(float(far), rel=1e-3)
    assert cost.lost == pytest.approx(float(lost), rel=1e-3)
    assert cost.error > 1e-3
    for measured, loss in ((cost.loss_live, first), (cost.loss_fixed, second), (cost.loss_base, plain)):
        assert measured == pytest.approx(float(loss.loss), rel=1e-5)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "An approximation" in card
    assert f"{cost.lost:.1%}" in card
    json.dumps(found.record())


def test_where_the_router_does_not_choose_the_mean_gate_loses_nothing(
    adapted: Adapted, in_process: Jobs, tmp_path: Path
) -> None:
    model = adapted(weftlora.HydraLoraConfig(r=2, heads=3))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("router"):
                p.zero_()
    found = weftlora.export_lora(model, tmp_path / "lora", approximate="mean-gate", data=[batch()])
    assert found.approximation
    assert found.approximation.error < 1e-5
    assert all(g == pytest.approx([1 / 3] * 3) for g in found.approximation.mean_gate.values())


def test_unproved_it_is_written_and_says_so(adapted: Adapted, tmp_path: Path) -> None:
    model = adapted(weftlora.HydraLoraConfig(r=2))
    found = weftlora.export_lora(model, tmp_path / "lora", approximate="mean-gate", data=[batch()], verify=False)
    assert found.proof is None
    assert "Not verified" in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.parametrize("length", [5, 6])
def test_in_an_encoder_decoder_each_router_counts_the_tokens_of_its_own_side(length: int) -> None:
    model = get_peft_model(FAMILIES["t5"].build(), weftlora.HydraLoraConfig(r=2, heads=3, target_modules=["q", "k"]))
    randomise(model)
    ids, labels = FAMILIES["t5"].batch()["input_ids"][:, :6], FAMILIES["t5"].batch()["input_ids"][:, :length].clone()
    mask = torch.ones_like(ids)
    mask[1, 4:], labels[0, 2:] = 0, -100
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    seen: dict[str, Tensor] = {}
    with live.shell(model, ["default"]) as own:
        for layer in (m for m in own.modules() if isinstance(m, WeftLinear)):
            layer.site("default").gate_meter = lambda omega, name=layer.module_name: seen.update({name: omega})
        with torch.no_grad():
            own(**given)
        gates = mean_gates(own, ["default"], [given])["default"]
    assert len(seen) == len(gates) > 8
    for name, omega in seen.items():
        reads_encoder = not name.startswith("decoder") or "EncDecAttention.k" in name
        if reads_encoder and name.startswith("decoder") and length == 6:
            continue  # equal lengths do not tell the keys of cross-attention from the rest
        kept = mask.bool() if reads_encoder else labels != -100
        assert torch.allclose(gates[name], omega[kept].double().mean(0), atol=1e-6), name
