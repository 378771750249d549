"""LoRA-Dash: plain LoRA for t steps, then gains along the s directions of W that it has moved most, relative to σ.

    ΔW = (α/r) B A + Ū diag(g) V̄ᵀ

Paper: Si et al., "Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning",
arXiv 2409.01035 (ICLR 2025). An unrelated optimiser is also called LoRA-TSD; nothing here is about it.
Defaults: s = 8 and t = 100 (released code, which counts forward calls; ours are optimiser steps); α = 2r, all linear
modules (ours; commonsense runs of the paper: α = 2r on q, k, v, up, down); ε = 1e-8 σ_max and a rank floor (ours).
Where we differ from the released code: see `weftlora.terms.boost.dash`.

LoRA-Init: plain LoRA for t steps, then A and B start anew along the r directions of W that it has moved most, relative to σ.

    ΔW = (α/r) (B A − B₀ A₀)        (α/r) B₀ A₀ = Σ σ̄ ū v̄ᵀ over those directions

Paper: Si et al., "Task-Specific Directions: Definition, Exploration, and Utilization in Parameter Efficient Fine-Tuning",
arXiv 2409.01035, version 4 on. Reconstructed from its abstract and framework figure; not verified against text or code (the
authors' repository has none for it).
Defaults: t = 100 optimiser steps (as LoRA-Dash; t of LoRA-Init is unread); α = 2r, all linear modules, ε = 1e-8 σ_max, the
guard and the mode "directions" (ours). Which reading was taken where: see `weftlora.terms.start.directions`.

LoRA-TSD: LoRA-Init and LoRA-Dash after one pre-launch, on one ranking of the directions of W.

    ΔW = (α/r) (B A − B₀ A₀) + Ū diag(g) V̄ᵀ        the s directions of Ū, V̄ are the first of the r of B₀, A₀

Paper: Si et al., "Task-Specific Directions: Definition, Exploration, and Utilization in Parameter Efficient Fine-Tuning",
arXiv 2409.01035, version 4 on. (An unrelated optimiser, arXiv 2609.02734, is called LoRA-TSD as well.) Reconstructed from its
abstract and framework figure; not verified against text or code.
Defaults: s = 8 and t = 100 as LoRA-Dash; the rest as LoRA-Init. Of two readings of the figure we take g = 0 at the switch
beside A₀, B₀ that hold σ̄ (the other: g = σ̄ beside a zero product; the same function at the switch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weftlora.settings import Time

if TYPE_CHECKING:
    from weftlora.adapter.spec import WeftConfig


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
    own = dict(locals())
    del own["r"], own["fields"]
    from weftlora.adapter.spec import WeftConfig
    from weftlora.terms.boost.dash import Dash

    return WeftConfig(boost=Dash(**own), r=r, **fields)


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
    own = dict(locals())
    del own["r"], own["fields"]
    from weftlora.adapter.spec import WeftConfig
    from weftlora.terms.start.directions import Directions

    return WeftConfig(start=Directions(**own), r=r, **fields)


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
