"""Base layers that keep their weight in fewer bits: which they are, the matrix they compute with, and another one put into them.

    y = x Wᵀ + b        W [out, in] is what the layer computes with, however its bytes are laid out

The quantiser's own dequantisation is asked first, and believed only where x Wᵀ + b is what the layer's forward gives for random x:
bitsandbytes, for one, lays NF4 weights out anew on some CPUs and then dequantises them 144 % off. Where it is not believed, or there
is none, W is read out of the forward, whose rows for x = I are the columns of W, and is checked in the same way. Nothing in the
layer changes, and a layer that computes something else than x Wᵀ + b is refused.

A layer in 4 bits dequantises W in its forward and once more in its backward. Where a node may own the linear, one W serves both: it is
kept for the backward with what else the node saves (`WEFT_DEQUANTISED`, `weftlora.kernel.switches`). Of all layers that would be the
whole base in 16 bits, so unasked it is done under gradient checkpointing only, where it is one block at a time: what is saved in the
first pass is thrown away, and what is saved in the second lives until the backward of that block, which follows.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from weftlora.adapter.shards import is_shard
from weftlora.errors import ConfigError, MergeError, TargetError
from weftlora.kernel import current

NEAR = 0.05
"""‖x Wᵀ + b − forward(x)‖ / ‖forward(x) − b‖ up to which W is believed; a layer that rounds x to 8 bits is off by 0.01."""
PROBES, ROWS = 8, 1024
"""Random rows that W is checked on, and rows of the identity that a forward is given at a time."""


def is_quantised(base: nn.Module) -> bool:
    """Whether a base layer keeps its weight in fewer bits than it computes with, or in no single tensor."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return isinstance(getattr(base, "in_features", None), int)  # GPTQ, AWQ and HQQ: under other names
    kind = type(weight)
    own = (
        getattr(kind, "dequantize", Tensor.dequantize) is not Tensor.dequantize
    )  # torchao and quanto: a float by its dtype
    return own or not weight.is_floating_point() or weight.dtype.itemsize == 1


def matrix(base: nn.Module, name: str) -> Tensor:
    """W [out, in] that a quantised layer computes with, in the type that it is kept for; `name` is for the error.

    Raises:
        ConfigError: neither what its quantiser dequantises nor what its forward does to the identity is what its forward computes.
    """
    told: list[str] = []
    for what, read in (("its quantiser dequantises", stored), ("its forward makes of the identity", _computed)):
        try:
            w = read(base)
            off = None if w is None else distance(base, w)
        except Exception as error:  # foreign code, which fails in any way
            first = (str(error).strip().splitlines() or [""])[0][:200]
            told.append(f"what {what} cannot be had ({type(error).__name__}: {first})")
            continue
        if w is not None and off is not None:
            if off <= NEAR:
                return w.detach()
            told.append(f"what {what} is {off:.0%} off what it computes")
    raise ConfigError(
        f"the weight of {name} ({type(base).__name__}) cannot be read: {', and '.join(told)}; name the folder of the unquantised "
        "checkpoint (original=...), or load the base in another form."
    )


def stored(base: nn.Module) -> Tensor | None:
    """W [out, in] as the layer's quantiser dequantises it, to be checked; None where nobody knows how. It raises what that raises."""
    if hasattr(base, "W_q"):  # HQQ
        return cast(Tensor, cast(Any, base).dequantize())
    weight: Any = getattr(base, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if type(weight).dequantize is not Tensor.dequantize:  # torchao, quanto
        return weight.dequantize()
    if (state := getattr(weight, "quant_state", None)) is not None:  # bitsandbytes in 4 bits
        from bitsandbytes.functional import dequantize_4bit

        return cast(Tensor, dequantize_4bit(weight.data, state))
    scale = getattr(
        weight, "SCB", None
    )  # bitsandbytes in 8 bits: before the first forward with the weight, then with the layer
    scale = getattr(getattr(base, "state", None), "SCB", None) if scale is None else scale
    if scale is not None and weight.dtype == torch.int8:
        return weight.data.float() * (scale.float() / 127).unsqueeze(1)
    return None


def distance(base: nn.Module, w: Tensor) -> float:
    """How far x Wᵀ is from what a layer computes without its bias, relative to that, over random x; infinite for another shape."""
    sides = _sides(base)
    if tuple(w.shape) != (sides[1], sides[0]):
        return float("inf")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, sides[0], generator=draw)
    y = _forward(base, x)
    off = (x.to(y.device) @ w.detach().to(y.device, torch.float32).T - y).norm() / y.norm().clamp_min(
        torch.finfo(torch.float32).tiny
    )
    return float(off.nan_to_num(nan=float("inf")))


