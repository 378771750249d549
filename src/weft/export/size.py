"""How large an adapter would be as a stock LoRA, without writing it: from the ranks and shapes of its sites.

Σ 4 · R (in + out) bytes over the sites, 4 a number of what leaves in full, and the header of the file
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch

from weft.export.drawn import drawn_parts
from weft.export.factors import Pair, closed_form, combined
from weft.export.source import Source
from weft.glue.layer import WeftLinear
from weft.glue.stock import HOST, trained_modules
from weft.glue.updates import base_of
from weft.site import Site


def lora_bytes(source: Source) -> int | None:
    """Bytes of the `adapter_model.safetensors` that `export_lora` writes in fp32, a rank per site; None where no site has a slot.

    For a routed adapter, which has no exact export, those of its export at the mean gate.
    """
    drawn = drawn_parts(source)
    whole = trained_modules(base_of(source.model), source.adapters)
    for name, module in drawn.items():
        whole |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    shapes = {f"{HOST}{name}": tuple(value.shape) for name, value in whole.items()}
    empty = True
    for layer in source.layers:
        pair = _pair(layer, source.adapters)
        if pair.rank and layer.module_name not in drawn:
            shapes[f"{HOST}{layer.module_name}.lora_A.weight"] = tuple(pair.a.shape)
            shapes[f"{HOST}{layer.module_name}.lora_B.weight"] = tuple(pair.b.shape)
            empty = False
    return None if empty else file_bytes(shapes)


def _pair(layer: WeftLinear, adapters: Sequence[str]) -> Pair:
    sites = [layer.site(name) for name in adapters if name in layer.weft_site]
    return combined(closed_form(site, _any_gate(site)) for site in sites)


def _any_gate(site: Site) -> torch.Tensor | None:
    """Weights for the heads of a routed site: which ones does not matter to its rank."""
    heads = site.factors().heads
    return None if site.mergeable else torch.full((heads,), 1 / heads)


def file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a safetensors file with fp32 tensors of these shapes: the length of its header, the header, the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + 8 * math.ceil(len(text) / 8) + end
