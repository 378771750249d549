"""What a layer in fewer bits computes is read once, believed where its forward agrees, and refused where it does not."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import weftlora
from families import FAMILIES
from weftlora import kernel
from weftlora.adapted.frozen_weights import Checkpoint, OriginalWeight
from weftlora.adapted.layer import WeftLinear
from weftlora.adapted.quantised import distance, format_of, is_quantised, keep_differentiable, matrix
from weftlora.errors import ConfigError, MergeError, ModelError, TargetError


class InCode(nn.Module):
    """A quantised linear module under a name of its own: rounded to sixteenths, and dequantised as `told` says."""

    def __init__(self, whole: nn.Linear, told: str = "right"):
        super().__init__()
        self.in_features, self.out_features, self.told = whole.in_features, whole.out_features, told
        self.W_q = nn.Parameter((whole.weight.detach() * 16).round().to(torch.int8), requires_grad=False)
        self.bias = None if whole.bias is None else nn.Parameter(whole.bias.detach(), requires_grad=False)
        self.calls = 0

    def dequantize(self) -> Tensor:
        if self.told == "fails":
            raise RuntimeError("no state before the first forward")
        w = self.W_q.float() / 16
        return w.flip(0) if self.told == "wrong" else w

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = F.linear(x, self.W_q.to(x.dtype) / 16, self.bias)
        return y.abs() if self.told == "bent" else y.detach() if self.told == "cut" else y


class _Times(torch.autograd.Function):
    """x Wᵀ with a W that is dequantised in the forward and again in the backward, as layers in 4 bits do it."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Sixteenths) -> Tensor:
        ctx.layer = layer
        return x @ layer.own_matrix().T

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.layer.own_matrix(), None


class Sixteenths(InCode):
    """Under the names of HQQ, which dequantises in the forward and again in the backward; `made` are the matrices that were."""

    def __init__(self, whole: nn.Linear, told: str = "right"):
        super().__init__(whole, told)
        self.made: list[weakref.ref[Tensor]] = []

    def dequantize(self) -> Tensor:
        return self._noted(super().dequantize())

    def own_matrix(self) -> Tensor:
        return self._noted(self.W_q.float() / 16)

    def _noted(self, w: Tensor) -> Tensor:
        self.made.append(weakref.ref(w))
        return w

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = _Times.apply(x, self)
        return y if self.bias is None else y + self.bias


def in_bitsandbytes(whole: nn.Linear) -> nn.Module:
    """NF4 with double quantisation, counting what is dequantised by W's shape."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(whole.in_features, whole.out_features, bias=whole.bias is not None, compute_dtype=torch.float32)
    layer.load_state_dict(whole.state_dict())
    return layer.to("cpu")  # quantised when it is moved


def in_hqq(whole: nn.Linear) -> nn.Module:
    """HQQ's own layer."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=16)
    return HQQLinear(copy.deepcopy(whole), settings, compute_dtype=torch.float32, device="cpu", del_orig=False)


class Quanto(nn.Linear):
    """What weftlora asks of a layer that can be quantised again, in the names that optimum-quanto has for it."""

    weight_qtype, activation_qtype = "sixteenths", None

    @classmethod
    def from_module(cls, whole: nn.Linear, weights: str, activations: None) -> Quanto:
        made = cls(whole.in_features, whole.out_features, bias=whole.bias is not None)
        made.weight, made.bias = whole.weight, whole.bias
        return made

    def freeze(self) -> None:
        self.weight = nn.Parameter(
            (self.weight.detach() * 16).round().clamp(-127, 127).to(torch.int8), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) / 16, self.bias)


def in_quanto(whole: nn.Linear) -> Quanto:
    made = Quanto.from_module(whole, "sixteenths", None)
    made.freeze()
    return made


def test_a_base_through_which_no_gradient_comes_is_refused_for_training(whole: nn.Linear) -> None:
    layer = InCode(whole, "right")
    config = weftlora.PlainLoraConfig(r=2, target_modules=["0"])
    get_peft_model(nn.Sequential(layer), config)
    layer = InCode(whole, "cut")
    with pytest.raises(
        TargetError, match=r"0 is a InCode .* gives its input no gradient, so nothing before it would train"
    ):
        get_peft_model(nn.Sequential(layer), config)
    get_peft_model(nn.Sequential(layer), weftlora.PlainLoraConfig(r=2, target_modules=["0"], inference_mode=True))


