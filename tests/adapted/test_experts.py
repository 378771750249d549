"""Experts of a mixture as fused parameters: every layout against a plain loop, both ways, every structure, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

import weftlora
from weftlora import Dash, Directions, Hydra, Reallocate, Tied, WeftConfig
from weftlora.adapted.experts import (
    WeftExperts,
    WeftExpertWeight,
    expert_parameters,
    fused,
    layout_of,
    make_experts_plain,
)
from weftlora.adapted.updates import base_matrix
from weftlora.errors import AdapterError, ConfigError, MergeError, TargetError
from weftlora.kernel import use_reference

moe = pytest.importorskip("transformers.integrations.moe")
E, HIDDEN, INNER, TOP = 4, 12, 8, 2


def qwen() -> nn.Module:
    """A tiny Qwen3-MoE: 2 layers of 4 experts, [E, out, in], gate over up."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2, head_dim=8,
            num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
        )
    ).eval()  # fmt: skip


def gpt_oss() -> nn.Module:
    """A tiny gpt-oss: transposed, gate and up in turn, biases."""
    torch.manual_seed(0)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=2, head_dim=8, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        )
    ).eval()  # fmt: skip


IDS = torch.arange(24).view(2, 12) * 7 % 32


def experts_of(*, transposed: bool, interleaved: bool, bias: bool, gate: bool) -> nn.Module:
    """A module of experts of this layout in fp64, whose own forward is a plain loop over them."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts = E
            sides = {
                ("gate_up_proj" if gate else "up_proj"): (INNER * (1 + gate), HIDDEN),
                "down_proj": (HIDDEN, INNER),
            }
            for name, (out, fan_in) in sides.items():
                shape = (fan_in, out) if transposed else (out, fan_in)
                self.register_parameter(name, nn.Parameter(torch.randn(E, *shape, dtype=torch.float64)))
                if bias:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, out, dtype=torch.float64)))

        def act_fn(self, x: Tensor) -> Tensor:
            return F.silu(x)

        def _apply_gate(self, x: Tensor) -> Tensor:
            one, two = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
            return F.silu(one) * two

        def one(self, x: Tensor, e: int, name: str) -> Tensor:
            w = getattr(self, name)[e]
            return F.linear(x, w.T if transposed else w, getattr(self, f"{name}_bias")[e] if bias else None)

        def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for t in range(len(x)):
                for e, w in zip(chosen[t].tolist(), weights[t], strict=True):
                    h = self.one(x[t], e, "gate_up_proj" if gate else "up_proj")
                    h = self._apply_gate(h) if gate else self.act_fn(h)
                    out[t] = out[t] + w * self.one(h, e, "down_proj")
            return out

    made = moe.use_experts_implementation(
        Experts, is_transposed=transposed, is_concatenated=not interleaved, has_bias=bias, has_gate=gate
    )
    return made(PreTrainedConfig())


class Mixture(nn.Module):
    """One layer of experts behind a fixed choice of them."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.stack([torch.arange(len(x)) % 3, torch.arange(len(x)) % 2 + 1], 1)  # no token is expert 3's
        weights = torch.linspace(0.1, 1, 2 * len(x), dtype=x.dtype).view(-1, 2)
        return self.experts(x, chosen, weights)


LAYOUTS = {
    "out, in": {"transposed": False, "interleaved": False, "bias": False, "gate": True},
    "transposed": {"transposed": True, "interleaved": False, "bias": False, "gate": True},
    "interleaved, biases": {"transposed": True, "interleaved": True, "bias": True, "gate": True},
    "no gate": {"transposed": False, "interleaved": False, "bias": True, "gate": False},
}


