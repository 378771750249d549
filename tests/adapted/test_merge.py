"""Merging: exact in the base's dtype, undone bit for bit, all or nothing, and refused where no weight can hold it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import weftlora
from families import FAMILIES, STRUCTURES, adapter_config, logits, randomise
from weftlora.adapted.layer import WeftLinear

MERGEABLE = ["plain", "tied_tl6", "tied_tl5_shape", "tied_tl6_fused", "tied_vera", "tied_Bu"]
BATCH = FAMILIES["llama"].batch()


def trained(structure: str = "plain", base: nn.Module | None = None, **fields) -> PeftModel:
    model = get_peft_model(base or FAMILIES["llama"].build(), adapter_config(structure, "llama", **fields))
    randomise(model)
    return model.eval()


def layers(model: nn.Module) -> list[WeftLinear]:
    return [m for m in model.modules() if isinstance(m, WeftLinear)]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def equal(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n].nan_to_num(), before[n].nan_to_num()) for n in before)


def test_the_table_of_mergeable_structures_is_complete() -> None:
    routed = {name for name in STRUCTURES if not layers(trained(name))[0].site("default").mergeable}
    assert routed == set(STRUCTURES) - set(MERGEABLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("structure", MERGEABLE)
def test_a_16_bit_base_is_merged_with_one_rounding_and_restored_bit_for_bit(structure: str, dtype) -> None:
    model = trained(structure, FAMILIES["llama"].build().to(dtype))
    before, expected = snapshot(model), logits(model, BATCH)
    model.merge_adapter()
    for layer in layers(model):
        full = layer._kept.float() + layer.get_delta_weight("default")
        assert torch.equal(layer.base_layer.weight, full.to(dtype))
        assert layer._kept.nbytes == layer.base_layer.weight.nbytes  # the stated memory cost of a merge
    assert torch.allclose(logits(model, BATCH).float(), expected.float(), atol=0.05)
    model.unmerge_adapter()
    assert equal(model, before)
    assert torch.equal(logits(model, BATCH), expected)
    assert all(layer._kept is None for layer in layers(model))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_update_has_the_layout_of_the_base_weight(family: str) -> None:
    model = get_peft_model(FAMILIES[family].build(), adapter_config("plain", family))
    randomise(model)
    for layer in layers(model):
        f = layer.site("default").factors()
        delta = f.scale * f.B @ f.A
        assert torch.allclose(layer.get_delta_weight("default"), delta.T if family == "gpt2" else delta, atol=1e-6)
        assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape


@pytest.mark.parametrize("last", [0, -1])
def test_safe_merge_of_a_diverged_adapter_changes_nothing_anywhere(last: int) -> None:
    model = trained()
    layers(model)[last].site("default").structure.A.data[0, 0] = float("nan")
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(weftlora.MergeError, match="not finite, so nothing was merged"):
            merge(safe_merge=True)
        assert equal(model, before)
        assert not any(layer.merged for layer in layers(model))
        assert len(layers(model)) == 14
    model.merge_adapter()  # without the check it is the user's word
    assert all(layer.merged for layer in layers(model))


def test_a_good_adapter_passes_the_safe_merge() -> None:
    model = trained()
    expected = logits(model, BATCH)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model, BATCH), expected, atol=1e-5)


def test_merge_and_unload_keeps_no_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    adapted, kept = layers(model), []
    merge = WeftLinear.merge
    monkeypatch.setattr(WeftLinear, "merge", lambda self, *a, **k: (merge(self, *a, **k), kept.append(self._kept)))
    merged = model.merge_and_unload()
    assert kept == [None] * len(adapted)
    assert not layers(merged)
    assert not [n for n in merged.state_dict() if "weftlora" in n]
    assert not hasattr(merged, "peft_config")


@pytest.mark.parametrize("structure", MERGEABLE)
def test_two_adapters_merge_together_or_one_after_the_other(structure: str) -> None:
    model = trained(structure)
    model.add_adapter("second", adapter_config(structure, "llama"))
    model.set_adapter("second")
    randomise(model, seed=8)
    model.base_model.set_adapter(["default", "second"])
    before, both = snapshot(model), logits(model, BATCH)
    model.merge_adapter(["default", "second"])
    assert torch.allclose(logits(model, BATCH), both, atol=1e-5)
    model.unmerge_adapter()
    assert equal(model, before)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    assert torch.allclose(logits(model, BATCH), both, atol=1e-5)
    model.unmerge_adapter()
    assert equal(model, before)


def test_one_routed_adapter_among_two_keeps_both_unmerged() -> None:
    model = trained("plain")
    model.add_adapter("routed", adapter_config("hydra", "llama", target_modules=["down_proj"]))
    model.base_model.set_adapter(["default", "routed"])
    before = snapshot(model)
    with pytest.raises(weftlora.MergeError, match="the update depends on the token"):
        model.merge_adapter()
    assert equal(model, before)
    assert not any(layer.merged for layer in layers(model))
    model.merge_adapter(["default"])
    assert all(layer.merged_adapters == ["default"] for layer in layers(model))


def test_tied_embeddings_that_are_no_target_stay_tied() -> None:
    model = trained(base=FAMILIES["llama"].build(tie_word_embeddings=True), target_modules=["q_proj"])
    expected = logits(model, BATCH)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, BATCH), expected, atol=1e-5)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_disabling_a_merged_adapter_gives_the_base_and_loses_nothing() -> None:
    model = trained()
    expected = logits(model, BATCH)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, BATCH), logits(FAMILIES["llama"].build(), BATCH))
    assert torch.equal(logits(model, BATCH), expected)


def test_a_merged_adapter_cannot_be_deleted() -> None:
    model = trained()
    model.add_adapter("second", adapter_config("plain", "llama"))
    model.merge_adapter()
    merged = logits(model, BATCH)
    with pytest.raises(ValueError, match="unmerge them first"):
        model.delete_adapter("default")
    assert torch.equal(logits(model, BATCH), merged)
    model.unmerge_adapter()
    model.delete_adapter("default")


def test_another_adapter_is_set_only_after_unmerging() -> None:
    model = trained()
    model.add_adapter("second", adapter_config("plain", "llama"))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.set_adapter("second")
    assert torch.equal(logits(model, BATCH), logits(FAMILIES["llama"].build(), BATCH))


def test_unload_gives_the_base_back_also_from_a_merged_state() -> None:
    for merge_first in (False, True):
        model = trained()
        if merge_first:
            model.merge_adapter()
        assert torch.equal(logits(model.unload(), BATCH), logits(FAMILIES["llama"].build(), BATCH))


def test_merge_and_unload_after_a_merge_does_not_merge_twice() -> None:
    model = trained()
    expected = logits(model, BATCH)
    model.merge_adapter()
    assert torch.allclose(logits(model.merge_and_unload(), BATCH), expected, atol=1e-5)


def test_what_is_saved_while_merged_is_the_adapter_alone(tmp_path: Path) -> None:
    model = trained()
    expected = logits(model, BATCH)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path), BATCH), expected)


def test_a_merged_model_can_be_copied_cast_and_still_unmerged() -> None:
    model = trained()
    expected = logits(model, BATCH)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    copied.unmerge_adapter()
    assert torch.equal(logits(copied, BATCH), expected)
    model.double()
    model.unmerge_adapter()
    base = FAMILIES["llama"].build().double()
    with model.disable_adapter():
        assert torch.equal(logits(model, BATCH), logits(base, BATCH))


class Doubled(nn.Linear):
    """A linear module that does more than x Wᵀ + b."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_linear_with_a_forward_of_its_own_is_not_merged() -> None:
    model = get_peft_model(nn.Sequential(Doubled(4, 4)), weftlora.PlainLoraConfig(r=2, target_modules=["0"]))
    randomise(model)
    with pytest.raises(weftlora.MergeError, match="0 is a Doubled"):
        model.merge_adapter()