def _computed(base: nn.Module) -> Tensor:
    """W [out, in] out of the forward: its rows for the rows of the identity."""
    fan_in = _sides(base)[0]
    return torch.cat([_forward(base, _unit_rows(start, fan_in)) for start in range(0, fan_in, ROWS)]).T.contiguous()


def _unit_rows(start: int, size: int) -> Tensor:
    """Rows of the identity from `start` on."""
    rows = torch.zeros(min(ROWS, size - start), size)
    rows.diagonal(start).fill_(1)
    return rows


def _forward(base: nn.Module, x: Tensor) -> Tensor:
    """What a layer computes of x [n, in] without its bias, fp32; the layer, its hooks and the graph are left alone."""
    own = copy.copy(base)  # a forward may remember the type of its first input
    own.__dict__["_parameters"] = dict(base._parameters)
    device, dtype = _place(base)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        # with a graph: bitsandbytes lays a weight out anew in a forward without one
        y = own.forward(x.to(device, dtype, copy=True).requires_grad_()).detach().float()
        bias = getattr(base, "bias", None)
        return y if bias is None else y - bias.detach().float()


def _place(base: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a layer computes, and in which type."""
    tensors = [*base.parameters(recurse=False), *base.buffers(recurse=False)]
    tensors += [t for t in (getattr(base, "W_q", None),) if isinstance(t, Tensor)]
    wide = [t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
    said = getattr(base, "compute_dtype", None)
    dtype = said if isinstance(said, torch.dtype) else (wide or [torch.float32])[0]
    return tensors[0].device if tensors else torch.device("cpu"), dtype


def _sides(base: nn.Module) -> tuple[int, int]:
    return cast(int, base.in_features), cast(int, base.out_features)


def format_of(model: Any) -> str | None:
    """How the weights of a model of transformers are quantised, in words (`nf4 (bitsandbytes)`); None where they are not."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    if found is None or not any(is_quantised(layer) for layer in _layers(model)):
        return None
    said: dict[str, Any] = dict(found if isinstance(found, Mapping) else found.to_dict())
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method")))
    if said.get("load_in_4bit"):
        double = ", double quantisation" if said.get("bnb_4bit_use_double_quant") else ""
        return f"{said.get('bnb_4bit_quant_type')} (bitsandbytes{double})"
    if said.get("load_in_8bit"):
        return "int8 (bitsandbytes)"
    kind = said.get("quant_type") or said.get("weights") or (f"{said['bits']} bits" if "bits" in said else None)
    if isinstance(kind, Mapping):  # torchao: {"default": {"_type": "Int8WeightOnlyConfig", ...}}
        kind = str(dict(kind.get("default", {})).get("_type", "")).removesuffix("Config")
    return method if not kind else f"{kind} ({method})"


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that could be quantised linear layers, those under adapters included."""
    return (module for module in model.modules() if isinstance(getattr(module, "in_features", None), int))


# ---------------------------------------------------------------------- one W for forward and backward


def is_shared(base: nn.Module) -> bool:
    """Whether one dequantised W of this layer serves a forward that begins now and its backward."""
    said = current().dequantised
    if said is False or not _is_in_4_bits(base) or torch.compiler.is_compiling():
        return False
    return bool(said) or _is_checkpointed()


def _is_in_4_bits(base: nn.Module) -> bool:
    """A layer of bitsandbytes in 4 bits or of HQQ, which both dequantise in the forward and again in the backward."""
    weight = getattr(base, "weight", None)
    if getattr(weight, "quant_state", None) is None and not hasattr(base, "W_q"):
        return False
    return not is_shard(weight)


def _is_checkpointed() -> bool:
    """Whether what this forward saves is forgotten after it, or is made for a backward that follows at once."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None:
        return getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"
    return torch._C._current_graph_task_id() != -1


_believed: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], bool]] = weakref.WeakKeyDictionary()
"""Of layers whose dequantised W was compared with what they compute: in which form they were, and whether it is that."""


