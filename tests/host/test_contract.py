"""What peft 0.21.2 does to a method of a third party. A test that fails after an upgrade names the fact that changed.

Each test shows the fact on peft itself, then that weftlora lives with it.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype, check_target_module_exists
from peft.utils import register_peft_method
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

import weftlora
from families import FAMILIES, adapter_config, logits, trainable
from weftlora.adapted.layer import WeftLinear
from weftlora.host import registration as shim
from weftlora.host.tuner import WeftTuner


def test_these_are_the_versions_the_facts_were_tried_on() -> None:
    assert peft.__version__.startswith("0.21."), "read this file again before widening the window in pyproject.toml"


# ---------------------------------------------------------------------- 1: the type


def test_fact_1_peft_registers_only_names_of_its_enum() -> None:
    with pytest.raises(ValueError, match="Unknown PEFT type"):
        register_peft_method(name="unheard", config_cls=weftlora.WeftConfig, model_cls=WeftTuner, prefix="unheard_")
    assert PeftType("WEFT") is PeftType.WEFT
    assert PeftType.WEFT.name == PeftType.WEFT.value == "WEFT"
    assert (
        vars(PeftType)["WEFT"] is PeftType.WEFT
    )  # an attribute of the class, as peft's own: Python 3.12 and later look nowhere else
    assert pickle.loads(pickle.dumps(PeftType.WEFT)) is copy.deepcopy(PeftType.WEFT) is PeftType.WEFT
    assert vars(PeftType.WEFT).keys() == vars(PeftType.LORA).keys()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.WEFT] is weftlora.WeftConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.WEFT] is WeftTuner
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.WEFT] == "weft_"


def test_registering_twice_changes_nothing() -> None:
    tables = (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING))
    shim.register()
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == tables


def test_a_taken_name_or_prefix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shim, "NAME", "LORA")
    with pytest.raises(weftlora.WeftError, match="already registered"):
        shim.register()
    monkeypatch.setattr(shim, "NAME", "WEFT_TWIN")
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "WEFT_TWIN", LoraConfig)  # as a str subclass would stand there
    monkeypatch.setattr(PeftType, "WEFT_TWIN", None, raising=False)  # taken away again at the end
    monkeypatch.setattr(PeftType, "_member_names_", list(PeftType._member_names_))
    monkeypatch.setattr(PeftType, "_member_map_", dict(PeftType._member_map_))
    monkeypatch.setattr(PeftType, "_value2member_map_", dict(PeftType._value2member_map_))
    with pytest.raises(weftlora.WeftError, match="another package has already registered"):
        shim.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.WEFT] is weftlora.WeftConfig


# ---------------------------------------------------------------------- 2: a process without weftlora

WITHOUT_WEFT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import peft
try:
    peft.PeftConfig.from_pretrained(sys.argv[1])
    error = None
except Exception as e:
    error = [type(e).__name__, str(e)]
before = set(sys.modules)
import weftlora
loaded = sorted({m.split(".")[0] for m in set(sys.modules) - before} | {m for m in sys.modules if m in ("trl", "datasets")})
models = [m for m in set(sys.modules) - before if m.startswith("transformers.")]
kind = type(peft.PeftConfig.from_pretrained(sys.argv[1])).__name__
print(json.dumps({"error": error, "loaded": loaded, "transformers": models, "kind": kind}))
"""


def test_fact_2_a_process_without_weft_fails_and_the_readme_says_what_to_import(llama, tmp_path: Path) -> None:
    get_peft_model(llama, weftlora.PlainLoraConfig()).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_WEFT, str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["error"][0] in ("KeyError", "ValueError")
    assert "WEFT" in seen["error"][1]
    assert seen["kind"] == "WeftConfig"
    assert "import weftlora" in (tmp_path / "README.md").read_text()
    assert not set(seen["loaded"]) & {"trl", "datasets", "sklearn", "pandas"}, "import weftlora must stay light"
    assert not [m for m in seen["transformers"] if ".models." in m]


def test_fact_2_the_loading_note_is_written_once_and_for_every_adapter(llama, tmp_path: Path) -> None:
    model = get_peft_model(llama, weftlora.PlainLoraConfig())
    model.add_adapter("other", weftlora.PlainLoraConfig())
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    for readme in (tmp_path / "README.md", tmp_path / "other" / "README.md"):
        text = readme.read_text()
        assert text.count("import weftlora") == 2  # in the first line and in the snippet
        assert text.count("## Loading this adapter") == 1
        assert first_line(text).startswith("**`import weftlora` before you load this adapter**")


def first_line(card: str) -> str:
    """What a reader of a model card sees first: below the metadata."""
    body = card.split("---\n", 2)[2] if card.startswith("---\n") else card
    return body.lstrip().splitlines()[0]


