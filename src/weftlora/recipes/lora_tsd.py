"""LoRA-TSD: LoRA-Init and LoRA-Dash after one pre-launch, on one ranking of the directions of W.

    ΔW = (α/r) (B A − B₀ A₀) + Ū diag(g) V̄ᵀ        the s directions of Ū, V̄ are the first of the r of B₀, A₀

Paper: Si et al., "Task-Specific Directions: Definition, Exploration, and Utilization in Parameter Efficient Fine-Tuning",
arXiv 2409.01035, version 4 on. (An unrelated optimiser, arXiv 2609.02734, is called LoRA-TSD as well.) Reconstructed from its
abstract and framework figure; not verified against text or code.
Defaults: s = 8 and t = 100 as LoRA-Dash; the rest as LoRA-Init. Of two readings of the figure we take g = 0 at the switch
beside A₀, B₀ that hold σ̄ (the other: g = σ̄ beside a zero product; the same function at the switch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weftlora.recipes.lora_init import LoraInitConfig
from weftlora.times import Time

if TYPE_CHECKING:
    from weftlora.spec import WeftConfig


def LoraTsdConfig(
    r: int = 8,
    directions: int = 8,
    after: Time = 100,
    mode: str = "residual",
    eps: float = 1e-8,
    guard: float = 1e-6,
    kappa: float = 1.0,
    select: str = "rate",
    seed: int = 0,
    **fields: Any,
) -> WeftConfig:
    """LoRA-Init with Dash slots launched at the same step; fields as in `Directions`, `Dash` and `WeftConfig`."""
    from weftlora.terms.boost.dash import Dash

    boost = Dash(directions, after, eps, select, seed)  # type: ignore[arg-type]
    return LoraInitConfig(r, after, mode, eps, guard, kappa, select, seed, boost=boost, **fields)
