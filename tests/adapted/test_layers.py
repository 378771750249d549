"""The axis `layers` in a host: which sites exist, and where their gates act."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from dashing import sites
from peft import PeftModel, get_peft_model
from torch import nn

import weftlora
from families import FAMILIES, STRUCTURES, PlainNet, adapter_config, logits, randomise
from weftlora.adapted.targets import Blocks
from weftlora.errors import ConfigError, TargetError


def full(structure: str, family: str, **fields) -> weftlora.WeftConfig:
    """The config of a cell without its head, which is in no block."""
    excluded = fields.pop("exclude_modules", [*FAMILIES[family].modules_to_save])
    config = adapter_config(structure, family, heads_too=False, **fields)
    config.exclude_modules = set(excluded) or None
    return config


@pytest.mark.parametrize("family", list(FAMILIES))
def test_only_adapts_every_target_of_its_blocks_and_nothing_else(family: str):
    base = FAMILIES[family].build()
    everywhere = sites(get_peft_model(FAMILIES[family].build(), full("plain", family)))
    model = get_peft_model(base, full("plain", family, layers=[1]))
    plain = FAMILIES[family].build()
    blocks = Blocks(plain)
    assert set(sites(model)) == {n for n in everywhere if blocks.of(n) is not None and blocks.number[blocks.of(n)] == 1}


def test_t5s_decoder_blocks_are_numbered_after_the_encoders():
    base = FAMILIES["t5"].build()
    assert Blocks(base).names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    model = get_peft_model(base, full("plain", "t5", layers=[2]))
    assert all(name.startswith("decoder.block.0.") for name in sites(model))


def test_a_block_that_is_listed_twice_counts_once():
    net = PlainNet()
    net.layers = nn.ModuleList([net.layers[0], net.layers[1], net.layers[0]])
    assert Blocks(net).names == ["layers.0", "layers.1"]


def test_lists_of_linear_modules_are_no_blocks():
    net = PlainNet()
    net.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert Blocks(net).names == ["layers.0", "layers.1"]


def test_names_of_blocks_and_modules_work_as_well_as_numbers(llama: nn.Module):
    model = get_peft_model(llama, full("plain", "llama", layers=["model.layers.1", "model.layers.0.mlp.up_proj"]))
    found = sites(model)
    assert "model.layers.0.mlp.up_proj" in found
    assert len(found) == 8


@pytest.mark.parametrize(
    ("layers", "message"),
    [([2], "has 2 blocks"), (["model.layer.1"], "model.layers.1"), (["lm_head"], "no module is targeted")],
)
def test_a_block_that_adapts_nothing_is_refused_before_the_model_is_touched(llama: nn.Module, layers, message: str):
    with pytest.raises(TargetError, match=message):
        get_peft_model(llama, full("plain", "llama", layers=layers))
    assert not [name for name, _ in llama.named_modules() if "weftlora" in name]


def test_only_and_layers_to_transform_together_are_refused():
    with pytest.raises(ConfigError, match="keep one"):
        weftlora.PlainLoraConfig(layers=[0], layers_to_transform=[0])


def test_only_works_with_a_regex_of_targets(llama: nn.Module):
    model = get_peft_model(llama, weftlora.PlainLoraConfig(target_modules=r".*\.(q|v)_proj", layers=[1]))
    assert set(sites(model)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_all_blocks_named_is_plain_training_and_survives_saving(structure: str, tmp_path: Path):
    batch = FAMILIES["llama"].batch()
    models = []
    for layers in (weftlora.All(), weftlora.Only([0, 1])):
        torch.manual_seed(3)
        model = get_peft_model(FAMILIES["llama"].build(), full(structure, "llama", layers=layers))
        randomise(model)
        models.append(model)
    assert torch.equal(logits(models[0], batch), logits(models[1], batch))
    models[1].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers"] == {
        "kind": "only",
        "blocks": [0, 1],
        "gated": False,
    }
    again = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
    assert torch.equal(logits(again, batch), logits(models[1], batch))


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_a_search_starts_as_its_structure_without_it_bit_for_bit(structure: str):
    batch = FAMILIES["llama"].batch()
    found = []
    for layers in (weftlora.All(), weftlora.Search()):
        torch.manual_seed(3)
        model = get_peft_model(FAMILIES["llama"].build(), full(structure, "llama", layers=layers))
        randomise(model)
        found.append(logits(model, batch))
    assert torch.equal(*found)


@pytest.mark.parametrize("structure", ["plain", "hydra", "tied_tl6"])
def test_doubling_one_gate_doubles_that_blocks_branch_alone(structure: str):
    torch.manual_seed(3)
    config = full(structure, "plain", layers=weftlora.Search(), r=2, exclude_modules=["embed", "head"])
    model = get_peft_model(PlainNet(), config).double().eval()
    randomise(model)
    for name, site in sites(model).items():
        x_in = torch.randn(5, site.factors().A.shape[1], dtype=torch.float64)
        zero = torch.zeros(5, site.factors().B.shape[0], dtype=torch.float64)
        once = site(x_in, zero)
        site.layer_gate = torch.tensor(2.0, dtype=torch.float64)
        torch.testing.assert_close(site(x_in, zero), 2 * once, rtol=1e-12, atol=0, msg=name)
        site.layer_gate = torch.ones((), dtype=torch.float64)


def test_training_a_search_without_searching_is_refused(llama: nn.Module):
    model = get_peft_model(llama, full("plain", "llama", layers="search")).train()
    with pytest.raises(ConfigError, match="search_layers"):
        model(**FAMILIES["llama"].batch())
    assert logits(model, FAMILIES["llama"].batch()).isfinite().all()


def test_a_search_of_one_block_is_refused(llama: nn.Module):
    with pytest.raises(TargetError, match="1 blocks"):
        get_peft_model(
            llama, full("plain", "llama", layers="search", layers_to_transform=[1], target_modules=["q_proj"])
        )


def test_a_module_outside_of_all_blocks_is_left_out_of_a_search_with_a_warning():
    config = weftlora.PlainLoraConfig(layers=weftlora.Search(), exclude_modules=["classifier"])
    with pytest.warns(UserWarning, match=r"bert.pooler.dense"):
        model = get_peft_model(FAMILIES["bert"].build(), config)
    assert not any("pooler" in name for name in sites(model))
    everything = weftlora.PlainLoraConfig(layers=weftlora.Search(granularity="module"), exclude_modules=["classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert "bert.pooler.dense" in sites(get_peft_model(FAMILIES["bert"].build(), everything))
