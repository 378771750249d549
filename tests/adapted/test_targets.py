"""What can carry an adapter; what cannot is refused by name, in one sentence, with the model left untouched."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)

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


class Grouped(nn.Linear):
    """As DeepSeek-V4 has it: a matrix per group of inputs, in one weight."""

    def __init__(self, size: int, out: int, groups: int) -> None:
        super().__init__(size // groups, out)
        self.n_groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_group = self.weight.view(self.n_groups, -1, x.shape[-1])
        return torch.einsum("...gi,goi->...go", x, by_group)


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZE, num_key_value_heads=2, num_local_experts=2))


REFUSED_TARGETS = [
    ("convolution", lambda: nn.Sequential(nn.Linear(3, 3), nn.ConvTranspose1d(3, 3, 1)), ["0", "1"], "1 is a ConvTranspose1d",
     "leave it out"),
    ("groups", lambda: nn.Sequential(nn.Linear(3, 3), Grouped(8, 6, 2)), ["0", "1"], "1 is a Grouped, which", "leave it out"),
    ("norm", FAMILIES["bert"].build, ["query", "LayerNorm"], "LayerNorm is a LayerNorm", "name linear modules"),
    ("experts", mixtral, ["q_proj", "experts"], "experts holds its experts as fused parameters", "target_parameters"),
    ("expert matrix", mixtral, ["gate_up_proj"], "experts.gate_up_proj is a fused parameter of experts", "target_parameters"),
    ("router", mixtral, ["q_proj", "gate"], "mlp.gate is a MixtralTopKRouter", "name linear modules"),
    ("multi-head attention", attention, ["0", "out_proj"], "1.out_proj belongs to a torch MultiheadAttention", "leave it out"),
    ("attention alone", lambda: nn.Sequential(attention()[1]), "all-linear", "0.out_proj belongs to a torch Multi", "leave it out"),
    ("mamba", lambda: mamba(), ["in_proj", "out_proj"], "mixer.out_proj belongs to a state-space mixer", "target in_proj"),
    ("mamba's step", lambda: mamba(), ["dt_proj"], "mixer.dt_proj belongs to a state-space mixer", "target in_proj"),
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
    for targets in (["q_proj", "norm"], ["nope"], ["q_porj"]):
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


def test_all_linear_takes_the_experts_too() -> None:
    model = get_peft_model(mixtral(), weftlora.PlainLoraConfig())
    lasts = {n.rpartition(".")[2] for n in adapted_names(model)}
    assert lasts == {"q_proj", "k_proj", "v_proj", "o_proj"}
    experts = {n.rpartition(".")[2] for n in model.peft_config["default"].target_parameters}
    assert experts == {"gate_up_proj", "down_proj"}


def test_all_linear_leaves_out_what_torch_attention_reads_and_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"leaves out what cannot carry an adapter: 1\.out_proj belongs to a torch Multihead"
    ):
        model = get_peft_model(attention(), weftlora.PlainLoraConfig(r=2))
    assert adapted_names(model) == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(attention(), weftlora.PlainLoraConfig(r=2, exclude_modules=["out_proj"]))
    assert adapted_names(model) == ["0"]


def siglip() -> nn.Module:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**size, image_size=8, patch_size=4))


def test_a_siglip_tower_is_adapted_but_for_the_attention_of_its_pooling_head() -> None:
    for config in (weftlora.PlainLoraConfig(r=2), weftlora.TiedLoraConfig(r=2)):
        with pytest.warns(UserWarning, match="head.attention.out_proj belongs to a torch MultiheadAttention"):
            model = get_peft_model(siglip(), config)
        assert not [name for name in adapted_names(model) if "head.attention" in name]
        assert {"q_proj", "k_proj", "v_proj"} <= {name.rpartition(".")[2] for name in adapted_names(model)}


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2))


def test_a_mamba_is_adapted_where_its_modules_are_called_on_every_device() -> None:
    with pytest.warns(
        UserWarning, match=r"mixer.dt_proj belongs to a state-space mixer .* \(and 5 more such modules\)"
    ):
        model = get_peft_model(mamba(), weftlora.PlainLoraConfig(r=2))
    assert {name.rpartition(".")[2] for name in adapted_names(model)} == {"in_proj"}


def test_modules_without_a_gradient_in_the_first_step_are_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read, self.unused = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) @ self.read.weight.T

    model = get_peft_model(Half(), weftlora.PlainLoraConfig(r=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.warns(
        UserWarning, match="2 of the 3 modules of adapter 'default' had no gradient in the first step: read, unused"
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


# ---------------------------------------------------------------------- heads

ENCODER = {**SIZE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TASKS = [
    ("TOKEN_CLS", lambda: BertForTokenClassification(BertConfig(**ENCODER)), "classifier"),
    ("QUESTION_ANS", lambda: BertForQuestionAnswering(BertConfig(**ENCODER)), "qa_outputs"),
    ("SEQ_CLS", lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)), "classifier"),
]


@pytest.mark.parametrize("recipe", [weftlora.HydraLoraConfig, weftlora.TiedLoraConfig])
@pytest.mark.parametrize(("task", "build", "head"), TASKS)
def test_a_head_that_is_trained_in_full_carries_no_adapter(task, build, head, recipe, tmp_path) -> None:
    """Also every part of it: RoBERTa's head has two linear modules."""
    torch.manual_seed(0)
    base = build()
    model = get_peft_model(copy.deepcopy(base), recipe(r=2, task_type=task, init_lora_weights=False)).eval()
    assert not [name for name in adapted_names(model) if head in name]
    assert [n for n, p in model.named_parameters() if p.requires_grad and f"{head}.modules_to_save" in n]
    x = {"input_ids": torch.arange(6)[None] + 3}
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**x)[0]
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(again(**x)[0], expected)