def _adapted(layout: str, **fields: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    mixture = Mixture(experts_of(**LAYOUTS[layout]))
    names = ["experts.gate_up_proj" if LAYOUTS[layout]["gate"] else "experts.up_proj", "experts.down_proj"]
    config = WeftConfig(r=3, target_parameters=names, init_lora_weights=False, **fields)
    model = get_peft_model(mixture, config, autocast_adapter_dtype=False)
    return model, model.base_model.model.experts


def _value_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *trained], allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_by_tokens_is_by_weights_is_a_plain_loop_over_the_experts(layout: str) -> None:
    model, experts = _adapted(layout)
    x = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert experts.by_weights is None
    by_tokens = _value_and_gradients(model, x)
    experts.by_weights = "told so"
    experts.base_layer.config = experts._configs[0]
    by_weights = _value_and_gradients(model, x)  # W + ΔW in the module's own forward, the loop
    for one, other in zip(by_tokens, by_weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert by_tokens[2].abs().max() > 0
    down = [layer for layer in experts.layers() if layer.name == "down_proj"]
    delta = down[0].site("default").delta_weight()
    assert delta.shape == (E, HIDDEN, INNER)


def test_the_expert_that_no_token_chose_gets_no_gradient() -> None:
    model, experts = _adapted("out, in")
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    model(x).square().sum().backward()
    grad = experts.down_proj.site("default").structure.A.grad
    assert grad.shape == (E, 3, INNER)
    assert (grad.abs().amax((1, 2)) > 0).tolist() == [True, True, True, False]


def test_dropout_takes_elements_of_the_adapters_input_alone() -> None:
    model, _ = _adapted("interleaved, biases", lora_dropout=0.5)
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    off = model.eval()(x)
    torch.testing.assert_close(off, _adapted("interleaved, biases")[0].eval()(x))
    model.train()
    torch.manual_seed(3)
    one = model(x)
    torch.manual_seed(3)
    assert torch.equal(one, model(x))
    assert not torch.equal(one, model(x))
    with model.disable_adapter():
        base = model(x)
    torch.testing.assert_close(base, Mixture(model.base_model.model.experts.base_layer)(x))


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "hydra": (qwen, {"structure": Hydra(heads=2)}),
    "hydra reads A x, with dash": (
        gpt_oss, {"structure": Hydra(heads=2, router_input="Ax"), "boost": Dash(directions=2, after=1)},
    ),
    "one A of all experts": (gpt_oss, {"structure": Tied(group="experts")}),
    "one pair of all layers": (qwen, {"structure": Tied(group="module_type"), "target_modules": "all-linear"}),
    "directions and dash": (gpt_oss, {"start": Directions(after=1), "boost": Dash(directions=2, after=1)}),
    "rank per expert": (
        qwen, {"rank_pattern": {r"layers.0.mlp.experts.gate_up_proj.1": 2, "experts.down_proj.3": 5}},
    ),
}  # fmt: skip
"""Each on one of the two layouts of models: which one that is does not meet what a structure is, and the loops above have both."""


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_every_structure_starts_as_the_base_trains_and_comes_back(structure: str, tmp_path: Path) -> None:
    make, fields = STRUCTURES[structure]
    base = make()
    before = base(IDS, labels=IDS).loss
    model = get_peft_model(base, WeftConfig(r=3, **fields))
    assert sum(isinstance(m, WeftExpertWeight) for m in model.modules()) == 4
    torch.testing.assert_close(model(IDS, labels=IDS).loss, before, rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=2e-2))
    for _ in range(2):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = model(IDS, labels=IDS)
    logits = found.logits
    assert found.loss < before
    with use_reference():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make(), str(tmp_path), adapter_name="other").eval()
    assert torch.equal(loaded(IDS).logits, logits)
    if not model.peft_config["default"].structure.routed:
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, logits)
    plain = model.unload()
    assert not any(isinstance(m, (WeftExperts, WeftExpertWeight)) for m in plain.modules())
    torch.testing.assert_close(plain(IDS, labels=IDS).loss, before)