def dequantised(base: nn.Module, x: Tensor) -> Tensor | None:
    """W [out, in] of a layer in 4 bits as its forward makes it for x; None where the layer computes in another dtype than x's, where
    nobody will ask for a gradient of x, or where W is not what the layer computes with."""
    if not (torch.is_grad_enabled() and x.requires_grad and _computes_in(base, x.dtype)):
        return None
    kept: Any = getattr(base, "weight", None)
    state = getattr(kept, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        return None
    kept = base.W_q if state is None else kept
    form = (kept.device, kept.dtype, x.dtype)
    with torch.no_grad():
        if state is None:
            w = stored(base)
        else:
            from bitsandbytes.functional import dequantize_4bit

            state = copy.copy(state)
            state.dtype = x.dtype  # not first in that of its checkpoint
            w = dequantize_4bit(kept.data, state)
        assert w is not None
        w = w.to(x)
    seen = _believed.get(base)
    if seen is None or seen[0] != form:
        with torch.autograd.graph.saved_tensors_hooks(
            _as_it_is, _as_it_is
        ):  # checkpointing counts what a forward saves
            seen = _believed[base] = form, distance(base, w) <= NEAR
    return w if seen[1] else None


def _as_it_is(t: Tensor) -> Tensor:
    return t


def _computes_in(base: nn.Module, dtype: torch.dtype) -> bool:
    said = getattr(base, "compute_dtype", None)
    if said in (None, dtype):
        return True
    # bitsandbytes: the first forward sets it to the type of its input
    return not getattr(base, "compute_type_is_set", True) and dtype in (torch.float32, torch.bfloat16)


# ---------------------------------------------------------------------- a matrix put in


def requantised(base: nn.Module, w: Tensor, quantiser: Any = None) -> nn.Module:
    """A layer like `base` with the weight W [out, in], quantised as its own is; `base` stays as it was.

    Args:
        quantiser: transformers' quantiser of the whole model (`model.hf_quantizer`), which torchao's settings are taken from.

    Raises:
        MergeError: no way to quantise for such a layer is known here, or its quantiser fails.
    """
    way = _way(base, quantiser)
    if way is None:
        raise MergeError(
            f"a {type(base).__name__} takes no other weight: merge into the unquantised checkpoint (original=..., --original) or into "
            "dequantised weights (dtype='bfloat16', --dtype bfloat16), or export the adapter as LoRA, which is exact."
        )
    try:
        return way(base, w.detach()).train(base.training)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        NotImplementedError,
        AssertionError,
        AttributeError,
        ImportError,
    ) as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise MergeError(
            f"a {type(base).__name__} cannot be quantised again ({type(error).__name__}: {first}): merge into dequantised weights "
            "(dtype='bfloat16'), or export the adapter as LoRA."
        ) from None


def can_be_requantised(base: nn.Module, quantiser: Any = None) -> bool:
    """Whether `requantised` knows a way for this layer."""
    return _way(base, quantiser) is not None


