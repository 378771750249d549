"""What differs between versions: told by what a version has, refused in one sentence, never at import."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners import tuners_utils
from safetensors.torch import load_file, save_file

import weftlora
from families import FAMILIES, adapter_config, logits, randomise
from weftlora.host import versions
from weftlora.host.versions import name_in, named, why_no_sft, why_not


@pytest.fixture(autouse=True)
def _asked_afresh():
    why_not.cache_clear()
    yield
    why_not.cache_clear()


def test_this_peft_is_supported() -> None:
    assert why_not() is None


def test_a_peft_that_lacks_something_is_refused_where_a_config_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tuners_utils, "check_adapters_to_merge")
    with pytest.raises(weftlora.WeftError, match=r"lacks check_adapters_to_merge.*pip install 'peft>=0.18,<0.22'"):
        weftlora.PlainLoraConfig()


def test_a_peft_that_saves_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tuners_utils.BaseTuner, versions.HOOKS[0])
    monkeypatch.delattr(peft.utils.save_and_load, "_insert_adapter_name_into_state_dict")
    assert "a way of saving that weftlora knows" in str(why_not())


REFUSED = """
import peft.tuners.tuners_utils as tuners
del tuners.check_adapters_to_merge
import weftlora
from peft import PeftModel
from transformers import AutoModelForCausalLM
from weftlora.data.demo import demo_model_path
base = AutoModelForCausalLM.from_pretrained(demo_model_path())
for use in (weftlora.HydraLoraConfig, lambda: PeftModel.from_pretrained(base, FOLDER)):
    try:
        use()
    except weftlora.WeftError as error:
        print(error)
"""


def test_importing_is_never_refused_and_loading_is(llama, tmp_path: Path) -> None:
    get_peft_model(llama, weftlora.PlainLoraConfig()).save_pretrained(tmp_path)
    code = REFUSED.replace("FOLDER", repr(str(tmp_path)))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert run.stdout.count("lacks check_adapters_to_merge") == 2, run.stderr


def as_before_the_hooks(model, state_dict=None, adapter_name="default"):
    """`get_peft_model_state_dict` of peft 0.20: it takes the name out of keys that end in it, or nearly."""

    def nameless(key: str) -> str:
        head, _, last = key.removesuffix(f".{adapter_name}").rpartition(".")
        return f"{head.removesuffix(f'.{adapter_name}')}.{last}"

    return {nameless(k): v for k, v in (state_dict or model.state_dict()).items() if "weft_" in k}


@pytest.mark.parametrize("structure", ["plain", "hydra", "tied_tl6", "tied_vera"])
def test_the_bridge_of_old_versions_writes_the_same_keys(structure: str) -> None:
    model = get_peft_model(FAMILIES["llama"].build(), adapter_config(structure, "llama"))
    model.add_adapter("other", adapter_config(structure, "llama"))
    ours = peft.get_peft_model_state_dict(model, adapter_name="other")
    theirs = versions._saved(as_before_the_hooks)(model, adapter_name="other")
    assert theirs.keys() == ours.keys()


def test_the_bridge_refuses_files_that_do_not_fit(llama) -> None:
    model = get_peft_model(llama, weftlora.PlainLoraConfig())
    state = peft.get_peft_model_state_dict(model)

    class Result:
        missing_keys = ("model.layers.0.self_attn.q_proj.weft_site.default.structure.A", "lm_head.weight")
        unexpected_keys: tuple[str, ...] = ()

    def old(model, peft_model_state_dict, adapter_name="default", ignore_mismatched_sizes=False):
        assert not [key for key in peft_model_state_dict if ".default." in key]
        return Result

    with pytest.raises(weftlora.AdapterError, match=r"the file lacks 1 tensors, such as model\.layers\.0"):
        versions._loaded(old)(model, state)

    def wrong_size(model, peft_model_state_dict, adapter_name="default"):
        torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})

    with pytest.raises(weftlora.AdapterError, match=r"weight: file \(3, 2\), model \(2, 2\)"):
        versions._loaded(wrong_size)(model, state)


def test_other_methods_pass_the_bridge_untouched(llama) -> None:
    model = get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))
    kept = {"x": torch.zeros(1)}
    assert versions._saved(lambda model, adapter_name="default": kept)(model) is kept
    load = versions._loaded(lambda model, peft_model_state_dict, adapter_name="default": "as it was")
    assert load(model, kept) == "as it was"


def test_a_replaced_function_is_replaced_wherever_it_was_imported() -> None:
    module = type(sys)("somebody")
    module.get_it = original = object()
    sys.modules["somebody"] = module
    try:
        versions._replace("get_it", original, "ours")
        assert module.get_it == "ours"
    finally:
        del sys.modules["somebody"]


def test_the_files_of_all_versions_are_one_format(tmp_path: Path) -> None:
    """What tests/smoke writes in every row of matrix.toml has no adapter's name in it, and this version reads it."""
    model = get_peft_model(FAMILIES["llama"].build(), adapter_config("tied_tl6", "llama"))
    randomise(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert not [key for key in state if ".default." in key]
    save_file(state, tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, adapter_name="other")
    batch = FAMILIES["llama"].batch()
    assert torch.equal(logits(again, batch), logits(model, batch))


@dataclasses.dataclass
class Old:
    gradient_checkpointing: bool = False
    lr: float = 0.0


@dataclasses.dataclass
class New(Old):
    activation_checkpointing: bool | None = None


def test_arguments_have_the_name_that_the_class_has_for_them() -> None:
    assert named(Old, {"activation_checkpointing": True, "lr": 1.0}) == {"gradient_checkpointing": True, "lr": 1.0}
    assert named(New, {"activation_checkpointing": True}) == {"activation_checkpointing": True}
    assert name_in(Old, "unheard") == "unheard"


def test_a_trl_that_cannot_compute_its_loss_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_no_sft() is None
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", None)
    recipe = {"model": "demo", "data": "demo", "adapter": "lora", "train": {"trainer": "sft", "steps": 1}}
    with pytest.raises(weftlora.ConfigError, match="Triton, which is not installed here"):
        weftlora.train({**recipe, "out": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()
