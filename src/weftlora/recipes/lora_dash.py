"""LoRA-Dash: plain LoRA for t steps, then gains along the s directions of W that it has moved most, relative to σ.

    ΔW = (α/r) B A + Ū diag(g) V̄ᵀ

Paper: Si et al., "Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning",
arXiv 2409.01035 (ICLR 2025). An unrelated optimiser is also called LoRA-TSD; nothing here is about it.
Defaults: s = 8 and t = 100 (released code, which counts forward calls; ours are optimiser steps); α = 2r, all linear
modules (ours; commonsense runs of the paper: α = 2r on q, k, v, up, down); ε = 1e-8 σ_max and a rank floor (ours).
Where we differ from the released code: see `weftlora.terms.boost.dash`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weftlora.times import Time

if TYPE_CHECKING:
    from weftlora.spec import WeftConfig


def LoraDashConfig(
    r: int = 8,
    directions: int = 8,
    after: Time = 100,
    eps: float = 1e-8,
    select: str = "rate",
    seed: int = 0,
    **fields: Any,
) -> WeftConfig:
    """LoRA with Dash slots launched after `after`; fields as in `Dash` and `WeftConfig` (another `structure` composes)."""
    from weftlora.spec import WeftConfig
    from weftlora.terms.boost.dash import Dash

    boost = Dash(directions=directions, after=after, eps=eps, select=select, seed=seed)  # type: ignore[arg-type]
    return WeftConfig(boost=boost, r=r, **fields)