def test_fact_2_a_card_that_a_trainer_wrote_over_ours_says_it_again(llama, tmp_path: Path) -> None:
    model = get_peft_model(llama, weftlora.PlainLoraConfig())
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n\n<!-- made by a trainer -->\n\n# A run\n")
    model.create_or_update_model_card(str(tmp_path))  # as transformers' Trainer has peft complete the card it pushes
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\n")
    assert "# A run" in text
    assert "`weftlora export` makes a stock LoRA" in first_line(text)
    stock = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    (tmp_path / "README.md").unlink()
    stock.create_or_update_model_card(str(tmp_path))
    assert "weftlora" not in (tmp_path / "README.md").read_text()


def test_fact_2_a_lora_config_silently_drops_what_it_does_not_know(tmp_path: Path) -> None:
    LoraConfig(r=4).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "heads": 3}))
    with pytest.warns(UserWarning, match="heads"):
        assert not hasattr(LoraConfig.from_pretrained(tmp_path), "heads")
    assert weftlora.HydraLoraConfig().to_dict()["peft_type"] == "WEFT"


# ---------------------------------------------------------------------- 3, 4: containers and shared tensors


class Toy(nn.Module, BaseTunerLayer):
    """The least peft takes for an adapter layer: one container."""

    adapter_layer_names = ("toy",)

    def __init__(self, toy: nn.Module):
        super().__init__()
        self.base_layer, self.toy = nn.Linear(2, 2), toy
        self._active_adapter, self._disable_adapters, self.merged_adapters = ["default"], False, []


def test_fact_3_peft_looks_for_adapter_names_at_the_first_level_only() -> None:
    by_group = Toy(nn.ModuleDict({"group": nn.ModuleDict({"default": nn.Linear(2, 2)})}))
    by_adapter = Toy(nn.ModuleDict({"default": nn.ModuleDict({"group": nn.Linear(2, 2)})}))
    for layer in (by_group, by_adapter):
        layer.set_adapter("default")
    assert not any(p.requires_grad for p in by_group.toy.parameters())
    assert all(p.requires_grad for p in by_adapter.toy.parameters())
    model = get_peft_model(FAMILIES["llama"].build(), adapter_config("tied_tl6_fused", "llama"), adapter_name="mine")
    assert {key for m in model.modules() if isinstance(m, WeftLinear) for key in m.weft_site} == {"mine"}


def test_fact_4_a_cast_makes_new_parameters_so_a_shared_one_comes_apart() -> None:
    shared = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    layers = nn.ModuleList([Toy(nn.ParameterDict({"default": shared})) for _ in range(2)])
    assert layers[0].toy["default"] is layers[1].toy["default"]
    cast_adapter_dtype(layers, "default")
    assert layers[0].toy["default"] is not layers[1].toy["default"]


@pytest.mark.parametrize("structure", ["tied_tl6", "tied_tl5_shape", "tied_tl6_fused", "tied_vera", "tied_Bu"])
def test_fact_4_weft_stays_tied_through_casts(structure: str) -> None:
    model = get_peft_model(FAMILIES["llama"].build().bfloat16(), adapter_config(structure, "llama"))
    first, second = (model.base_model.model.model.layers[i].self_attn.q_proj.site("default").structure for i in (0, 1))
    assert first.part("A").dtype == torch.float32
    for _ in range(2):
        assert first.part("A") is second.part("A")
        assert first.part("B") is second.part("B")
        model.to(torch.float64)


def test_fact_4_shared_state_on_the_tuner_closes_the_injection_paths(llama, monkeypatch: pytest.MonkeyPatch) -> None:
    inject_adapter_in_model(weftlora.TiedLoraConfig(), llama)
    monkeypatch.setattr(WeftTuner, "uses_shared_state", True)
    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(weftlora.TiedLoraConfig(), FAMILIES["llama"].build())


# ---------------------------------------------------------------------- 5: what is fixed is a buffer


def test_fact_5_setting_an_adapter_wakes_every_parameter_so_frozen_factors_are_buffers(llama) -> None:
    model = get_peft_model(llama, weftlora.TiedLoraConfig(train="vera"))
    expected = set(trainable(model))
    assert {name.rpartition(".")[2] for name in expected} == {"u", "v"}
    for p in model.parameters():
        p.requires_grad = False
    model.set_adapter("default")
    assert set(trainable(model)) == expected
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert set(trainable(model)) == expected


def test_fact_5_only_what_the_axes_need_is_saved(llama, tmp_path: Path) -> None:
    get_peft_model(llama, weftlora.PlainLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = {key.partition(".weft_site.")[2] for key in file.keys()}  # noqa: SIM118
    assert names == {"structure.A", "structure.B"}


# ---------------------------------------------------------------------- 6: hooks


def test_fact_6_injection_hooks_run_for_the_first_adapter_only(
    llama, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for hook in ("_pre_injection_hook", "_post_injection_hook"):
        monkeypatch.setattr(
            WeftTuner, hook, lambda self, model, config, name, hook=hook: calls.append(f"{hook} {name}")
        )
    model = get_peft_model(llama, weftlora.TiedLoraConfig())
    assert calls == ["_pre_injection_hook default", "_post_injection_hook default"]
    model.add_adapter("second", weftlora.TiedLoraConfig())
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "second", adapter_name="third")
    assert len(calls) == 2
    batch = FAMILIES["llama"].batch()
    for name in ("second", "third"):  # tied all the same
        model.set_adapter(name)
        logits(model, batch)
        terms = [m.site(name).structure for n, m in model.named_modules() if n.endswith("q_proj")]
        assert terms[0].part("A") is terms[1].part("A")


# ---------------------------------------------------------------------- 7: configs


def test_fact_7_no_blocks_means_every_block_in_peft_and_is_refused_here() -> None:
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[])
    assert check_target_module_exists(config, "model.layers.5.self_attn.q_proj")
    with pytest.raises(weftlora.ConfigError, match=r"layers_to_transform=\[\]"):
        weftlora.PlainLoraConfig(layers_to_transform=[])


