"""Tied-LoRA: ΔW_l = (α/r) diag(v_l) B diag(u_l) A with A and B shared by all layers.

Paper: Renduchintala, Konuk, Kuchaiev, "Tied-LoRA: Enhancing parameter efficiency of LoRA with Weight Tying",
arXiv 2311.09578.
Defaults: TL6, which trains A, B, u and v (third parties and the paper's own percentage agree; its table could not be
read); α = r (paper: scale 1); B = 0, u = v = 1 at the start (ours: LoRA's start; the paper's zero factor is not
recoverable); A Kaiming-uniform (ours; first author's code: normal, init="normal"); targets are the attention input
projections (paper), grouped by module type (ours; group="fused_qkv" is the paper's fused projection).
It saves storage and optimiser state, not time: at equal parameters it needs a far higher rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weftlora.adapter.spec import WeftConfig


def TiedLoraConfig(
    r: int = 8,
    train: str | Collection[str] = "tl6",
    group: str = "module_type",
    zero: str | None = None,
    init: str = "kaiming",
    **fields: Any,
) -> WeftConfig:
    """One A and B per group of modules, with vectors u and v per module; fields as in `Tied` and `WeftConfig`."""
    own = dict(locals())
    del own["r"], own["fields"]
    from weftlora.adapter.spec import WeftConfig
    from weftlora.terms.structure.tied import PRESETS, Tied

    config = WeftConfig(structure=Tied(**own), r=r, **fields)
    if isinstance(train, str) and train.lower() in PRESETS and config.lora_alpha != r:
        warnings.warn(
            f"lora_alpha={config.lora_alpha} at r={r} scales the update of Tied-LoRA by {(config.lora_alpha or r) / r:.3g}, "
            "where the paper uses 1 "
            "(lora_alpha = r).",
            stacklevel=2,
        )
    return config