def test_the_experts_of_a_layer_share_one_A_and_have_a_B_each() -> None:
    model = get_peft_model(qwen(), WeftConfig(r=3, structure=Tied(group="experts")))
    layers = [m for m in model.modules() if isinstance(m, WeftExpertWeight)]
    terms = [layer.site("default").structure for layer in layers]
    assert [term.A.dim() for term in terms] == [2] * 4
    assert len({id(term.A) for term in terms}) == 4
    assert {tuple(term.B.shape) for term in terms} == {(4, 24, 3), (4, 16, 3)}
    assert not any("q_proj" in name for name, p in model.named_parameters() if p.requires_grad)


def test_an_expert_is_a_site_of_views() -> None:
    model = get_peft_model(gpt_oss(), WeftConfig(r=3, init_lora_weights=False))
    layer = next(m for m in model.modules() if isinstance(m, WeftExpertWeight))
    batch, members = layer.site("default"), layer.members("default")
    assert [m.name for m in members] == [f"model.layers.0.mlp.experts.gate_up_proj.{e}" for e in range(4)]
    torch.testing.assert_close(batch.delta_weight()[2], members[2].site.delta_weight())
    torch.testing.assert_close(layer.get_delta_weight("default")[2], members[2].site.delta_weight().T)
    with torch.no_grad():
        members[2].site.structure.B.zero_()
    assert (batch.structure.B[2] == 0).all()
    assert (batch.structure.B[1] != 0).any()
    w, source = base_matrix(model, members[1].name)
    assert torch.equal(w, layer.weight[1].T)
    assert source == "in memory"


def test_two_adapters_on_the_experts_add_up_and_go_alone() -> None:
    model = get_peft_model(qwen(), WeftConfig(r=2, target_parameters=["experts.down_proj"], init_lora_weights=False))
    one = model(IDS).logits
    model.add_adapter("two", WeftConfig(r=3, target_parameters=["experts.gate_up_proj"], init_lora_weights=False))
    assert torch.equal(model(IDS).logits, one)
    model.base_model.set_adapter(["default", "two"])
    both = model(IDS).logits
    assert not torch.equal(both, one)
    model.delete_adapter("two")
    assert torch.equal(model(IDS).logits, one)


ROWS = [{"input_ids": IDS[0].roll(k), "labels": IDS[0].roll(k)} for k in range(4)]


def test_ranks_move_between_experts_by_their_estimate() -> None:
    moves = Reallocate(first=2, every=1, max_rounds=1, rows=2, move=3)
    model = get_peft_model(qwen(), WeftConfig(r=4, target_parameters=["experts.down_proj"], ranks=moves))
    layer = next(m for m in model.modules() if isinstance(m, WeftExpertWeight))
    assert layer.site("default").mask.shape == (4, 5)  # 1.25 r
    weftlora.attach(model, validation=ROWS, total_steps=3)
    assert model.peft_config["default"].ranks.score == "taylor (auto)"
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2))
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = torch.stack([m.site("default").mask for m in model.modules() if isinstance(m, WeftExpertWeight)])
    assert masks.sum() == 2 * 4 * 4
    ranks = masks.sum(2)
    assert ranks.max() == 5
    assert ranks.min() < 4
    site = layer.site("default")
    assert (site.structure.B.movedim(2, 1)[site.mask == 0] == 0).all()
    moments = optimizer.state[site.structure.A]["exp_avg_sq"]
    assert moments.shape == site.structure.A.shape
    assert (moments[site.mask == 0] == 0).all()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


class Sixteenths(nn.Module):
    """A parametrisation as bitsandbytes makes one of experts: whole numbers are kept, and their sixteenths computed with."""

    def right_inverse(self, w: Tensor) -> Tensor:
        return (w * 16).round().to(torch.int8)

    def forward(self, kept: Tensor) -> Tensor:
        return kept.float() / 16


