"""Models that see, hear, speak or paint, one tiny example of each: adapted by default, trained a step, saved and loaded again."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import weftlora
from weftlora.adapted.layer import WeftLinear

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    model = ViTForImageClassification(ViTConfig(**SIZE, image_size=8, patch_size=4, num_labels=3))
    return model, {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    parts = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(vocab_size=64, d_model=16, num_mel_bins=8, max_source_positions=10, **parts, **tokens)
    return WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(2, 8, 20),
        "labels": torch.tensor([[5, 6], [7, 2]]),
    }


def qwen2_vl() -> tuple[nn.Module, dict[str, Tensor]]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SIZE, "vocab_size": 64, "num_key_value_heads": 2, "rope_scaling": rope, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
    special = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))
    ids = torch.tensor([[3, 62, 60, 63, 5, 6]])
    seen = {"pixel_values": torch.randn(4, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    return model, {"input_ids": ids, "labels": ids, "mm_token_type_ids": (ids == 60).long(), **seen}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "vit": vit,
    "whisper": whisper,
    "qwen2-vl": qwen2_vl,
}


def run(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    torch.manual_seed(0)
    return model(**batch)


@pytest.mark.parametrize("recipe", [weftlora.HydraLoraConfig, weftlora.TiedLoraConfig])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_sees_or_hears_is_adapted_trained_and_loaded(name: str, recipe: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, batch = MODELS[name]()
    expected = run(copy.deepcopy(base).eval(), batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), recipe(r=2))
    adapted = [name for name, module in model.named_modules() if isinstance(module, WeftLinear)]
    assert adapted
    if name == "qwen2-vl":
        assert all(".language_model." in each for each in adapted)
    assert torch.allclose(run(model.eval(), batch).logits, expected, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = run(model.train(), batch).loss
    for _ in range(3):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            run(model, batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not [w for w in heard if "no gradient" in str(w.message)]
    assert run(model, batch).loss < before
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(run(again, batch).logits, run(model, batch).logits)


def test_a_decoder_of_whisper_alone_names_the_modules_that_train_nothing() -> None:
    """Where the encoder's output is given, its layers are not called."""
    torch.manual_seed(0)
    base, batch = whisper()
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=2))
    seen = model.get_base_model().model.encoder(batch["input_features"]).last_hidden_state.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.get_base_model()(encoder_outputs=(seen,), labels=batch["labels"]).loss.backward()
    with pytest.warns(
        UserWarning, match=r"12 of the 32 modules .* had no gradient in the first step: model.encoder.layers"
    ):
        optimizer.step()


def test_a_unet_paints_with_every_recipe(tmp_path: Path) -> None:
    """Attention processors call the adapted projections; its convolutions are adapted where they are named."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    base = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    image, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
    expected = base(image, 1, text).sample
    for recipe in (weftlora.PlainLoraConfig, weftlora.HydraLoraConfig, weftlora.TiedLoraConfig):
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
        model = get_peft_model(copy.deepcopy(base), recipe(r=2, target_modules=targets))
        assert torch.allclose(model(image, 1, text).sample, expected, atol=1e-5)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.add_(torch.randn_like(p) / 10)
        model(image, 1, text).sample.square().sum().backward()
        assert all(p.grad is not None for p in trained)
        model.save_pretrained(tmp_path / recipe.__name__)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / recipe.__name__).eval()
        assert torch.equal(again(image, 1, text).sample, model(image, 1, text).sample)
        assert not torch.allclose(again(image, 1, text).sample, expected, atol=1e-3)


def test_a_diffusion_transformer_takes_the_weight_that_diffusers_gives_its_adapters() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    given = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([1]), "class_labels": torch.tensor([2])}
    before = model(**given).sample
    peft_utils = importlib.import_module("diffusers.utils.peft_utils")
    model = get_peft_model(
        model, weftlora.HydraLoraConfig(r=2, heads=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    whole = model(**given).sample
    assert not torch.allclose(whole, before, atol=1e-3)
    peft_utils.set_weights_and_activate_adapters(model, ["default"], [0.0])
    assert torch.equal(model(**given).sample, before)
    peft_utils.set_weights_and_activate_adapters(model, ["default"], [1.0])
    with torch.no_grad():
        peft_utils.scale_lora_layers(model, 0.5)
        assert not torch.allclose(model(**given).sample, whole, atol=1e-4)
        peft_utils.unscale_lora_layers(model, 0.5)
    assert torch.equal(model(**given).sample, whole)