@pytest.fixture
def whole() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.mark.parametrize("told", ["right", "wrong", "fails"])
def test_what_is_read_is_what_the_forward_computes(whole: nn.Linear, told: str) -> None:
    layer = InCode(whole, told)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    assert is_quantised(layer)
    assert torch.equal(matrix(layer, "here"), layer.W_q.float() / 16)
    assert layer.calls == 0  # a copy of the layer is asked
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_what_is_no_matrix_is_refused_with_both_reasons(whole: nn.Linear) -> None:
    with pytest.raises(
        ConfigError, match=r"weight of mlp\.up \(InCode\).*dequantises is \d+% off.*identity is \d+% off.*original="
    ) as raised:
        matrix(InCode(whole, "bent"), "mlp.up")
    assert "\n" not in str(raised.value)


def test_plain_layers_of_any_kind_are_not_quantised(whole: nn.Linear) -> None:
    assert not any(is_quantised(layer) for layer in (whole, nn.Embedding(3, 4), nn.LayerNorm(4), nn.Sequential()))
    assert not is_quantised(whole.to(torch.bfloat16))
    assert is_quantised(in_quanto(nn.Linear(6, 4)))


def test_a_wide_layer_is_read_in_parts() -> None:
    layer = InCode(nn.Linear(2500, 3), "fails")
    assert torch.equal(matrix(layer, "wide"), layer.W_q.float() / 16)


def test_what_cannot_be_read_is_refused_before_a_step_is_taken() -> None:
    base = FAMILIES["llama"].build()
    for block in base.model.layers:
        block.mlp.up_proj = InCode(block.mlp.up_proj, "bent")
    model = get_peft_model(base, weftlora.LoraDashConfig(r=2, directions=2, after=1, target_modules=["up_proj"]))
    with pytest.raises(ConfigError, match=r"up_proj \(InCode\) cannot be read"):
        weftlora.attach(model, total_steps=3)
    plain = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2))
    weftlora.attach(plain, total_steps=3)


def test_an_original_is_known_by_what_the_layer_computes(tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path)
    name, right = "model.layers.0.mlp.up_proj", base.model.layers[0].mlp.up_proj
    layer = WeftLinear(InCode(right, "wrong"), name)
    assert torch.equal(OriginalWeight(layer, Checkpoint(tmp_path))(), right.weight)
    in_buffers = InCode(right)  # as GPTQ keeps everything
    kept = in_buffers.W_q.data
    del in_buffers.W_q
    in_buffers.register_buffer("W_q", kept)
    assert torch.equal(OriginalWeight(WeftLinear(in_buffers, name), Checkpoint(tmp_path))(), right.weight)
    torch.manual_seed(1)
    other = nn.Linear(right.in_features, right.out_features)
    with pytest.raises(ModelError, match="differs from the weight in memory"):
        OriginalWeight(WeftLinear(InCode(other), name), Checkpoint(tmp_path))()


def test_no_layer_is_laid_out_anew_once_an_adapter_is_in_the_model() -> None:
    base = FAMILIES["llama"].build()
    for block in base.model.layers:
        block.mlp.up_proj.support_avx512bf16_for_cpu = True  # bitsandbytes' name for it; this one has no adapter
    get_peft_model(base, weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]))
    assert not any(block.mlp.up_proj.support_avx512bf16_for_cpu for block in base.model.layers)


def test_a_layout_is_taken_back_with_its_scales_in_order() -> None:
    class Packed(nn.Linear):
        support_avx512bf16_for_cpu = True

        def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
            self.weight.quant_state.packing_format_for_cpu = False
            return super().state_dict(*args, **kwargs)

    layer = Packed(4, 2)
    scales = torch.arange(6.0).view(2, 3)  # [out, in / block]
    state = type("State", (), {"packing_format_for_cpu": True, "absmax": scales.T.contiguous().bfloat16()})()
    layer.weight.quant_state = state
    keep_differentiable(nn.Sequential(layer))
    assert torch.equal(state.absmax, scales.flatten())
    assert not state.packing_format_for_cpu


