"""The inner optimiser: what trains θ while α stands still, and what the adjoint needs to know of each of its steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weftlora.errors import ConfigError, suggest
from weftlora.glue.optimizer import param_groups
from weftlora.numbers import is_number, is_whole
from weftlora.search.passes import Batch, Passed, Passes, Random
from weftlora.search.unroll import Taken

log = logging.getLogger(__name__)

OPTIMIZERS = ("adamw", "sgd", "sign_sgd")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Inner:
    """How θ is trained during the search.

    Args:
        lr: rate at the start (released code: 1e-4); `schedule`: "cosine" to 0 over the search (released code) or "constant".
        batch_size, accumulation: rows per micro-batch, micro-batches per optimiser step (released code: 1 and 8). With
            several processes these are the numbers of all together.
        optimizer: "adamw" (its state lives through the search), "sgd", or "sign_sgd": what the released code's Adam is
            after its state has been wiped.
        weight_decay: of A and B, as `weftlora.param_groups` has it.
        max_grad_norm: of all trained parameters; 0 is no clipping.
    """

    lr: float = 1e-4
    batch_size: int = 1
    accumulation: int = 8
    optimizer: Literal["adamw", "sgd", "sign_sgd"] = "adamw"
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation"):
            value = getattr(self, name)
            if not is_whole(value, 1):
                raise ConfigError(f"{name}={value!r} is no count: use a whole number from 1 up.")
        for name in ("lr", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < math.inf or (name == "lr" and not value):
                raise ConfigError(f"{name}={value!r} cannot be used in a search: give a positive number.")
        for name, valid in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in valid:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {suggest(str(getattr(self, name)), valid)}")


class InnerLoop:
    """Takes the inner steps of a search.

    Args:
        steps: how many there will be, for the schedule.
    """

    def __init__(self, model: nn.Module, passes: Passes, settings: Inner, steps: int):
        self.passes, self.settings, self.total = passes, settings, steps
        groups = param_groups(model, lr=settings.lr, weight_decay=settings.weight_decay)
        adam = settings.optimizer == "adamw"
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups) if adam else torch.optim.SGD(groups)
        self.rates = [group["lr"] for group in groups]
        self.taken = 0
        self.skipped = 0
        self.unlabelled = 0

    def step(self, batches: Sequence[Batch], *, keep: bool) -> tuple[Passed, Taken | None]:
        """One optimiser step; the second value, if `keep`, is for the adjoint.

        Where a gradient is no number, or all labels of the batches are ignored, the step is skipped and counted: a step of
        Adam without a gradient would still move θ.
        """
        before = Random.now()
        passed = self.passes.backward(batches, training=True)
        self.taken += 1
        if not passed.labelled:
            self.unlabelled += 1
            if self.unlabelled == 1:
                log.warning(
                    "all labels of a training batch are ignored: its step on θ is skipped (later ones are counted)"
                )
        if not passed.finite:
            self.skipped += 1
            return passed, None
        theta = [p.detach().clone() for p in self.passes.params] if keep else []
        clip = self._clip(passed.theta)
        self._update(passed.theta, clip)
        return passed, Taken(theta, batches, before, clip, *self._derivative()) if keep else None

    def _clip(self, gradients: list[Tensor]) -> float:
        if not self.settings.max_grad_norm:
            return 1.0
        norm = float(torch.stack([g.double().square().sum().cpu() for g in gradients]).sum().sqrt())
        return min(1.0, self.settings.max_grad_norm / max(norm, 1e-12))

    def _update(self, gradients: list[Tensor], clip: float) -> None:
        factor = 1.0
        if self.settings.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * (self.taken - 1) / self.total))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        held = [p.grad for p in self.passes.params]
        try:
            for p, g in zip(self.passes.params, gradients, strict=True):
                p.grad = g.sign() if self.settings.optimizer == "sign_sgd" else g * clip
            self.optimizer.step()
        finally:
            for p, gradient in zip(self.passes.params, held, strict=True):
                p.grad = gradient

    def _derivative(self) -> tuple[list[float], list[Tensor | float], float]:
        """1 − η w and P of every parameter, and β₁, of the step just taken."""
        found: dict[int, tuple[float, Tensor | float]] = {}
        beta = 0.0
        for group in self.optimizer.param_groups:
            keep = 1 - group["lr"] * group["weight_decay"]
            for p in group["params"]:
                push: Tensor | float = group["lr"]
                if isinstance(self.optimizer, torch.optim.AdamW):
                    beta, beta2 = group["betas"]
                    state = self.optimizer.state[p]
                    t = float(state["step"])
                    root = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt()
                    push = group["lr"] / (1 - beta**t) / (root + group["eps"])
                found[id(p)] = (keep, push)
        keeps, pushes = zip(*(found[id(p)] for p in self.passes.params), strict=True)
        return list(keeps), list(pushes), beta

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, beside θ."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "taken": self.taken,
            "skipped": self.skipped,
            "unlabelled": self.unlabelled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.taken, self.skipped, self.unlabelled = state["taken"], state["skipped"], state["unlabelled"]