def test_fact_7_full_names_ignore_the_block_filter() -> None:
    """Why all-linear within blocks is resolved here: peft turns it into full names first."""
    name = "model.layers.5.self_attn.q_proj"
    assert check_target_module_exists(LoraConfig(target_modules=[name], layers_to_transform=[1]), name)


def test_fact_7_rank_zero_raises() -> None:
    with pytest.raises(ValueError, match="r"):
        get_peft_model(FAMILIES["llama"].build(), LoraConfig(r=0, target_modules=["q_proj"]))
    with pytest.raises(weftlora.ConfigError, match="r=0 is not a rank"):
        weftlora.PlainLoraConfig(r=0)


def test_fact_7_pattern_keys_are_regexes_and_the_first_match_wins() -> None:
    assert get_pattern_key(["layers.0.q", "q"], "layers.0.q") == "layers.0.q"
    assert get_pattern_key(["q", "layers.0.q"], "layers.0.q") == "q"
    assert get_pattern_key(["layers.1.q"], "layersX1Yq") == "layers.1.q"  # unescaped dots match anything


def test_fact_7_a_rank_pattern_alone_rescales_a_stock_lora() -> None:
    fields = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}
    model = get_peft_model(FAMILIES["llama"].build(), LoraConfig(**fields))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 4
    model = get_peft_model(FAMILIES["llama"].build(), LoraConfig(**fields, alpha_pattern={"q_proj": 8}))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 2


# ---------------------------------------------------------------------- 8: names


def test_fact_8_alora_is_a_name_of_peft_for_something_else() -> None:
    assert hasattr(LoraConfig(), "alora_invocation_tokens")
    assert not [name for name in weftlora.__all__ if name.lower().startswith("alora")]
    assert not hasattr(weftlora.WeftConfig(), "alora_invocation_tokens")


# ---------------------------------------------------------------------- found while testing


def test_peft_drops_keys_that_contain_another_adapters_name(llama) -> None:
    """Why `RESERVED` exists: with adapters called q_proj and default, the file of default loses every q_proj tensor."""
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("q_proj", LoraConfig(target_modules=["q_proj", "v_proj"]))
    saved = peft.get_peft_model_state_dict(model, adapter_name="default")
    assert saved
    assert not [key for key in saved if ".q_proj." in key]


@pytest.mark.parametrize("name", ["v1.2", "..", ".hidden", ""])
def test_a_name_that_torch_refuses_is_refused_before_anything_is_adapted(llama, name: str) -> None:
    """peft hands it to torch, which says so once the first module is half adapted."""
    with pytest.raises(KeyError, match="module name"):
        get_peft_model(copy.deepcopy(llama), LoraConfig(target_modules=["q_proj"]), adapter_name=name)
    before = [name for name, _ in llama.named_modules()]
    with pytest.raises(weftlora.ConfigError, match="without dots"):
        get_peft_model(llama, weftlora.PlainLoraConfig(), adapter_name=name)
    assert [name for name, _ in llama.named_modules()] == before
    model = get_peft_model(llama, weftlora.PlainLoraConfig())
    with pytest.raises(weftlora.ConfigError, match="without dots"):
        model.add_adapter(name, weftlora.PlainLoraConfig())


def test_status_reports_of_peft_know_the_layers(llama) -> None:
    model = get_peft_model(llama, weftlora.TiedLoraConfig())
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.active_adapters, status.merged_adapters) == (6, ["default"], [])
    assert status.requires_grad == {"default": True}
    assert {s.module_type for s in model.get_layer_status()} == {"weftlora.WeftLinear"} or len(
        model.get_layer_status()
    ) == 6


def test_mixed_adapter_types_are_refused_by_peft(llama) -> None:
    with pytest.raises(ValueError, match="not compatible"):
        get_peft_model(llama, weftlora.PlainLoraConfig(), mixed=True)


def test_loading_onto_another_base_is_refused_by_name_and_shape(llama, tmp_path: Path) -> None:
    get_peft_model(llama, weftlora.PlainLoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    for other, problem in (
        ({"hidden_size": 64}, "tensors have another shape"),
        ({"num_hidden_layers": 3}, "the file lacks 2 tensors"),
        ({"num_hidden_layers": 1}, "the file has 2 tensors this model has no place for"),
    ):
        with pytest.raises(weftlora.AdapterError, match=problem):
            PeftModel.from_pretrained(FAMILIES["llama"].build(**other), tmp_path)
