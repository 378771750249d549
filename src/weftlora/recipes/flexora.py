"""Flexora: search which blocks to adapt, then adapt only those.

    α̂ = N softmax(α);   y = x Wᵀ + b + α̂_l (α/r) (drop(x) Aᵀ) Bᵀ;   α by the gradient of a validation loss

Paper: Wei et al., "Flexora: Flexible Low-Rank Adaptation for Large Language Models", arXiv 2408.10774 (ACL 2025).
Defaults: r = 8, α = 2r, α-rate 0.01 with Adam, K = 1, 8 validation micro-batches per step, one epoch of at most 5000 rows of
which 200 are held out (released code; the body of the paper could not be read). All linear modules (ours; released runs: q and v).
Where we differ from the released code: see `weftlora.terms.layers.search`; `preset="released"` has its arithmetic back.
Any other structure searches too: `weftlora.HydraLoraConfig(layers=weftlora.Search())`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weftlora.adapter.spec import WeftConfig


def FlexoraConfig(
    r: int = 8,
    granularity: str = "block",
    hypergrad: str = "direct",
    fd_step: float = 1e-2,
    inner_steps: int = 1,
    inner_lr: float | None = None,
    unroll_steps: int | None = None,
    alpha_lr: float = 0.01,
    alpha_optimizer: str = "adam",
    alpha_hat_max: float | None = None,
    outer_batches: int = 8,
    search_epochs: float = 1.0,
    steps: int | None = None,
    max_share: float | None = 0.1,
    max_search_samples: int = 5000,
    val_size: int = 200,
    select: str | None = None,
    top_k: int | None = None,
    min_layers: int = 1,
    when_fewer: str = "fill",
    finetune: str = "restart",
    preset: str = "ours",
    **fields: Any,
) -> WeftConfig:
    """LoRA whose blocks are searched; fields as in `Search` and `WeftConfig`. To be trained by `weftlora.search_layers`."""
    own = dict(locals())
    del own["r"], own["fields"]
    from weftlora.adapter.spec import WeftConfig
    from weftlora.terms.layers.search import Search

    return WeftConfig(layers=Search(**own), r=r, **fields)