class Coded(Tensor):
    """A parameter as torchao keeps one, with a way back of its own; its numbers are left as they are."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize().clone().as_subclass(Coded)


def _in_fewer_bits(experts: nn.Module, how: str) -> None:
    for name in fused(experts):
        if how == "computed":
            w = getattr(experts, name)
            setattr(experts, name, nn.Parameter(Sixteenths().right_inverse(w.detach()), requires_grad=False))
            parametrize.register_parametrization(experts, name, Sixteenths(), unsafe=True)
        elif how == "coded":
            w = getattr(experts, name).detach().as_subclass(Coded)
            setattr(experts, name, nn.Parameter(w, requires_grad=False))
        else:
            setattr(
                experts,
                name,
                nn.Parameter(getattr(experts, name).detach().to(torch.float8_e4m3fn), requires_grad=False),
            )


@pytest.mark.parametrize(("how", "door"), [("computed", True), ("computed", False), ("coded", True)])
def test_experts_in_fewer_bits_are_computed_as_in_numbers(how: str, door: bool) -> None:
    torch.manual_seed(0)
    mixture = Mixture(experts_of(**LAYOUTS["transposed"])).float()
    if not door:
        del mixture.experts.has_gate
    _in_fewer_bits(mixture.experts, how)
    fields = {"target_parameters": ["gate_up_proj", "down_proj"], "init_lora_weights": False}
    config = WeftConfig(r=3, **fields)
    model = get_peft_model(mixture, config, autocast_adapter_dtype=False)
    layers = list(model.base_model.model.experts.layers())
    by_tokens = how == "computed" and door
    assert (model.base_model.model.experts.by_weights is None) == by_tokens
    assert {layer.base_source for layer in layers} == {"dequantised"}
    x = torch.randn(5, HIDDEN, requires_grad=True)
    found = _value_and_gradients(model, x)
    if not by_tokens:
        with pytest.raises(TargetError, match="by its weights only"):
            get_peft_model(mixture, WeftConfig(structure=Hydra(heads=2), **fields))
    with pytest.raises(MergeError, match="not a plain parameter"):
        model.merge_adapter()
    plain = copy.deepcopy(model)
    make_experts_plain(plain)
    assert {layer.base_source for layer in plain.base_model.model.experts.layers()} == {"in memory"}
    expected = _value_and_gradients(plain, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert torch.equal(model(x), found[0])


def test_bytes_that_nobody_reads_are_refused() -> None:
    mixture = Mixture(experts_of(**LAYOUTS["out, in"]))
    _in_fewer_bits(mixture.experts, "bytes")
    with pytest.raises(TargetError, match="gate_up_proj of Experts is kept as float8_e4m3fn"):
        get_peft_model(mixture, WeftConfig(r=3, target_parameters=["gate_up_proj"]))
    assert not any(isinstance(m, WeftExperts) for m in mixture.modules())


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such expert": ({"rank_pattern": {"experts.down_proj.4": 2}}, ConfigError, "names expert 4 .* has 4"),
    "no such parameter": ({"target_parameters": ["experts.up"]}, TargetError, "none of Qwen3MoeForCausalLM"),
    "no expert": ({"target_parameters": ["q_proj.weight"]}, TargetError, "no experts'"),
    "a module": ({"target_modules": ["q_proj", "experts"]}, TargetError, "target_parameters"),
    "balance": (
        {"structure": Hydra(heads=2, balance=0.1), "target_parameters": ["experts.down_proj"]}, TargetError, "balance=0",
    ),
    "ranks of a tied A": (
        {"structure": Tied(group="experts"), "rank_pattern": {"experts.down_proj.1": 2}}, ConfigError, "share matrices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_is_said_before_anything_is_changed(what: str) -> None:
    fields, error, sentence = REFUSED[what]
    base = qwen()
    with pytest.raises(error, match=sentence):
        get_peft_model(base, WeftConfig(r=3, **fields))
    assert not any(isinstance(m, WeftExperts) for m in base.modules())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"structure": Hydra(heads=2)}, "router per token"), ({"lora_dropout": 0.1}, "lora_dropout=0.1 drops")],
)
def test_by_weights_is_for_unrouted_structures_without_dropout(fields: dict[str, Any], sentence: str) -> None:
    mixture = nn.Sequential()
    mixture.experts, mixture.last = Cubes("eoi,ti->to", 4, 6), nn.Linear(4, 4)
    assert expert_parameters(mixture) == ["experts.weight"]
    assert fused(mixture.experts) == ["weight"]
    with pytest.raises(TargetError, match=sentence):
        get_peft_model(mixture, WeftConfig(r=2, target_parameters=["experts.weight"], **fields))
    with pytest.warns(UserWarning, match="all-linear leaves out what cannot carry"):
        get_peft_model(mixture, WeftConfig(r=2, **fields))


class Cubes(nn.Module):
    """Three experts with a forward of its own, whose matrices lie as `equation` says."""

    def __init__(self, equation: str, *sides: int) -> None:
        super().__init__()
        self.num_experts, self.equation = 3, equation
        self.weight = nn.Parameter(torch.randn(3, *sides))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, self.weight, x)


def _llama4() -> nn.Module:
    return Llama4TextExperts(Llama4TextConfig(num_local_experts=3, hidden_size=6, intermediate_size=4))


TOLD: dict[str, tuple[Callable[[], nn.Module], str, tuple[bool, int, int]]] = {
    "by what it states": (lambda: JetMoeParallelExperts(3, 6, 4), "weight", (False, 6, 4)),
    "by gate and up": (_llama4, "gate_up_proj", (True, 6, 8)),
    "by the other parameter": (_llama4, "down_proj", (True, 4, 6)),
    "by its forward, [out, in]": (lambda: Cubes("eoi,ti->to", 4, 6), "weight", (False, 6, 4)),
    "by its forward, [in, out]": (lambda: Cubes("eio,ti->to", 4, 6), "weight", (True, 4, 6)),
}


@pytest.mark.parametrize("how", list(TOLD))
def test_how_matrices_lie_is_what_the_module_says(how: str) -> None:
    make, name, expected = TOLD[how]
    layout = layout_of(make(), name)
    assert (layout.transposed, layout.fan_in, layout.out) == expected


def test_a_layout_that_nobody_knows_is_refused_in_one_sentence() -> None:
    class Two(Cubes):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            return super().forward(x)

    square, silent, torn = Cubes("eoi,ti->to", 6, 6), Two("eoi,ti->to", 4, 6), _llama4()
    torn.is_transposed = False
    for experts, said in ((square, "nor the sides"), (silent, "nor the sides"), (torn, "disagrees")):
        model = nn.ModuleDict({"experts": experts})
        name = "gate_up_proj" if experts is torn else "weight"
        with pytest.raises(TargetError, match=f"experts.{name} holds matrices .*{said}"):
            get_peft_model(model, WeftConfig(r=2, target_parameters=[f"experts.{name}"]))
        assert not any(isinstance(m, WeftExperts) for m in model.modules())
    square.is_transposed = True
    assert layout_of(square, "weight").transposed


def test_experts_run_outside_of_a_compiled_graph() -> None:
    model, _ = _adapted("out, in")
    x = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    expected = _value_and_gradients(model, x)
    for one, other in zip(_value_and_gradients(torch.compile(model, backend="eager"), x), expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()
    with pytest.raises(Unsupported, match="experts run outside of compiled graphs"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()


def test_all_linear_leaves_experts_out_where_it_is_told_so() -> None:
    model = get_peft_model(qwen(), WeftConfig(r=2, target_parameters=[]))
    assert not any(isinstance(m, WeftExperts) for m in model.modules())
    model = get_peft_model(qwen(), WeftConfig(r=2, layers=weftlora.Only([1])))
    paths = [name for name, m in model.named_modules() if isinstance(m, WeftExperts)]
    assert paths == ["base_model.model.model.layers.1.mlp.experts"]


def test_a_batch_of_rows_with_an_adapter_each_is_refused_on_experts() -> None:
    model = get_peft_model(qwen(), WeftConfig(r=2)).eval()
    with pytest.raises(AdapterError, match="as one list"):
        model(input_ids=IDS, adapter_names=["default", "__base__"])
