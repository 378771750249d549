"""Is this the base the adapter was trained on? A fingerprint that costs no read of the whole checkpoint.

Architecture: type and sizes in the config. Weights: the shape of every tensor and 32 evenly spaced values of it,
rounded to bfloat16, so that loading in fp32 or bf16 gives the same fingerprint.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from weftlora.errors import AdapterError

_SIZES = ("hidden_size", "d_model", "n_embd", "num_hidden_layers", "num_layers", "n_layer", "vocab_size")


@dataclass(frozen=True)
class Fingerprint:
    """What a base is: `kind` to show a person, the hashes to compare."""

    kind: str
    shapes: str
    values: str


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The fingerprint of a base, taken before any adapter is put into it; a new classification head is left out."""
    from weftlora.train.model import HEADS

    shapes, values = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] in HEADS or "pooler" in name:
            continue
        shapes.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 32)][:32]
        values.update(picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    sizes = [f"{key}={value}" for key in _SIZES if (value := getattr(model.config, key, None)) is not None]
    return Fingerprint(" ".join([model.config.model_type, *sizes]), shapes.hexdigest()[:16], values.hexdigest()[:16])


def check_same(trained: Fingerprint, given: Fingerprint, adapter: str, base: str) -> None:
    """Refuse a base other than the adapter's own.

    Raises:
        AdapterError: another architecture, or the same one with other weights.
    """
    if given.shapes != trained.shapes:
        raise AdapterError(
            f"the adapter {adapter} was trained on another base ({trained.kind}) than {base} ({given.kind}): "
            "give the base it was trained on."
        )
    if given.values != trained.values:
        raise AdapterError(
            f"the adapter {adapter} was trained on other weights than those of {base} (same architecture, {given.kind}): "
            "give the base it was trained on."
        )
