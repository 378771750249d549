"""What the live adapter computes: its outputs, which every export is compared with in fp32, and what its routers do on average.

A shell has modules of its own around the very tensors of the model (around fp32 copies, where the model is not in fp32), so that
choosing adapters and taking them out leaves the model itself as it was.

At a router's mean output over data, a routed update becomes one ΔW:

    ω̄ = mean over tokens of softmax(x Wgᵀ)        ΔW ≈ s (Σ_n ω̄_n B_n) A

An approximation, ours: HydraLoRA itself (arXiv 2404.19245) has no merged form. Padding is left out of the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weftlora.adapted.experts import make_experts_plain
from weftlora.adapted.frozen_weights import Checkpoint, OriginalWeight
from weftlora.adapted.layer import WeftLayer, WeftLinear
from weftlora.adapted.quantised import is_quantised
from weftlora.adapted.updates import base_of
from weftlora.errors import AdapterError
from weftlora.host.stock_lora import replace_module
from weftlora.settings import IGNORE

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Outputs:
    """What a model makes of some batches: logits (those of padding left out), and per batch the loss where it has labels."""

    logits: list[Tensor]
    losses: list[float]

    @property
    def largest(self) -> float:
        """The largest logit by size."""
        return max((float(t.abs().max()) for t in self.logits), default=0.0)

    def loss(self) -> float | None:
        """Mean over the batches; None where there are no labels."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def furthest(self, other: Outputs) -> float:
        """The largest difference of a logit, relative to the largest logit of `self`."""
        far = [(a - b).abs().max() for a, b in zip(self.logits, other.logits, strict=True)]
        return float(torch.stack(far).max()) / max(self.largest, 1e-30)  # Python's max would pass over a NaN

    def distance(self, other: Outputs) -> float:
        """‖logits − logits of other‖₂ over all batches."""
        pairs = zip(self.logits, other.logits, strict=True)
        return float(sum((a.double() - b.double()).square().sum() for a, b in pairs) ** 0.5)


@contextmanager
def shell(model: nn.Module, adapters: Sequence[str]) -> Iterator[nn.Module]:
    """The model in fp32 with these adapters active, in evaluation mode; `model` stays as it was."""
    required = [(p, p.requires_grad) for p in model.parameters()]
    tensors = [*model.parameters(), *model.buffers()]
    whole = all(t.dtype in (torch.float32, torch.float64) for t in tensors if t.is_floating_point())
    try:
        own = copy.deepcopy(model, {id(t): t for t in tensors} if whole else {})
        own = own if whole else own.float()
        activate(own, adapters)
        yield own.eval()
    finally:
        for p, was in required:
            p.requires_grad_(was)


def activate(model: nn.Module, adapters: Sequence[str]) -> None:
    """Make these the active adapters, without asking the host's wrapper, which takes one name only."""
    for module in model.modules():
        if isinstance(module, WeftLayer):
            cast(Any, module).enable_adapters(True)
            module.set_adapter(list(adapters))
        elif isinstance(module, ModulesToSaveWrapper):
            module.enable_adapters(True)
            own = [name for name in adapters if name in module.modules_to_save]
            module.set_adapter(own[:1])  # none: the base's own


def dequantise(own: nn.Module, original: Checkpoint | None = None) -> None:
    """Give a shell plain weights: in place of every quantised layer the matrix that it computes with, in fp32.

    Args:
        original: the checkpoint whose weights stand in for those of all quantised and all adapted layers.

    Raises:
        ConfigError: a quantised weight that cannot be read.
        ModelError: `original` is of another model.
    """
    adapted = {name: module for name, module in own.named_modules() if isinstance(module, WeftLinear)}
    for layer in adapted.values():
        base = layer.get_base_layer()
        if layer.reading is None and (original is not None or is_quantised(base)):
            w = (layer.base_matrix() if original is None else OriginalWeight(layer, original)()).float()
            layer.put_base(conv1d(base, w) if isinstance(base, Conv1D) else linear(base, w))
    inside = tuple(f"{name}." for name in adapted)
    make_experts_plain(own)
    for name, module in list(own.named_modules()):
        if name in adapted or name.startswith(inside) or not isinstance(getattr(module, "in_features", None), int):
            continue
        if is_quantised(module):
            reader = WeftLinear(module, name.removeprefix("base_model.model."))
            w = (reader.base_matrix() if original is None else OriginalWeight(reader, original)()).float()
            replace_module(own, name, linear(module, w))
    forget_quantiser(base_of(own))


def forget_quantiser(model: Any) -> None:
    """Let a model of transformers whose layers are plain be saved and moved as one."""
    for name, value in (
        ("hf_quantizer", None), ("is_quantized", False), ("is_loaded_in_4bit", False), ("is_loaded_in_8bit", False),
    ):  # fmt: skip
        if hasattr(model, name):
            setattr(model, name, value)
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config


