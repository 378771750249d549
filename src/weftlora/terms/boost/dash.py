"""Dash: s extra slots along the task-specific directions of W, their gains learned from zero.

    before the launch    ΔW = (α/r) B A
    after it             ΔW = (α/r) B A + Ū diag(g) V̄ᵀ       Ū [out, s], V̄ᵀ [s, in] fixed, g [s] learned

Ū and V̄ are the s core directions of W with the largest change rate under the ΔW of the moment of the launch
(`weftlora.linalg`). Dash slots have scale 1, not α/r.

Source: LoRA-Dash, arXiv 2409.01035. Where we knowingly differ from the released code: the launch is counted in optimiser
steps (there, in forward calls of the layer, evaluation and recomputation included), ε and a rank floor, directions are
buffers saved with the adapter and never chosen again, one dropout mask for all slots, and Ū diag(g) V̄ᵀ is never formed.

The slots exist from the start with Ū = V̄ = 0, so that shapes, optimiser groups and compiled graphs never change: until
the launch they contribute exactly 0 and the gradient of g is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from weftlora.errors import ConfigError, suggest
from weftlora.kernel import Role, Slots
from weftlora.linalg import SELECT
from weftlora.numbers import is_number, is_whole
from weftlora.times import Time, check_time


@dataclass(frozen=True)
class Dash:
    """Launch s directions after a while of plain training.

    Args:
        directions: s, slots per site (paper's tables: 8).
        after: when to choose them: optimiser steps (int; the paper's 100), a fraction of the run (float in (0, 1)) or
            `weftlora.epochs(x)`.
        eps: ε of the change rate, relative to σ_max.
        select: "rate" (the paper); "top" (largest σ), "bottom" (smallest σ) and "random" are controls.
        seed: of the directions that "random" draws.
    """

    directions: int = 8
    after: Time = 100
    eps: float = 1e-8
    select: Literal["rate", "top", "bottom", "random"] = "rate"
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_whole(self.directions, 1):
            raise ConfigError(f"Dash(directions={self.directions!r}) launches nothing: use a whole number from 1 up.")
        object.__setattr__(self, "after", check_time(self.after, "Dash(after=...)"))
        if not is_number(self.eps) or not 0 <= self.eps < math.inf:
            raise ConfigError(f"Dash(eps={self.eps!r}) is no small number: use 1e-8.")
        if self.select not in SELECT:
            raise ConfigError(f"Dash(select={self.select!r}): {suggest(str(self.select), SELECT)}")
        if not is_whole(self.seed):
            raise ConfigError(f"Dash(seed={self.seed!r}) is no seed: use a whole number.")


class DashTerm(nn.Module):
    """The Dash slots of one site. Saved: gains, directions, which they are, and whether they have been launched."""

    roles: ClassVar[Mapping[str, Role]] = {"gain": "gain"}

    down: Tensor
    up: Tensor
    index: Tensor
    sigma: Tensor
    rate: Tensor
    launched: Tensor

    def __init__(self, choice: Dash, fan_in: int, out: int):
        super().__init__()
        self.choice = choice
        s = min(choice.directions, fan_in, out)
        self.gain = nn.Parameter(torch.zeros(s))
        self.register_buffer("down", torch.zeros(s, fan_in))
        self.register_buffer("up", torch.zeros(out, s))
        self.register_buffer("index", torch.full((s,), -1, dtype=torch.long))
        self.register_buffer("sigma", torch.zeros(s))
        self.register_buffer("rate", torch.zeros(s))
        self.register_buffer("launched", torch.zeros((), dtype=torch.bool))

    def slots(self, scale: float, mask: Tensor | None, layer_gate: Tensor | None) -> Slots:
        """V̄ᵀ, Ū and g: scale 1, outside the rank mask, under the layer gate."""
        return Slots(self.down, self.up, self.gain if layer_gate is None else self.gain * layer_gate.to(self.gain))

    @torch.no_grad()
    def launch(self, directions: Any) -> None:
        """Fix the directions (a `weftlora.linalg.Directions`, possibly fewer than s); gains stay 0, so the function does too."""
        s = len(directions.index)
        for name in ("down", "up", "index", "sigma", "rate"):
            value, buffer = getattr(directions, name), getattr(self, name)
            place = buffer[:, :s] if name == "up" else buffer[:s]
            place.copy_(value)
        self.launched.fill_(True)