def test_a_merge_is_quantised_again_and_taken_back_bit_for_bit() -> None:
    base = FAMILIES["llama"].build()
    for block in base.model.layers:
        block.mlp.up_proj = in_quanto(block.mlp.up_proj)
    kept = [block.mlp.up_proj for block in base.model.layers]
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    layers = [m for m in model.modules() if isinstance(m, WeftLinear)]
    wanted = [layer.base_matrix() + layer.get_delta_weight("default") for layer in layers]
    with pytest.warns(
        UserWarning, match=r"2 quantised modules such as model\.layers\.0\.mlp\.up_proj has lost \d+% of ‖ΔW‖"
    ):
        model.merge_adapter()
    for layer, w in zip(layers, wanted, strict=True):
        assert (layer.base_matrix() - w).abs().max() <= 1 / 32  # half a step
        off, whole = layer.merge_loss
        assert 0 < off < whole
    model.unmerge_adapter()
    assert [layer.get_base_layer() for layer in layers] == kept


def test_a_quantised_base_is_merged_as_it_is_only_where_its_form_can_be_saved(tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.model.layers[0].mlp.up_proj = in_quanto(base.model.layers[0].mlp.up_proj)
    base.hf_quantizer = type("Quantiser", (), {"is_serializable": lambda self: False})()
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(
        MergeError, match=r"saves no model that is quantised so: name a type for dequantised weights.*--original"
    ):
        weftlora.merge(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_how_a_base_is_quantised_is_said_in_words() -> None:
    base = FAMILIES["llama"].build()
    base.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    assert format_of(base) is None  # the config says so, and no layer is
    base.model.layers[0].mlp.up_proj = in_quanto(base.model.layers[0].mlp.up_proj)
    assert format_of(base) == "nf4 (bitsandbytes)"
    base.config.quantization_config = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}},
    }
    assert format_of(base) == "Int8WeightOnly (torchao)"


def test_the_distance_to_another_shape_is_infinite(whole: nn.Linear) -> None:
    assert distance(InCode(whole), whole.weight.T) == float("inf")
    assert distance(InCode(whole), whole.weight) < 0.2


