"""Task-specific directions: plain LoRA for t steps, then something is done with the directions of W that it moved most, relative to σ.

    LoRA-Dash    ΔW = (α/r) B A + Ū diag(g) V̄ᵀ                 gains g along s of them, learned from 0
    LoRA-Init    ΔW = (α/r) (B A − B₀ A₀)                       A and B start again along r of them: (α/r) B₀ A₀ = Σ σ̄ ū v̄ᵀ
    LoRA-TSD     ΔW = (α/r) (B A − B₀ A₀) + Ū diag(g) V̄ᵀ       both on one ranking: the s of Dash are the first of the r

Papers, both Si et al., arXiv 2409.01035: LoRA-Dash is in "Unleashing the Power of Task-Specific Directions in Parameter Efficient
Fine-tuning" (ICLR 2025). LoRA-Init and LoRA-TSD are in version 4 on, "Task-Specific Directions: Definition, Exploration, and
Utilization in Parameter Efficient Fine-Tuning", and are reconstructed from its abstract and framework figure: not verified against
text or code, of which the authors' repository has none for them. An unrelated optimiser, arXiv 2609.02734, is called LoRA-TSD as
well; nothing here is about it.
Defaults: s = 8 and t = 100 (released code of LoRA-Dash, which counts forward calls; ours are optimiser steps; t of LoRA-Init is
unread); α = 2r, all linear modules (ours; commonsense runs of the paper: α = 2r on q, k, v, up, down); ε = 1e-8 σ_max, a rank
floor, the guard and the mode "directions" (ours).
Where we differ from the released code, and which reading was taken of what could not be read: see `weftlora.terms.boost.dash` and
`weftlora.terms.start.directions`. Of two readings of the figure LoRA-TSD takes g = 0 at the switch beside A₀, B₀ that hold σ̄ (the
other: g = σ̄ beside a zero product; the same function at the switch).
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
    pair: str = "train",
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
    pair: str = "train",
    **fields: Any,
) -> WeftConfig:
    """LoRA-Init with Dash slots launched at the same step; fields as in `Directions`, `Dash` and `WeftConfig`."""
    from weftlora.terms.boost.dash import Dash

    boost = Dash(directions, after, eps, select, seed, pair)  # type: ignore[arg-type]
    return LoraInitConfig(r, after, mode, eps, guard, kappa, select, seed, boost=boost, **fields)