def _way(base: nn.Module, quantiser: Any) -> Callable[[Any, Tensor], nn.Module] | None:
    weight: Any = getattr(base, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return _in_4_bits
    if getattr(weight, "has_fp16_weights", None) is False:
        return _in_8_bits
    if hasattr(base, "weight_qtype") and hasattr(base, "freeze"):
        return _by_quanto
    settings = getattr(getattr(quantiser, "quantization_config", None), "get_apply_tensor_subclass", None)
    if settings is not None and type(weight).__module__.startswith("torchao."):
        return lambda layer, w: _by_torchao(layer, w, settings())
    return None


def _twin(base: Any) -> Any:
    """A layer of its own around the same tensors."""
    twin = copy.copy(base)
    for part in ("_parameters", "_buffers"):
        twin.__dict__[part] = dict(base.__dict__[part])
    return twin


def _in_4_bits(base: Any, w: Tensor) -> nn.Module:
    from bitsandbytes.nn import Params4bit

    old, state, twin = base.weight, base.weight.quant_state, _twin(base)
    # quantised when it is moved, also to where it is
    twin.weight = Params4bit(
        w.to("cpu", state.dtype),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=old.quant_storage,
        module=twin,
    ).to(old.device)
    return cast(nn.Module, twin)


def _in_8_bits(base: Any, w: Tensor) -> nn.Module:
    from bitsandbytes.nn import Int8Params

    twin = _twin(base)
    twin.state = copy.copy(base.state)
    twin.state.CB = twin.state.SCB = None
    twin.weight = Int8Params(w.to("cpu"), requires_grad=False, has_fp16_weights=False).to(base.weight.device)
    return cast(nn.Module, twin)


def _by_quanto(base: Any, w: Tensor) -> nn.Module:
    settings = {"weights": base.weight_qtype, "activations": base.activation_qtype}
    layer = type(base).from_module(_linear(base, w), **settings)
    layer.freeze()
    return cast(nn.Module, layer).requires_grad_(False)


def _by_torchao(base: Any, w: Tensor, settings: Any) -> nn.Module:
    from torchao.quantization import quantize_

    layer = _linear(base, w)
    quantize_(layer, settings)
    return layer.requires_grad_(False)


def _linear(base: Any, w: Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=base.bias is not None, device="meta")
    layer.weight = nn.Parameter(w.to(*_place(base)), requires_grad=False)
    if base.bias is not None:
        layer.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
    return layer


# ---------------------------------------------------------------------- what training needs of them


def cuts_gradients(base: nn.Module) -> bool:
    """Whether a quantised layer's forward gives its input no gradient (one that rounds x to 8 bits as well, say); False where the
    forward cannot be run by itself."""
    own = _twin(base)  # a forward may remember the type of its first input
    device, dtype = _place(base)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return not own.forward(
                torch.ones(2, _sides(base)[0], device=device, dtype=dtype, requires_grad=True)
            ).requires_grad
    except Exception:  # foreign code, which fails in any way
        return False


def check_gradients(modules: Mapping[str, nn.Module]) -> None:
    """Refuse to train on quantised layers through which no gradient comes; one of each kind is tried.

    Raises:
        TargetError: names the first, and what to do.
    """
    tried: set[tuple[type, type]] = set()
    for name, module in modules.items():
        if not is_quantised(module) or (kind := (type(module), type(getattr(module, "weight", None)))) in tried:
            continue
        tried.add(kind)
        if cuts_gradients(module):
            raise TargetError(
                f"{name} is a {kind[0].__name__} whose quantised weight ({kind[1].__name__}) gives its input no gradient, so nothing "
                "before it would train: load the base with weights alone in fewer bits (weight-only), or serve the adapter on it "
                "(inference_mode=True)."
            )


def keep_differentiable(model: nn.Module) -> None:
    """Let no layer of a model be laid out anew for inference, and take back what was.

    bitsandbytes does so with 4-bit layers on CPUs that multiply bfloat16, at the first forward of an evaluation. From then on a
    training step gives the layers below a gradient that lacks these layers' part, with at most a warning of torch's, and saving the
    model, or an adapter in it, takes the layout back with the scales of the blocks in another order: it computes something else.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            bits: Any = layer
            bits.support_avx512bf16_for_cpu = False
            state: Any = getattr(bits.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                bits.state_dict()  # takes it back
                if state.absmax.dim() == 2:  # [in / block, out], which dequantisation reads as [out, in / block]
                    state.absmax = state.absmax.T.reshape(-1).float()