def test_a_head_that_is_named_as_a_target_is_told_of() -> None:
    config = weftlora.PlainLoraConfig(r=2, task_type="TOKEN_CLS", target_modules=["query", "classifier"])
    with pytest.warns(UserWarning, match=r"\['classifier'\] are trained in full beside the adapter"):
        model = get_peft_model(TASKS[0][1](), config)
    assert {name.rpartition(".")[2] for name in adapted_names(model)} == {"query"}


# ---------------------------------------------------------------------- defaults


def llava() -> nn.Module:
    text = LlamaConfig(**SIZE, num_key_value_heads=2)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**size, image_size=8, patch_size=4, projection_dim=16)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))


def test_of_a_model_that_sees_the_language_part_is_adapted_by_default() -> None:
    with pytest.warns(
        UserWarning, match=r"the language part of Llava\w+ \(model.language_model\) is adapted and \d+ linear"
    ):
        model = get_peft_model(llava(), weftlora.PlainLoraConfig(r=2))
    assert adapted_names(model)
    assert all(name.startswith("model.language_model.") for name in adapted_names(model))
    whole = get_peft_model(llava(), weftlora.PlainLoraConfig(r=2, target_modules="all-linear"))
    assert [name for name in adapted_names(whole) if "vision_tower" in name]


def test_tied_takes_modules_of_one_shape_where_there_are_no_attention_inputs() -> None:
    names = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 4)}
    base = nn.Module()
    base.blocks = nn.ModuleList(
        [nn.ModuleDict(dict(names)), nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})]
    )
    with pytest.warns(
        UserWarning, match=r"has no attention input projections, .* 4 linear modules .* \(\['a', 'b'\]\)"
    ):
        model = get_peft_model(base, weftlora.TiedLoraConfig(r=2))
    assert set(adapted_names(model)) == {f"blocks.{i}.{last}" for i in (0, 1) for last in "ab"}


def test_tied_does_not_adapt_one_kind_of_block_alone() -> None:
    """As in hybrids of attention and linear attention, where the attention inputs are in one block of four."""

    def block(*names: str) -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    base = nn.Module()
    base.blocks = nn.ModuleList(
        [block("q_proj", "k_proj", "v_proj", "up"), block("in_proj", "up"), block("in_proj", "up")]
    )
    with pytest.warns(UserWarning, match="attention input projections in some of its blocks only"):
        model = get_peft_model(base, weftlora.TiedLoraConfig(r=2))
    assert {name.rpartition(".")[2] for name in adapted_names(model)} == {"in_proj", "up"}


def test_an_adapted_layer_answers_as_the_linear_it_was(llama) -> None:
    for family in ("llama", "gpt2"):
        base = FAMILIES[family].build()
        sizes = {}
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear):
                sizes[name] = module.in_features, module.out_features
            elif type(module).__name__ == "Conv1D":
                sizes[name] = tuple(module.weight.shape)
        model = get_peft_model(base, weftlora.PlainLoraConfig(r=2))
        layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, WeftLinear)}
        assert layers
        for name, layer in layers.items():
            assert (layer.in_features, layer.out_features) == sizes[name]
            assert layer.weight is layer.base_layer.weight
            assert layer.bias is layer.base_layer.bias


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


class Routing(nn.Linear):
    """A router that is a Linear and gives two tensors, as Llama-4's and PhiMoE's."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits.softmax(-1), logits


class PerGroup(nn.Linear):
    """A Linear that wants an axis of groups, as DeepSeek-V4's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight.view(4, -1, self.in_features)
        return torch.einsum("...gi,goi->...go", x.reshape(*x.shape[:-2], 4, self.in_features), w)


class Noisy(nn.Linear):
    """A Linear whose forward is its own and gives what a Linear gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.empty_like(x).uniform_(0.9, 1.1))


@pytest.mark.parametrize(("kind", "says"), [(Routing, "returns a tuple"), (PerGroup, "does not take an input of 8")])
def test_a_linear_whose_call_is_none_is_found_before_a_forward(kind: type[nn.Linear], says: str) -> None:
    def model() -> nn.Sequential:
        made = nn.Sequential()
        made.router, made.inner = kind(8, 8), Noisy(8, 8)
        return made

    with pytest.warns(UserWarning, match=f"all-linear leaves out what cannot carry an adapter: router .*{says}"):
        adapted = get_peft_model(model(), weftlora.PlainLoraConfig(r=2))
    assert adapted_names(adapted) == ["inner"]
    with pytest.raises(weftlora.TargetError, match=says):
        get_peft_model(model(), weftlora.PlainLoraConfig(r=2, target_modules=["router", "inner"]))


def test_a_model_that_is_wrapped_already_is_refused_and_left_as_it_was() -> None:
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(weftlora.ConfigError, match=r"a PeftModel already.*add_adapter\('second', config\)"):
        get_peft_model(model, weftlora.PlainLoraConfig(r=2), adapter_name="second")
    assert list(model.peft_config) == ["default"]
