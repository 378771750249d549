"""How large an adapter would be as a stock LoRA, without writing it: from the ranks and shapes of its sites.

Σ 4 · R (in + out) bytes over the sites, 4 a number of what leaves in full, and the header of the file
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch

from weftlora.export.drawn import drawn_parts, in_full
from weftlora.export.gates import Gates
from weftlora.export.lora import pairs
from weftlora.export.source import Source
from weftlora.glue.stock import HOST, trained_modules
from weftlora.glue.updates import base_of


def lora_bytes(source: Source) -> int | None:
    """Bytes of the `adapter_model.safetensors` that `export_lora` writes in fp32, a rank per site; None where no site has a slot, or
    one has no pair of matrices.

    For a routed adapter, which has no exact export, those of its export at the mean gate.
    """
    sites_of = ((layer, name) for layer in source.layers for name in source.adapters if name in layer.weft_site)
    if any(layer.site(name).outside for layer, name in sites_of):
        return None
    found = pairs(source, _any_gates(source))
    whole = trained_modules(base_of(source.model), source.adapters) | in_full(drawn_parts(source), found)
    sites = {name: pair for name, pair in found.items() if pair.rank}
    shapes = {f"{HOST}{name}": tuple(value.shape) for name, value in whole.items()}
    for name, pair in sites.items():
        shapes |= {f"{HOST}{name}.lora_{part}.weight": tuple(getattr(pair, part.lower()).shape) for part in "AB"}
    return file_bytes(shapes) if sites else None


def _any_gates(source: Source) -> Gates:
    """Weights for the heads of every routed site: which ones does not matter to its rank."""
    gates: Gates = {}
    for layer, name in (
        (layer, name) for layer in source.layers for name in source.adapters if name in layer.weft_site
    ):
        site = layer.site(name)
        if site.routed:
            heads = site.factors().heads
            gates.setdefault(name, {})[layer.module_name] = torch.full((heads,), 1 / heads)
    return gates


def file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a safetensors file with fp32 tensors of these shapes: the length of its header, the header, the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + 8 * math.ceil(len(text) / 8) + end
