"""LoRA-Init: plain LoRA for t steps, then A and B start anew along the r directions of W that it has moved most, relative to σ.

    ΔW = (α/r) (B A − B₀ A₀)        (α/r) B₀ A₀ = Σ σ̄ ū v̄ᵀ over those directions

Paper: Si et al., "Task-Specific Directions: Definition, Exploration, and Utilization in Parameter Efficient Fine-Tuning",
arXiv 2409.01035, version 4 on. Reconstructed from its abstract and framework figure; not verified against text or code (the
authors' repository has none for it).
Defaults: t = 100 optimiser steps (as LoRA-Dash; t of LoRA-Init is unread); α = 2r, all linear modules, ε = 1e-8 σ_max, the
guard and the mode "directions" (ours). Which reading was taken where: see `weftlora.terms.start.directions`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weftlora.times import Time

if TYPE_CHECKING:
    from weftlora.spec import WeftConfig


def LoraInitConfig(
    r: int = 8,
    after: Time = 100,
    mode: str = "residual",
    eps: float = 1e-8,
    guard: float = 1e-6,
    kappa: float = 1.0,
    select: str = "rate",
    seed: int = 0,
    **fields: Any,
) -> WeftConfig:
    """LoRA that starts anew along directions of W after `after`; fields as in `Directions` and `WeftConfig`."""
    from weftlora.spec import WeftConfig
    from weftlora.terms.start.directions import Directions

    start = Directions(after, mode, eps, guard, kappa, select, seed)  # type: ignore[arg-type]
    return WeftConfig(start=start, r=r, **fields)
