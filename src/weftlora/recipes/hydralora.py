"""HydraLoRA: y = W x + (α/r) Σ_n ω_n(x) B_n A x, one A, N heads, a softmax router per adapted module.

Paper: Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning", arXiv 2404.19245.
Defaults: r = 8 per head and N = 3 (paper, tables 1-2, single domain); α = 2r (ours, so that a comparison with LoRA does not
measure the scale; the released scripts keep α = 32 at every rank, pass lora_alpha=32 for them); dropout 0 (ours; script
0.05); all linear modules (ours; the paper does not say, its parameter counts fit q and v, its script uses gate, up, down).
Where we differ from the released code: one dropout mask for all heads (per_head_dropout=True for its masks), a router
that always sees the undropped input, no constant-zero second output. Its claim of a 1.96x faster training is not ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weftlora.adapter.spec import WeftConfig


def HydraLoraConfig(
    r: int = 8,
    heads: int = 3,
    router: str = "softmax",
    k: int | None = None,
    split: bool = False,
    router_input: str = "x",
    per_head_dropout: bool = False,
    balance: float = 0.0,
    **fields: Any,
) -> WeftConfig:
    """One A, `heads` B heads of rank r each, mixed per token; fields as in `Hydra` and `WeftConfig`."""
    own = dict(locals())
    del own["r"], own["fields"]
    from weftlora.adapter.spec import WeftConfig
    from weftlora.terms.structure.hydra import Hydra

    return WeftConfig(structure=Hydra(**own), r=r, **fields)
