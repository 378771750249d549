"""Every recipe: made by peft, trained for three steps with its event among them, saved, and loaded in a process of its own."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import weftlora

IDS = torch.arange(3, 19).reshape(2, 8)
ROWS = [
    {"input_ids": [3, 4, 5, 6 + n % 8], "attention_mask": [1] * 4, "labels": [3, 4, 5, 6 + n % 8]} for n in range(8)
]
RECIPES: dict[str, Callable[[], Any]] = {
    "lora": lambda: weftlora.PlainLoraConfig(r=4),
    "lora_with_a_head": lambda: weftlora.PlainLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "hydralora": lambda: weftlora.HydraLoraConfig(r=4),
    "tied_lora": lambda: weftlora.TiedLoraConfig(r=4),
    "tied_fused": lambda: weftlora.TiedLoraConfig(r=4, group="fused_qkv"),
    "tied_frozen": lambda: weftlora.TiedLoraConfig(r=4, train="vera"),
    "lora_dash": lambda: weftlora.LoraDashConfig(r=4, directions=2, after=2),
    "lora_init": lambda: weftlora.LoraInitConfig(r=4, after=2),
    "lora_tsd": lambda: weftlora.LoraTsdConfig(r=4, directions=2, after=2),
    "alora": lambda: weftlora.AllocLoraConfig(r=4, first=2, every=5, max_rounds=1, rows=4),
    "flexora": lambda: weftlora.WeftConfig(r=4, layers=[0, 3]),
}
EVENTS = {"lora_dash": {"dash_launch"}, "lora_init": {"start_switch"}, "lora_tsd": {"dash_launch", "start_switch"}}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.contiguous()


@pytest.fixture(scope="session")
def saved(base: Path, train: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all recipes, trained and saved, their logits and what happened while they were trained."""
    folder, truth, happened = tmp_path_factory.mktemp("saved"), {}, {}
    truth["base"] = logits(AutoModelForCausalLM.from_pretrained(base).eval())
    for name, config in RECIPES.items():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config())
        if name == "alora":
            weftlora.attach(model, total_steps=3, validation=ROWS)
        train(model)
        truth[name] = logits(model)
        happened[name] = [e["event"] for s in weftlora.state_dict(model).values() for e in s["events"]]
        model.save_pretrained(str(folder / name))
    save_file(truth, folder / "logits.safetensors")
    (folder / "events.json").write_text(json.dumps(happened))
    return folder


FRESH = """
import sys, warnings
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import weftlora
warnings.simplefilter("ignore")
base, folder = Path(sys.argv[1]), Path(sys.argv[2])
ids, found = torch.arange(3, 19).reshape(2, 8), {}
with torch.no_grad():
    for adapter in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name in ("default", "other"):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter), adapter_name=name).eval()
            found[f"{adapter.name} {name}"] = model(input_ids=ids).logits.contiguous()
save_file(found, folder / "fresh.safetensors")
"""


@pytest.fixture(scope="session")
def fresh(base: Path, saved: Path, python: Callable[..., subprocess.CompletedProcess[str]]) -> dict[str, torch.Tensor]:
    python("-c", FRESH, str(base), str(saved))
    return load_file(saved / "fresh.safetensors")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fresh_process_loads_it_under_any_name_with_equal_logits(recipe: str, saved: Path, fresh: Any) -> None:
    truth = load_file(saved / "logits.safetensors")
    assert not torch.equal(truth[recipe], truth["base"]), "the adapter does nothing"
    for name in ("default", "other"):
        assert torch.equal(fresh[f"{recipe} {name}"], truth[recipe])


@pytest.mark.parametrize("recipe", [*EVENTS, "alora"])
def test_its_event_has_happened(recipe: str, saved: Path) -> None:
    happened = set(json.loads((saved / "events.json").read_text())[recipe])
    assert happened >= EVENTS[recipe] if recipe in EVENTS else happened


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_key_of_the_file_has_an_adapters_name(recipe: str, saved: Path) -> None:
    with safe_open(saved / recipe / "adapter_model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if ".default." in key]  # noqa: SIM118


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_adapters_of_one_model_are_saved_apart(recipe: str, base: Path, saved: Path, tmp_path: Path) -> None:
    truth = load_file(saved / "logits.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(saved / recipe)).eval()
    model.load_adapter(str(saved / recipe), adapter_name="second")
    model.add_adapter("untrained", RECIPES[recipe]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an event that the third has not come to
        model.save_pretrained(str(tmp_path))
    for name in ("default", "second"):
        folder = tmp_path / ("" if name == "default" else name)
        ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, saved / recipe))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        model.set_adapter(name)
        assert torch.equal(logits(model), truth[recipe])


@pytest.mark.parametrize("recipe", ["lora", "tied_lora", "lora_tsd", "alora"])
def test_pefts_own_functions_carry_a_state_over(recipe: str, base: Path, saved: Path) -> None:
    truth = load_file(saved / "logits.safetensors")
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(saved / recipe)).eval()
    other = get_peft_model(AutoModelForCausalLM.from_pretrained(base), RECIPES[recipe](), adapter_name="other").eval()
    peft.set_peft_model_state_dict(other, get_peft_model_state_dict(trained), adapter_name="other")
    assert torch.equal(logits(other), truth[recipe])


@pytest.mark.parametrize("recipe", ["lora", "hydralora", "tied_lora", "tied_fused", "tied_frozen"])
def test_transformers_own_load_adapter(recipe: str, base: Path, saved: Path, tmp_path: Path) -> None:
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"]))
    stock.save_pretrained(str(tmp_path))
    try:
        AutoModelForCausalLM.from_pretrained(base).load_adapter(str(tmp_path))
    except ImportError as error:
        pytest.skip(f"this transformers cannot load a stock LoRA of this peft either: {error}")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(saved / recipe), adapter_name="mine")
    assert torch.equal(logits(model.eval()), load_file(saved / "logits.safetensors")[recipe])


def test_the_adapter_of_another_base_is_refused(base: Path, saved: Path, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(base).config
    for other, problem in (
        ({"num_hidden_layers": 3}, "has .* tensors this model has no place for"),
        ({"num_hidden_layers": 5}, "lacks .* tensors"),
        ({"hidden_size": 64, "head_dim": 16}, "have another shape"),
    ):
        model = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **other}))
        with pytest.raises(weftlora.AdapterError, match=problem):
            PeftModel.from_pretrained(model, str(saved / "lora"))


def test_a_layer_search_and_its_second_stage(base: Path) -> None:
    config = weftlora.FlexoraConfig(
        r=4, steps=2, max_search_samples=8, val_size=4, outer_batches=1, select="top_k", top_k=2
    )
    rows = [{"input_ids": torch.tensor(r["input_ids"]), "labels": torch.tensor(r["labels"])} for r in ROWS * 2]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    found = weftlora.search_layers(model, rows)
    assert len(found.layers.blocks) == 2


def test_merging_equals_the_adapter(base: Path, saved: Path) -> None:
    for recipe in ("lora", "lora_tsd", "alora"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(saved / recipe)).eval()
        before = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-5)


def test_an_export_is_stock_lora(base: Path, saved: Path, tmp_path: Path) -> None:
    for recipe in ("lora", "tied_lora", "lora_dash", "alora"):
        ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(saved / recipe)).eval()
        weftlora.export_lora(ours, tmp_path / recipe, verify=False)  # the command below proves one
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / recipe)).eval()
        assert type(model.peft_config["default"]) is peft.LoraConfig
        torch.testing.assert_close(logits(model), load_file(saved / "logits.safetensors")[recipe], rtol=1e-3, atol=1e-4)
