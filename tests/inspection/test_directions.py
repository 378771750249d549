"""`weftlora.directions` on folders: bases, adapters, runs, full fine-tunes, as a user has them on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import weftlora
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import AdapterError, ModelError
from weftlora.inspection.core_directions import DirectionsReport


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return tiny_bases.llama(tmp_path / "base")


def save_adapter(base: Path, folder: Path, seed: int, **fields: Any) -> Path:
    """A LoRA adapter with random factors."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), weftlora.PlainLoraConfig(r=2, **fields))
    for name, p in model.named_parameters():
        if name.endswith("structure.B"):
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    """The adapter merged into its base: a whole fine-tuned model."""
    model = weft_model(base, adapter).merge_and_unload()
    model.save_pretrained(folder)
    return folder


def weft_model(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


def plain(report: DirectionsReport) -> list[dict[str, Any]]:
    """Sites without their times."""
    sites = [site for adapter in report.record()["adapters"] for site in adapter["sites"]]
    return [{key: value for key, value in site.items() if key != "seconds"} for site in sites]


def test_folders_give_what_the_model_in_memory_gives(base: Path, tmp_path: Path):
    one, other = (save_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("one", "other")))
    in_memory = weftlora.directions(weft_model(base, one))
    assert plain(weftlora.directions(one)) == plain(in_memory), "an adapter folder knows its base"
    assert plain(weftlora.directions(base, one)) == plain(in_memory)
    assert plain(weftlora.directions(str(base), [str(one)])) == plain(in_memory)
    assert plain(weftlora.directions(AutoModelForCausalLM.from_pretrained(base), one)) == plain(in_memory)
    both = weftlora.directions(base, [one, other])
    assert [adapter.adapter for adapter in both.adapters] == [str(one), str(other)]
    assert len(both.overlaps) == 1


def test_a_stock_lora_folder_is_the_same_as_weft_with_its_factors(base: Path, tmp_path: Path):
    torch.manual_seed(0)
    stock = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]),
    )
    own = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        weftlora.PlainLoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    )
    for theirs, ours in zip(lora_layers(stock), weft_layers(own), strict=True):
        torch.nn.init.normal_(theirs.lora_B["default"].weight, std=0.1)
        with torch.no_grad():
            ours.site("default").structure.A.copy_(theirs.lora_A["default"].weight)
            ours.site("default").structure.B.copy_(theirs.lora_B["default"].weight)
    stock.save_pretrained(tmp_path / "stock")
    assert plain(weftlora.directions(base, tmp_path / "stock")) == plain(weftlora.directions(own))


def lora_layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A")]


def weft_layers(model: Any) -> list[WeftLinear]:
    return [m for m in model.modules() if isinstance(m, WeftLinear)]


def test_against_an_adapter_and_against_its_merged_model_agree(base: Path, tmp_path: Path):
    one, later = save_adapter(base, tmp_path / "one", 0), save_adapter(base, tmp_path / "later", 1)
    whole = merged(base, later, tmp_path / "whole")
    by_adapter = weftlora.directions(base, one, against=later)
    by_model = weftlora.directions(base, one, against=whole)
    # the merged model is rounded to fp32, which may swap two directions of nearly equal rate at the edge of the true 16
    for first, second in zip(by_adapter.adapters[0].sites, by_model.adapters[0].sites, strict=True):
        assert first.hits["predicted"].recall == pytest.approx(second.hits["predicted"].recall, abs=0.26)
        assert first.hits["predicted"].accuracy == pytest.approx(second.hits["predicted"].accuracy, abs=0.13)
    itself = weftlora.directions(base, later, against=whole).adapters[0].mean_hits()
    assert itself["predicted"].recall == itself["predicted"].accuracy == 1.0
    in_memory = weftlora.directions(weft_model(base, one), against=whole)
    assert plain(in_memory) == plain(by_model)


def test_a_base_in_memory_is_left_as_it_was(base: Path, tmp_path: Path):
    adapter = save_adapter(base, tmp_path / "one", 0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.requires_grad_(False)
    names, wants = [n for n, _ in model.named_modules()], [p.requires_grad for p in model.parameters()]
    weftlora.directions(model, adapter)
    assert names == [n for n, _ in model.named_modules()]
    assert wants == [p.requires_grad for p in model.parameters()]
    assert not hasattr(model, "peft_config")


def test_a_run_folder_is_enough(recipe: Callable[..., dict[str, Any]], tmp_path: Path):
    adapter = {"recipe": "lora_dash", "r": 2, "directions": 3, "after": 2}
    run = weftlora.train(recipe(adapter=adapter, train={"steps": 4, "save_every": 1, "keep": 4, "batch_size": 4}))
    report = weftlora.directions(run.folder, directions=3)
    assert report.adapters[0].phase == "launched"
    before = next(run.checkpoints.glob("*-1"))
    early = weftlora.directions(before, against=run.folder, directions=3)
    assert early.adapters[0].phase == "before the launch"
    assert early.adapters[0].mean_hits() is not None
    launched = weftlora.directions(run.adapter_folder, directions=3).adapters[0].sites
    assert [site.launched for site in launched] == [site.launched for site in report.adapters[0].sites]


def test_a_run_on_another_base_is_refused(recipe: Callable[..., dict[str, Any]], tmp_path: Path):
    run = weftlora.train(recipe(adapter={"recipe": "lora", "r": 2}, train={"steps": 1, "batch_size": 4}))
    (tmp_path / "other").mkdir()
    other = tiny_bases.llama(tmp_path / "other", seed=5)
    with pytest.raises(AdapterError, match="other weights"):
        weftlora.directions(other, run.folder)


def test_what_cannot_be_measured_is_named(base: Path, tmp_path: Path):
    adapter = save_adapter(base, tmp_path / "one", 0)
    with pytest.raises(AdapterError, match="is not an adapter"):
        weftlora.directions(base, tmp_path)
    with pytest.raises(AdapterError, match="is not an adapter"):
        weftlora.directions(base)
    with pytest.raises(AdapterError, match="is not an adapter"):
        weftlora.directions(base, adapter, against=tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="second argument"):
        weftlora.directions(AutoModelForCausalLM.from_pretrained(base))
    with pytest.raises(ModelError, match="no model folder"):
        weftlora.directions(tmp_path / "nowhere", adapter)


def test_what_does_not_fit_is_named(base: Path, tmp_path: Path):
    adapter = save_adapter(base, tmp_path / "one", 0)
    for name in ("wide", "encoder"):
        (tmp_path / name).mkdir()
    wide, encoder = tiny_bases.llama(tmp_path / "wide", hidden=64), tiny_bases.bert(tmp_path / "encoder")
    with pytest.raises(AdapterError, match=r"does not fit|not made for"):
        weftlora.directions(wide, adapter)
    with pytest.raises(ModelError, match=r"is \[64, 64\] .* \[32, 32\]"):
        weftlora.directions(base, adapter, against=wide)
    with pytest.raises(ModelError, match="is a bert and the base a llama"):
        weftlora.directions(base, adapter, against=encoder)
    routed = get_peft_model(AutoModelForCausalLM.from_pretrained(base), weftlora.HydraLoraConfig(r=2))
    routed.save_pretrained(tmp_path / "routed")
    with pytest.raises(AdapterError, match="inputs"):
        weftlora.directions(base, tmp_path / "routed")
