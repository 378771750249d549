"""Read adapters that the released HydraLoRA code wrote, so that published weights can be checked against ours.

The released code saves `adapter_model.bin` with one tensor per head:
`…{gate,up,down}_proj.lora_A.weight` [r, in], `…lora_B{n}.weight` [out, r] for n = 0…N−1, `…lora_route.weight` [N, in].
Here the heads lie side by side in one B [out, N·r]. With N = 1 the softmax of one logit is exactly 1, so the adapter is
plain LoRA and its router is dropped.

Source: the layout of the released code, repository Clin0212/HydraLoRA at commit afb693b (layout only; no code taken).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.errors import AdapterError
from weft.glue.tuner import PREFIX
from weft.spec import WeftConfig
from weft.terms.structure.hydra import Hydra
from weft.terms.structure.plain import Plain

_KEY = re.compile(r"^(?P<site>.+)\.lora_(?P<part>A|B(?P<head>\d+)|route)\.weight$")


def import_hydralora(source: str | Path, out: str | Path) -> Path:
    """Convert a folder written by the released HydraLoRA code into a weft adapter folder and return its path.

    Args:
        source: folder with `adapter_config.json` and `adapter_model.safetensors` or `adapter_model.bin` (read with
            torch's weights-only unpickler, which runs no code from the file).
        out: folder to create; must not exist or be empty.

    Raises:
        AdapterError: a file is missing or unreadable, a tensor has an unknown name, or the sites disagree on r or N.
    """
    source, out = Path(source), Path(out)
    settings = _settings(source)
    sites = _by_site(_tensors(source))
    tensors: dict[str, Tensor] = {}
    shapes = set()
    for site, parts in sites.items():
        merged, shape = _join_heads(site, parts)
        shapes.add(shape)
        tensors.update({f"{site}.{PREFIX}site.structure.{name}": value for name, value in merged.items()})
    if len(shapes) != 1:
        raise AdapterError(f"{source}: sites disagree on (rank, heads): {sorted(shapes)}; one adapter has one of each.")
    [(r, heads)] = shapes
    if int(settings.get("r", r)) != r:
        raise AdapterError(
            f"{source}: adapter_config.json says r={settings['r']}, the tensors have rank {r}: the files do not belong together."
        )
    dropout = float(settings.get("lora_dropout", 0.0))
    structure = Plain() if heads == 1 else Hydra(heads=heads, per_head_dropout=dropout > 0)
    config = WeftConfig(
        structure=structure,
        r=r,
        lora_alpha=settings.get("lora_alpha", 2 * r),
        lora_dropout=dropout,
        target_modules=sorted({site.rpartition(".")[2] for site in sites}),
        task_type=settings.get("task_type"),
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        inference_mode=True,
    )
    if out.exists() and any(out.iterdir()):
        raise AdapterError(f"{out} is not empty: name a new folder for the converted adapter.")
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(out))
    return out


def _settings(source: Path) -> dict[str, Any]:
    path = source / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"{source} has no adapter_config.json: give the folder that the released code saved.")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def _tensors(source: Path) -> dict[str, Tensor]:
    if (path := source / "adapter_model.safetensors").is_file():
        return load_file(path)
    if (path := source / "adapter_model.bin").is_file():
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise AdapterError(
                f"{path} cannot be read safely ({type(error).__name__}): only plain tensors are accepted."
            ) from None
    raise AdapterError(
        f"{source} has no adapter_model.safetensors or adapter_model.bin: the adapter's weights are missing."
    )


def _by_site(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    sites: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if (match := _KEY.match(key)) is None:
            raise AdapterError(
                f"tensor {key!r} is not part of a HydraLoRA adapter: expected lora_A, lora_B0…, lora_route."
            )
        sites[match["site"]][match["part"]] = tensor
    if not sites:
        raise AdapterError("the adapter file holds no tensors: save the adapter again.")
    return dict(sites)


def _join_heads(site: str, parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """One site's tensors in weft's layout, and its (rank, heads)."""
    ups = [parts[name] for name in sorted((n for n in parts if n.startswith("B")), key=lambda n: int(n[1:]))]
    heads = len(ups)
    complete = (
        "A" in parts and heads and all(f"B{n}" in parts for n in range(heads)) and (heads == 1 or "route" in parts)
    )
    if not complete:
        raise AdapterError(
            f"{site} is incomplete: it has {', '.join(sorted(parts))}, but needs A, B0…B{{N-1}} and route."
        )
    r = parts["A"].shape[0]
    if any(up.shape[1] != r for up in ups) or (heads > 1 and parts["route"].shape[0] != heads):
        raise AdapterError(f"{site}: the shapes of A, B and route disagree on rank or number of heads.")
    joined = {"A": parts["A"].contiguous(), "B": torch.cat(ups, 1).contiguous()}
    return (joined if heads == 1 else joined | {"router": parts["route"].contiguous()}), (r, heads)