def linear(base: nn.Module, w: Tensor) -> nn.Linear:
    """A plain linear module of weight `w` [out, in], with the bias of `base`, which may have kept its weight in fewer bits."""
    bias = getattr(base, "bias", None)
    plain = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(w, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def conv1d(base: Conv1D, w: Tensor) -> Conv1D:
    """The same for a module that keeps its weight as [in, out]."""
    plain = copy.copy(base)
    plain.__dict__["_parameters"] = {**base._parameters, "weight": nn.Parameter(w.T.contiguous(), requires_grad=False)}
    return plain


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The base's own function, within the block."""
    switches: list[Any] = [
        m for m in model.modules() if isinstance(m, (WeftLayer, ModulesToSaveWrapper)) and not m.disable_adapters
    ]
    try:
        for switch in switches:
            switch.enable_adapters(False)
        yield
    finally:
        for switch in switches:
            switch.enable_adapters(True)


def forward_all(model: nn.Module, batches: Sequence[Batch]) -> Outputs:
    """One forward per batch, without a graph, in full fp32 whatever TF32 or autocast the caller trains with.

    Raises:
        AdapterError: a logit is not finite, or the model has none.
    """
    device = next(model.parameters()).device
    logits, losses = [], []
    with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision():
        for batch in batches:
            out = base_of(model)(**{key: value.to(device) for key, value in batch.items()})
            if not isinstance(getattr(out, "logits", None), Tensor):
                raise AdapterError(
                    f"a {type(base_of(model)).__name__} gives no logits, so there is nothing to compare the export by: use "
                    "verify=False."
                )
            logits.append(out.logits.float().cpu())
            if getattr(out, "loss", None) is not None:
                losses.append(float(out.loss))
    outputs = Outputs([without_padding(t, batch) for t, batch in zip(logits, batches, strict=True)], losses)
    if not all(torch.isfinite(t).all() for t in outputs.logits):
        raise AdapterError(
            "the adapter's logits are not finite on these inputs, so nothing was exported: it has diverged, use an earlier "
            "checkpoint."
        )
    return outputs


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products of fp32 numbers in fp32, within the block: the stock process has no TF32 either."""
    backends: list[Any] = [torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn).matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was chosen per backend, of which this function must not be asked
        overall = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(overall)
        for backend, was in zip(backends, before, strict=True):
            backend.fp32_precision = was


def without_padding(logits: Tensor, batch: Batch) -> Tensor:
    """The logits of tokens: padding, which is nothing to anybody, is left out where logits and mask fit."""
    mask = batch.get("attention_mask")
    if mask is None or logits.dim() != 3 or logits.shape[:2] != mask.shape:
        return logits
    return logits[mask.bool()]


def fix_gates(model: nn.Module, adapters: Sequence[str], gates: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Make routed sites use the same weights ω [N] for every token, in place, within the kernel as it is.

    Args:
        gates: {adapter: {site: ω}}.
    """
    for layer in (m for m in model.modules() if isinstance(m, WeftLinear)):
        for adapter in adapters:
            if (omega := gates.get(adapter, {}).get(layer.module_name)) is None:
                continue
            layer.site(adapter).structure.fix(omega)


def seeded_ids(model: nn.Module, rows: int = 2, length: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    """A batch of token numbers drawn from a seed, for a model whose real inputs nobody gave.

    Raises:
        AdapterError: the model has no vocabulary to draw from.
    """
    config: Any = getattr(base_of(model), "config", None)
    size = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
    if size is None:
        raise AdapterError(
            f"there are no token ids to run a {type(base_of(model)).__name__} on: give inputs=[batch, ...], each the keyword "
            "arguments of a forward."
        )
    ids = torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.flip(1)
    return [batch]


Gates = dict[str, dict[str, Tensor]]
"""{adapter: {site: ω̄ [N] fp64}}."""


@dataclass
class _Meter:
    """Sums the weights of one router over the tokens that are not padding."""

    masks: list[Tensor]  # of the batch that is running, shared by all meters: of the encoder, or only, tokens first
    decoder: bool  # whether the router stands in the decoder of an encoder-decoder
    total: Tensor | None = None
    tokens: int = 0

    def __call__(self, omega: Tensor) -> None:
        seen = omega.detach()
        fitting = [mask for mask in self.masks if mask.shape == seen.shape[:-1]]
        # the keys and values of cross-attention stand in the decoder and read the encoder: the shapes tell, unless they are equal
        seen = seen[fitting[-1 if self.decoder else 0].bool()] if fitting else seen.flatten(0, -2)
        summed = seen.double().sum(0)
        self.total = summed if self.total is None else self.total + summed
        self.tokens += len(seen)


def mean_gates(own: nn.Module, adapters: Sequence[str], batches: Sequence[Batch]) -> Gates:
    """The mean gates of the routed sites of a shell over `batches`; a site that no token reached keeps equal weights."""
    masks: list[Tensor] = []
    meters: dict[tuple[str, str], _Meter] = {}
    heads: dict[tuple[str, str], int] = {}
    for layer in (m for m in own.modules() if isinstance(m, WeftLinear)):
        for adapter in adapters:
            if adapter in layer.weft_site and (site := layer.site(adapter)).routed:
                key = adapter, layer.module_name
                meters[key], heads[key] = _Meter(masks, "decoder" in key[1].split(".")), site.factors().heads
                site.gate_meter = meters[key]
    device = next(own.parameters()).device
    with torch.no_grad():
        for batch in batches:
            here = {name: value.to(device) for name, value in batch.items()}
            masks[:] = _masks(here, bool(getattr(getattr(base_of(own), "config", None), "is_encoder_decoder", False)))
            base_of(own)(**here)
    gates: Gates = {}
    for (adapter, name), meter in meters.items():
        equal = torch.full((heads[adapter, name],), 1 / heads[adapter, name], dtype=torch.float64)
        found = equal if not meter.tokens else cast(Tensor, meter.total).cpu() / meter.tokens
        gates.setdefault(adapter, {})[name] = found
    for layer in (m for m in own.modules() if isinstance(m, WeftLinear)):
        for adapter in adapters:
            if adapter in layer.weft_site:
                layer.site(adapter).gate_meter = None
    return gates


def _masks(batch: Batch, has_decoder: bool) -> list[Tensor]:
    """Which tokens are no padding: those of the batch, then those of its decoder, if it has one."""
    found = [batch["attention_mask"]] if "attention_mask" in batch else []
    if has_decoder and "decoder_attention_mask" in batch:
        found.append(batch["decoder_attention_mask"])
    elif has_decoder and "labels" in batch:
        found.append(batch["labels"] != IGNORE)
    return found
