"""What can carry an adapter; what cannot is refused by name, in one sentence, with the model left untouched."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import weftlora
from families import FAMILIES, SIZE, adapter_config, logits, randomise
from weftlora.adapted.layer import WeftLinear

LLAMA_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted_names(model: nn.Module) -> list[str]:
    return [n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, WeftLinear)]


def named(rows: list[tuple]) -> list:
    """Rows as parameters, the first column as their test's name."""
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


def attention() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True))


def encoder_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZE, num_key_value_heads=2, num_local_experts=2))


REFUSED_TARGETS = [
    ("embedding", FAMILIES["llama"].build, ["q_proj", "embed_tokens"], "model.embed_tokens is an embedding", "modules_to_save"),
    ("convolution", lambda: nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1)), ["0", "1"], "1 is a Conv1d", "leave it out"),
    ("norm", FAMILIES["bert"].build, ["query", "LayerNorm"], "LayerNorm is a LayerNorm", "name linear modules"),
    ("experts", mixtral, ["q_proj", "experts"], "experts holds 3-D expert parameters", "target_parameters"),
    ("expert matrix", mixtral, ["gate_up_proj"], "experts.gate_up_proj is a 3-D expert parameter", "target_parameters"),
    ("router", mixtral, ["q_proj", "gate"], "mlp.gate is a MixtralTopKRouter", "name linear modules"),
    ("multi-head attention", attention, ["0", "out_proj"], "1.out_proj belongs to a torch MultiheadAttention", "exclude it"),
    ("attention by all-linear", attention, "all-linear", "1.out_proj belongs to a torch Multihead", "exclude it"),
    ("fast path", encoder_layer, ["0", "linear1"], "1.linear1 belongs to a torch TransformerEncoderLayer", "set_fastpath_enabled"),
    ("misspelt", FAMILIES["llama"].build, ["q_porj"], "['q_porj'] match no module", "did you mean 'q_proj'?"),
    ("regex of nothing", FAMILIES["llama"].build, r".*\.qq", r"'.*\\.qq' matches no module", "q_proj"),
    ("no linear at all", lambda: nn.Sequential(nn.Conv1d(3, 3, 1)), "all-linear", "Sequential has no linear module", "nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("build", "targets", "what", "advice"), named(REFUSED_TARGETS))
def test_what_cannot_be_adapted_is_named_and_the_model_is_left_untouched(build, targets, what, advice) -> None:
    model = build()
    before = {n: (type(m), m.training) for n, m in model.named_modules()}
    with pytest.raises(weftlora.TargetError, match=re.escape(what)) as error:
        get_peft_model(model, weftlora.PlainLoraConfig(r=2, target_modules=targets))
    assert advice in str(error.value)
    assert "\n" not in str(error.value)
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("build", [FAMILIES["llama"].build, mixtral])
def test_a_refused_second_adapter_leaves_the_first_alone(build) -> None:
    model = get_peft_model(build(), weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]))
    names = [n for n, _ in model.named_parameters()]
    for targets in (["q_proj", "embed_tokens"], ["nope"], ["q_porj"]):
        with pytest.raises(weftlora.TargetError) as error:
            model.add_adapter("second", weftlora.PlainLoraConfig(target_modules=targets))
        assert "base_layer" not in str(error.value)
    assert "q_proj" in str(error.value)
    assert list(model.peft_config) == ["default"]
    assert [n for n, _ in model.named_parameters()] == names


def test_one_misspelt_name_among_good_ones_is_a_warning_that_names_it(llama) -> None:
    with pytest.warns(UserWarning, match=r"\['v_porj'\] match no module .* did you mean 'v_proj'"):
        model = get_peft_model(llama, weftlora.PlainLoraConfig(target_modules=["q_proj", "v_porj"]))
    assert len(adapted_names(model)) == 2


