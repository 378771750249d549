"""LoRA, ΔW = (α/r) B A on every linear module: on weftlora's kernel, and stock peft's own as a control.

    PlainLoraConfig    LoRA on weftlora's kernel: the baseline of every comparison
    peft_lora          peft's LoraConfig under the same fields, so that a comparison runs both on equal terms
    peft_adalora       peft's AdaLoraConfig, likewise

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
Defaults, the controls' too: r = 8 (paper, section 7.2: small ranks suffice); α = 2r (ours, common practice; the paper ties α to
the first r tried); dropout 0 (ours); all linear modules (ours; the paper adapts q and v).
Where ours differs from peft's LoRA: only in speed and dtype. The factors are computed in the dtype of x, which is never cast; on
a bf16 base peft casts x to fp32.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from weftlora.errors import ConfigError, unknown_key

if TYPE_CHECKING:
    from peft import PeftConfig

    from weftlora.adapter.spec import WeftConfig


def PlainLoraConfig(r: int = 8, **fields: Any) -> WeftConfig:
    """Stock LoRA's function on weftlora's kernel; further fields as in `WeftConfig`."""
    from weftlora.adapter.spec import WeftConfig
    from weftlora.terms.structure.plain import Plain

    return WeftConfig(structure=Plain(), r=r, **fields)


def peft_lora(
    r: int = 8, lora_alpha: float | None = None, target_modules: Any = "all-linear", **fields: Any
) -> PeftConfig:
    """peft's own LoraConfig, with weftlora's defaults for what is left out: α = 2r, all linear modules."""
    from peft import LoraConfig

    return _stock(
        LoraConfig, r=r, lora_alpha=2 * r if lora_alpha is None else lora_alpha, target_modules=target_modules, **fields
    )


def peft_adalora(
    r: int = 8,
    lora_alpha: float | None = None,
    target_modules: Any = "all-linear",
    total_step: int | None = None,
    **fields: Any,
) -> PeftConfig:
    """peft's own AdaLoraConfig at target rank r (initial rank 1.5 r as in its paper); needs `total_step`."""
    from peft import AdaLoraConfig

    fields.setdefault("init_r", max(r + 1, round(1.5 * r)))
    fields.setdefault("target_r", r)
    alpha = 2 * r if lora_alpha is None else lora_alpha
    return _stock(AdaLoraConfig, lora_alpha=alpha, target_modules=target_modules, total_step=total_step, **fields)


def _stock(cls: type[PeftConfig], **fields: Any) -> PeftConfig:
    valid = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in fields:
        if key not in valid:
            raise unknown_key(key, valid, cls.__name__)
    try:
        return cls(**fields)
    except ValueError as error:
        raise ConfigError(f"peft refuses this {cls.__name__}: {error}") from None
