"""Kaiming: A ~ U(−1/√in, 1/√in), the factor that must vanish is 0, so ΔW = 0 and gradients flow.

Source: LoRA (arXiv 2106.09685, section 4.1) starts B at zero; the uniform bound is kaiming_uniform with a = √5, which
is what the released LoRA and HydraLoRA code and peft use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weftlora.terms.events import Controller, Timeline
from weftlora.terms.start import Start, StartTerm, kaiming_uniform


@dataclass(frozen=True)
class Kaiming(Start):
    """A Kaiming-uniform, B zero: the adapted model computes exactly what the base does at step 0."""

    headline: ClassVar[tuple[str, ...] | None] = None

    def draw(
        self,
        rows: int,
        fan_in: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Uniform on ±1/√fan_in."""
        return kaiming_uniform(rows, fan_in, device=device, generator=generator)

    def build(self, slots: int, fan_in: int, out: int) -> StartTerm | None:
        """Nothing is kept."""
        return None

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """Nothing happens."""
        return []
