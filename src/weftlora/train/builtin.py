"""The recipes `weftlora train NAME` runs without a file: one method on the embedded model and tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Builtin:
    """A method that a recipe can name, and the training it gets on the demo."""

    name: str
    about: str
    paper: str | None
    adapter: dict[str, Any]
    lr: float


BUILTIN = {
    entry.name: entry
    for entry in (
        Builtin("lora", "plain LoRA on our kernel: the baseline", "arXiv:2106.09685", {"r": 16}, 5e-3),
        Builtin("hydralora", "one A, several B heads mixed per token by a router", "arXiv:2404.19245", {"r": 8}, 5e-3),
        Builtin("tied_lora", "one A and B shared by all layers, own vectors per layer", "arXiv:2311.09578", {}, 1e-2),
        Builtin("lora_dash", "LoRA, then gains along the directions of W it moved most", "arXiv:2409.01035", {}, 5e-3),
        Builtin(
            "lora_init",
            "LoRA, begun anew along the directions of W it moved most",
            "arXiv:2409.01035",
            {"after": 10},
            5e-3,
        ),
        Builtin("lora_tsd", "LoRA-Init and LoRA-Dash at once", "arXiv:2409.01035", {"after": 10}, 5e-3),
        Builtin("alora", "LoRA whose rank slots move to where they are worth most", "arXiv:2403.16187", {}, 5e-3),
        Builtin(
            "flexora", "LoRA on the blocks that a search on held-out rows selects", "arXiv:2408.10774", {"r": 16}, 5e-3
        ),
        Builtin("peft:lora", "stock peft LoRA, as a control", "arXiv:2106.09685", {"r": 16}, 5e-3),
        Builtin("peft:adalora", "stock peft AdaLoRA, as a control", "arXiv:2303.10512", {}, 5e-3),
        Builtin("none", "no adapter: the frozen base, to evaluate only", None, {}, 1e-3),
    )
}


def builtin(name: str) -> dict[str, Any]:
    """The recipe behind a built-in name, as a recipe file would hold it."""
    entry = BUILTIN[name]
    return {
        "model": "demo",
        "data": {"train": "demo", "max_length": 64},
        "adapter": {"recipe": entry.name, **entry.adapter},
        "train": {"steps": 150, "batch_size": 32, "lr": entry.lr},
        "out": f"runs/{name.replace(':', '-')}",
    }
