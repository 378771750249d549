"""The mean router output of every routed site over data: at these fixed weights a routed update becomes one ΔW.

    ω̄ = mean over tokens of softmax(x Wgᵀ)        ΔW ≈ s (Σ_n ω̄_n B_n) A

An approximation, ours: HydraLoRA itself (arXiv 2404.19245) has no merged form. Padding is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from weftlora.export.live import Batch
from weftlora.glue.layer import WeftLinear
from weftlora.glue.updates import base_of

IGNORED = -100
"""The label of a token that counts in no loss: in an encoder-decoder, padding."""

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
        found.append(batch["labels"] != IGNORED)
    return found
