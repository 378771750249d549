"""Ten families of transformers that stand for their kinds, each with one recipe: what `make families` finds of all of them.

A family goes through every check of `scripts/model_families.py`; one that a kind does not have (tokens of an encoder) gives None.
"""

from __future__ import annotations

import model_families
import pytest
import torch

pytestmark = pytest.mark.grid

STANDS_FOR = {
    "causal": ("causal", "opt", "OPTForCausalLM", "alora"),
    "grouped queries": ("causal", "qwen3", "Qwen3ForCausalLM", "tied_lora"),
    "latent attention": ("causal", "deepseek_v3", "DeepseekV3ForCausalLM", "lora_tsd"),
    "mixture of experts": ("causal", "mixtral", "MixtralForCausalLM", "lora_init"),
    "state space": ("causal", "mamba", "MambaForCausalLM", "lora_dash"),
    "sequence to sequence": ("seq2seq", "t5", "T5ForConditionalGeneration", "flexora"),
    "encoder": ("encoder", "bert", "BertForMaskedLM", "hydralora"),
    "vision": ("vision", "vit", "ViTForImageClassification", "lora"),
    "speech": ("speech", "whisper", "WhisperForConditionalGeneration", "lora_tsd"),
    "vision and language": ("vision and language", "llava", "LlavaForConditionalGeneration", "alora"),
}
"""Kind → its row in `model_families`, and the recipe: all eight are there."""
NO_TOKENS = ("encoder", "vision", "sequence to sequence")
"""Kinds whose small model does not generate, with or without an adapter."""


@pytest.mark.parametrize("stands_for", STANDS_FOR)
def test_a_family_that_stands_for_its_kind_passes_every_check(stands_for: str) -> None:
    kind, family, name, recipe = STANDS_FOR[stands_for]
    base = model_families.built(family, name)
    given = model_families.inputs_of(base, kind)
    with torch.no_grad():
        assert torch.isfinite(model_families.logits(base, given)).all()
    found = model_families.cell(base, given, model_families.recipes(base)[recipe])
    said = {check: found.get(check) for check in model_families.CHECKS}
    if recipe == "hydralora":
        assert "depends on the token" in str(said.pop("export"))
    if stands_for in NO_TOKENS:
        assert said.pop("generate") is None
    assert said == dict.fromkeys(said, True), found.get("at")
    assert found["modules"] > 0


def test_every_recipe_stands_there() -> None:
    base = model_families.built("opt", "OPTForCausalLM")
    assert {recipe for *_, recipe in STANDS_FOR.values()} == model_families.recipes(base).keys()