def test_all_linear_warns_of_the_expert_parameters_it_leaves_out() -> None:
    with pytest.warns(UserWarning, match="leaves out 4 3-D expert parameters such as model.layers.0.mlp.experts"):
        model = get_peft_model(mixtral(), weftlora.PlainLoraConfig())
    assert {n.rpartition(".")[2] for n in adapted_names(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_an_encoder_layer_without_the_fast_path_can_be_adapted() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = get_peft_model(encoder_layer(), weftlora.PlainLoraConfig(target_modules=["linear1", "linear2"]))
        x, base = torch.randn(2, 3, 8), None
        with model.disable_adapter(), torch.no_grad():
            base = model.eval()(x)
        randomise(model)
        with torch.no_grad():
            assert not torch.allclose(model(x), base)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def in_layers(*numbers: int, last: tuple[str, ...] = LLAMA_LINEAR) -> set[str]:
    """Full names of the Llama modules with these last names in these blocks."""
    place = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in last}
    return {f"model.layers.{i}.{place[name]}.{name}" for i in numbers for name in last}


SELECTIONS = [
    ("default", {}, in_layers(0, 1)),
    ("all-linear", {"target_modules": "all-linear"}, in_layers(0, 1)),
    ("list", {"target_modules": ["q_proj", "down_proj"]}, in_layers(0, 1, last=("q_proj", "down_proj"))),
    ("full name", {"target_modules": ["model.layers.1.self_attn.q_proj"]}, in_layers(1, last=("q_proj",))),
    ("regex", {"target_modules": r".*\.1\..*\.[qk]_proj"}, in_layers(1, last=("q_proj", "k_proj"))),
    ("exclude", {"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
     in_layers(0, 1) - in_layers(0, 1, last=("k_proj",)) - in_layers(0, last=("up_proj",))),
    ("exclude regex", {"exclude_modules": r".*\.mlp\..*"}, in_layers(0, 1, last=LLAMA_LINEAR[:4])),
    ("blocks", {"target_modules": ["q_proj"], "layers_to_transform": [1]}, in_layers(1, last=("q_proj",))),
    ("one block", {"target_modules": ["q_proj"], "layers_to_transform": 0}, in_layers(0, last=("q_proj",))),
    ("blocks of the default", {"layers_to_transform": [1]}, in_layers(1)),
    ("blocks of all-linear", {"target_modules": "all-linear", "layers_to_transform": [0]}, in_layers(0)),
    ("head in full", {"modules_to_save": ["lm_head"]}, in_layers(0, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), named(SELECTIONS))
def test_targets_select_exactly_these_modules(fields, expected, llama) -> None:
    assert set(adapted_names(get_peft_model(llama, weftlora.PlainLoraConfig(r=2, **fields)))) == expected


def test_blocks_that_do_not_exist_are_an_error(llama) -> None:
    for targets in (None, ["q_proj"]):
        with pytest.raises(weftlora.TargetError, match=r"layers_to_transform=\[7\]"):
            get_peft_model(llama, weftlora.PlainLoraConfig(target_modules=targets, layers_to_transform=[7]))


def test_exclusion_of_everything_is_an_error_that_names_the_filter(llama) -> None:
    with pytest.raises(weftlora.TargetError, match=re.escape("exclude_modules=.*proj")):
        get_peft_model(llama, weftlora.PlainLoraConfig(exclude_modules=r".*proj"))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("gpt_neox", {"query_key_value"}),
        ("phi3", {"qkv_proj"}),
        ("bert", {"query", "key", "value"}),
        ("t5", {"q", "k", "v"}),
        ("plain", {"q_proj", "k_proj", "v_proj"}),
    ],
)
def test_tied_defaults_to_the_attention_inputs(family, expected) -> None:
    model = get_peft_model(FAMILIES[family].build(), weftlora.TiedLoraConfig(r=2))
    assert {n.rpartition(".")[2] for n in adapted_names(model)} == expected


def test_tied_without_attention_inputs_asks_for_names() -> None:
    with pytest.raises(weftlora.TargetError, match="name target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), weftlora.TiedLoraConfig())


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_scale_each_site_as_stock_lora_does(rslora) -> None:
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": list(LLAMA_LINEAR),
        "use_rslora": rslora,
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 6, "k_proj": 3},  # the first match wins
        "alpha_pattern": {r"layers\.1\..*v_proj": 5, "k_proj": 7},
    }
    batch, build = FAMILIES["llama"].batch(), FAMILIES["llama"].build
    ours, stock = (
        get_peft_model(build(), weftlora.PlainLoraConfig(**fields)),
        get_peft_model(build(), LoraConfig(**fields)),
    )
    randomise(ours)
    for name, layer in ours.named_modules():
        if isinstance(layer, WeftLinear):
            term, lora = layer.site("default").structure, stock.get_submodule(name)
            assert layer.site("default").scale == pytest.approx(lora.scaling["default"], rel=1e-12)
            lora.lora_A["default"].weight.data.copy_(term.A)
            lora.lora_B["default"].weight.data.copy_(term.B)
    assert (logits(ours, batch) - logits(stock, batch)).abs().max() < 1e-6


def test_patterns_that_match_nothing_are_a_warning(llama) -> None:
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
        get_peft_model(llama, weftlora.PlainLoraConfig(rank_pattern={"qq_proj": 2}))


@pytest.mark.parametrize("name", ["A", "B", "u", "v", "router", "structure", "mask"])
def test_an_adapter_called_like_a_tensor_is_refused(name, llama) -> None:
    """peft would take every key with `.A.` or ending in `.A` for that adapter's and leave it out of the others' files."""
    with pytest.raises(weftlora.ConfigError, match=f"adapter_name='{name}'"):
        get_peft_model(llama, weftlora.PlainLoraConfig(), adapter_name=name)
    assert not adapted_names(llama)


def test_reserved_names_cover_every_part_of_every_saved_name() -> None:
    from families import STRUCTURES
    from weftlora.host.tuner import RESERVED

    for structure in STRUCTURES:
        model = get_peft_model(FAMILIES["llama"].build(), adapter_config(structure, "llama"))
        for name in model.state_dict():
            before, found, after = name.partition(".weft_site.default.")
            assert not found or set(after.split(".")) <= RESERVED, (before, after)


def test_good_names_raise_no_warning(llama) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own, about checkpointing
        get_peft_model(llama, weftlora.PlainLoraConfig(exclude_modules=["o_proj"], layers_to_transform=[0]))