class Quantised(nn.Module):
    """A base layer as quantisers make them: whole-number weight, called but never read."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.weight = nn.Parameter(torch.randint(-8, 8, (4, 6), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) / 8)


@pytest.mark.parametrize("structure", ["plain", "hydra", "tied_tl6"])
def test_a_quantised_base_is_adapted_but_never_merged(structure: str) -> None:
    base = nn.Sequential(Quantised())
    x = torch.randn(3, 6)
    expected = base(x)
    model = get_peft_model(base, STRUCTURES[structure](r=2, target_modules=["0"]))
    assert torch.equal(model(x), expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    randomise(model)
    model(x).sum().backward()
    before = snapshot(model)
    with pytest.raises(weftlora.MergeError):
        model.merge_adapter()
    assert equal(model, before)
    if structure != "hydra":
        with pytest.raises(weftlora.MergeError, match="load the base model unquantised"):
            model.merge_and_unload()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_merge_into_a_tied_embedding_leaves_the_other_as_it_was(target: str) -> None:
    base = FAMILIES["llama"].build(tie_word_embeddings=True)
    before = base.get_input_embeddings().weight.detach().clone()
    model = get_peft_model(
        base, weftlora.PlainLoraConfig(r=2, target_modules=[target, "q_proj"], init_lora_weights=False)
    )
    batch = FAMILIES["llama"].batch()
    expected = logits(model, batch)
    model.merge_adapter()
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), expected)
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    assert inputs.weight is outputs.weight
    assert torch.equal(inputs.weight, before)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, batch), expected, atol=1e-5)
    assert not merged.config.tie_word_embeddings
