"""Kaiming: A ~ U(−1/√in, 1/√in), the factor that must vanish is 0, so ΔW = 0 and gradients flow.

Source: LoRA (arXiv 2106.09685, section 4.1) starts B at zero; the uniform bound is kaiming_uniform with a = √5, which
is what the released LoRA and HydraLoRA code and peft use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kaiming:
    """A Kaiming-uniform, B zero: the adapted model computes exactly what the base does at step 0."""


def kaiming_uniform(
    rows: int,
    fan_in: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """[rows, fan_in] fp32, uniform on ±1/√fan_in, from torch's global generator or the one given."""
    bound = 1.0 / math.sqrt(fan_in)
    return torch.empty(rows, fan_in, device=device).uniform_(-bound, bound, generator=generator)
