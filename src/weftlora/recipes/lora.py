"""LoRA: ΔW = (α/r) B A on every linear module; the baseline.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
Defaults: r = 8 (paper, section 7.2: small ranks suffice); α = 2r (ours, common practice; the paper ties α to the first r
tried); dropout 0 (ours); all linear modules (ours; the paper adapts q and v).
Where we differ from peft's LoRA: only in speed and dtype. The factors are computed in the dtype of x, which is never
cast; on a bf16 base peft casts x to fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weftlora.spec import WeftConfig


def PlainLoraConfig(r: int = 8, **fields: Any) -> WeftConfig:
    """Stock LoRA's function on weftlora's kernel; further fields as in `WeftConfig`."""
    from weftlora.spec import WeftConfig
    from weftlora.terms.structure.plain import Plain

    return WeftConfig(structure=Plain(), r=r, **fields)
