"""The learning rate of a recipe that names none.

    lr = 5e-5 · 10 · (2000 / hidden size)^p      p = 0.0775 for Qwen, 0.781 for Llama and every other decoder

Schulman et al., "LoRA Without Regret" (2025): LoRA's best rate is ten times that of full fine-tuning, hardly depends on the rank where
α / r is fixed, and falls with the width of the model; the two exponents are its fits to Llama and to Qwen. For other families we take
Llama's, which is the lower of the two for wide models. It is bounded to what was tried: 1e-4 to 1e-2.

    encoders             5e-4, whatever their width: the LoRA paper's rates on GLUE (arXiv 2106.09685, table 9: 4e-4 and 5e-4 for
                         RoBERTa base)
    encoder-decoders     as decoders
    tied_lora            twice that: one A and B for all layers get few parameters, whose best rate is higher (ours)
    peft:adalora         as lora; its own schedule of ranks needs no other rate

A rate is a starting point, not a result: `weftlora compare` tries several for every method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SOURCE = "LoRA Without Regret"
BASE, WIDTH = 5e-5 * 10, 2000
EXPONENTS = {"qwen": 0.0775}
OTHERWISE = 0.781
LEAST, MOST = 1e-4, 1e-2
ENCODER = 5e-4
FACTORS = {"tied_lora": 2.0}
"""What a method's rate is over plain LoRA's."""


@dataclass(frozen=True)
class Rate:
    """A learning rate and why it is that one."""

    lr: float
    why: str


def rate(method: str | None, settings: Any, encoder: bool = False) -> Rate:
    """The rate for a method (a recipe's name; None where the axes are written out) on a base with this config."""
    if encoder:
        return Rate(ENCODER, "for encoders, as the LoRA paper on GLUE")
    text = settings.get_text_config()
    width, kind = getattr(text, "hidden_size", None), str(getattr(text, "model_type", ""))
    factor = FACTORS.get(method or "", 1.0)
    of = f"for {method or 'LoRA'}" + (f", {factor:g} times LoRA's," if factor != 1 else "")
    if not isinstance(width, int) or width < 1:
        return Rate(_short(factor * BASE), f"{of} on a model of unknown width ({SOURCE})")
    return Rate(of_width(width, kind, factor), f"{of} at hidden size {width:,} ({SOURCE})")


def of_width(width: int, kind: str = "", factor: float = 1.0) -> float:
    """The rate for decoders of a hidden size, and of a family where its exponent is known.

    >>> [of_width(width) for width in (64, 576, 2048, 4096)]
    [0.0074, 0.0013, 0.00049, 0.00029]
    >>> of_width(4096, "qwen3")
    0.00047
    """
    power = next((value for name, value in EXPONENTS.items() if name in kind), OTHERWISE)
    return _short(min(max(factor * BASE * (WIDTH / width) ** power, LEAST), MOST))


def _short(lr: float) -> float:
    """Two figures are all that is known of it."""
    return float(f"{lr:.2g}")