# ---------------------------------------------------------------------- one W for forward and backward

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {"no checkpointing": None, "not reentrant": False, "reentrant": True}
NF4 = pytest.param(
    "NF4", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
)
HQQ = pytest.param("HQQ", marks=pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed"))


def quantised_model(kind: str, checkpointing: str = "no checkpointing") -> nn.Module:
    """Two blocks whose linear modules are in fewer bits, with a trained adapter on each; its input asks for a gradient."""
    torch.manual_seed(0)
    base = FAMILIES["llama"].build()
    make = {
        "HQQ's names": Sixteenths,
        "told wrong": lambda w: Sixteenths(w, "wrong"),
        "NF4": in_bitsandbytes,
        "HQQ": in_hqq,
    }[kind]
    for parent in [module for block in base.model.layers for module in (block.self_attn, block.mlp)]:
        for name in PROJECTIONS:
            if hasattr(parent, name):
                setattr(parent, name, make(getattr(parent, name)))
    base.requires_grad_(False)
    base.enable_input_require_grads()
    if (reentrant := KINDS[checkpointing]) is not None:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    config = weftlora.HydraLoraConfig(r=2, heads=2, target_modules=list(PROJECTIONS), init_lora_weights=False)
    return get_peft_model(base, config).train()


class Counting(TorchDispatchMode):
    """Counts the ops in which bitsandbytes dequantises a W."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made += function._schema.name in ("bitsandbytes::dequantize_4bit", "bitsandbytes::gemm_4bit")
        return function(*args, **(kwargs or {}))


def taken(model: nn.Module) -> tuple[list[Tensor], dict[str, int]]:
    """Loss and gradients of a step, how often it dequantised a W, and how many of these are still there."""
    layers = [m.base_layer for m in model.modules() if isinstance(m, WeftLinear)]
    trained = [p for p in model.parameters() if p.requires_grad]
    made: list[weakref.ref[Tensor]] = []
    with Counting() as ops, pytest.MonkeyPatch.context() as patch:
        for layer in layers:
            if isinstance(layer, Sixteenths):
                layer.made.clear()
            elif hasattr(layer, "W_q"):
                own = layer.dequantize
                patch.setattr(layer, "dequantize", lambda own=own: (w := own(), made.append(weakref.ref(w)))[0])
        loss = model(**FAMILIES["llama"].batch()).loss
        model.zero_grad()
        loss.backward()
    made += [ref for layer in layers if isinstance(layer, Sixteenths) for ref in layer.made]
    count = {"made": ops.made + len(made), "alive": sum(ref() is not None for ref in made)}
    return [loss.detach(), *(p.grad.clone() for p in trained)], count


@lru_cache
def without_sharing(kind: str) -> list[Tensor]:
    with kernel.switched(dequantised=False):
        return taken(quantised_model(kind))[0]


@pytest.mark.parametrize("kind", ["HQQ's names", HQQ, NF4])
@pytest.mark.parametrize(
    ("checkpointing", "said", "times"),
    [
        ("no checkpointing", None, 2),
        ("no checkpointing", True, 1),
        ("not reentrant", None, 2),
        ("not reentrant", False, 3),
        ("reentrant", None, 2),
        ("reentrant", False, 3),
    ],
)
def test_one_dequantised_matrix_serves_a_forward_and_its_backward(
    kind: str, checkpointing: str, said: bool | None, times: int
) -> None:
    """How often per layer and step: unasked under checkpointing only. Numbers are the same, and nothing is left of it afterwards."""
    want = without_sharing(kind)
    model = quantised_model(kind, checkpointing)
    with kernel.switched(dequantised=said):
        taken(model)  # each W is compared with what its layer computes, once
        got, count = taken(model)
    assert count["made"] == times * 2 * len(PROJECTIONS)
    assert count["alive"] == 0
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm().clamp_min(1e-6)


def test_what_is_saved_at_once_is_one_block_under_checkpointing_and_the_base_without(monkeypatch) -> None:
    """The most matrices that live at a time."""
    for checkpointing, said, most in (
        ("not reentrant", None, 7),
        ("reentrant", None, 7),
        ("no checkpointing", True, 14),
    ):
        model = quantised_model("HQQ's names", checkpointing)
        layers = [m.base_layer for m in model.modules() if isinstance(m, WeftLinear)]
        alive: list[int] = []

        def noted(self: Sixteenths, w: Tensor) -> Tensor:
            self.made.append(weakref.ref(w))
            alive.append(sum(ref() is not None for layer in layers for ref in layer.made))  # noqa: B023
            return w

        with kernel.switched(dequantised=said), monkeypatch.context() as patch:
            taken(model)
            patch.setattr(Sixteenths, "_noted", noted)
            taken(model)
        assert max(alive) == most


def test_a_layer_is_called_where_its_matrix_cannot_be_shared() -> None:
    """Its quantiser gives another W than it computes with; nobody asks for a gradient; autocast asks for another type."""
    batch = FAMILIES["llama"].batch()
    for kind in ("told wrong", "HQQ's names"):
        model = quantised_model(kind)
        layers = [m.base_layer for m in model.modules() if isinstance(m, WeftLinear)]

        def called(run: Callable[[], object]) -> list[int]:
            before = [layer.calls for layer in layers]  # noqa: B023
            with kernel.switched(dequantised=True):
                run()
            return [layer.calls - was for layer, was in zip(layers, before, strict=True)]  # noqa: B023

        got, _ = taken(model)
        for mine, theirs in zip(got, without_sharing("HQQ's names"), strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm().clamp_min(1e-6)
        assert called(lambda: model(**batch)) == [1 if kind == "told wrong" else 0] * 14  # noqa: B023
        with torch.no_grad():
            assert called(lambda: model(**batch)) == [1] * 14  # noqa: B023
        with torch.autocast("cpu", torch.bfloat16):
            assert called(lambda: model(**batch))[0] == 1  # noqa: B023 (q_proj, which reads fp32)


def test_all_linear_takes_what_a_quantiser_put_in_classes_of_its_own() -> None:
    """As GPTQ does it: without, nothing is left of such a model. The output layer stays, and an embedding is no linear module."""
    base = FAMILIES["llama"].build()
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, InCode(module))
    config = weftlora.WeftConfig(r=2, target_modules="all-linear")
    with pytest.raises(TargetError, match="has no linear module"):
        get_peft_model(base, config)
    base.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model = get_peft_model(base, weftlora.WeftConfig(r=2))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, WeftLinear)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
