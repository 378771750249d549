"""The inner steps of a search, which train θ while α stands still, and the hypergradient through them.

Reverse accumulation, with one Hessian-vector product per step:

    θ_{k+1} = (1 − η_k w) θ_k − P_k m_{k+1}          m_{k+1} = β₁ m_k + (1 − β₁) c_k ∇_θ R_k(θ_k, α)

    λ = ∇_θ R_val(θ_K, α);   g = ∂_α R_val(θ_K, α);   μ = 0;   for k = K−1 … 0:
        m̄ = μ − P_k λ;   ḡ = (1 − β₁) c_k m̄
        λ ← (1 − η_k w) λ + ∇²_θθ R_k ḡ;   g ← g + (∂_α ∇_θ R_k)ᵀ ḡ;   μ ← β₁ m̄

SGD: P = η, β₁ = 0. Adam: P = η · (bias-corrected 1 / (√v + ε)), with the second moment v held constant. c_k is the factor
of gradient clipping, held constant too. What happened before the first of the K steps is a constant (warm start).

Finite differences give both products from one pair of first-order passes at θ_k ± ε ḡ, with ε = c / ‖ḡ‖; the exact way is
a double backward through the reference path of the kernel.

Source: the adjoint and the finite differences are ours (specs), the choice c = 1e-2 is that of DARTS, arXiv 1806.09055.
Flexora's text speaks of unrolled differentiation, its released code keeps the direct term only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weftlora.adapted.hooks import in_mode
from weftlora.errors import ConfigError, suggest
from weftlora.host.optimizer import param_groups
from weftlora.kernel import use_reference
from weftlora.schedule import processes
from weftlora.search.batches import Batch, Passed, Passes, Random, math_attention
from weftlora.settings import is_number, is_whole
from weftlora.terms.layers import SearchedLayers

log = logging.getLogger(__name__)

Product = Callable[["InnerStep", list[Tensor]], tuple[list[Tensor], Tensor]]


@dataclass(frozen=True)
class InnerStep:
    """One inner step, as much of it as the adjoint needs; lists go with the parameters."""

    theta: list[Tensor]  # before the step
    batches: Sequence[Batch]
    random: Random  # before the passes of the step
    clip: float  # what the gradient was multiplied with
    keep: list[float]  # 1 − η w
    push: list[Tensor | float]  # P
    beta: float  # β₁


def adjoint(steps: Sequence[InnerStep], lam: list[Tensor], g_n: Tensor, product: Product) -> Tensor:
    """g [N] fp64 with the inner steps differentiated; `lam` and `g_n` are the validation gradients at the last θ."""
    mu = [torch.zeros_like(value) for value in lam]
    for step in reversed(steps):
        bar = [m - p * value for m, p, value in zip(mu, step.push, lam, strict=True)]
        towards = [(1 - step.beta) * step.clip * b for b in bar]
        theta, alpha = product(step, towards)
        lam = [k * value + u for k, value, u in zip(step.keep, lam, theta, strict=True)]
        g_n = g_n + alpha
        mu = [step.beta * b for b in bar]
    return g_n


def by_differences(passes: Passes, search: SearchedLayers, alpha_n: Tensor) -> Product:
    """H ḡ and (∂_α ∇_θ R)ᵀ ḡ by central differences; the perturbation of θ has norm `search.fd_step`."""

    def product(step: InnerStep, towards: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        norm = float(torch.stack([t.double().square().sum() for t in towards]).sum().sqrt())
        if not norm:
            return [torch.zeros_like(t) for t in towards], torch.zeros_like(alpha_n.detach())
        eps = search.fd_step / norm
        sides = []
        for sign in (eps, -eps):
            with (
                parameters_at(passes.params, [v + sign * t for v, t in zip(step.theta, towards, strict=True)]),
                step.random.replayed(),
            ):
                sides.append(passes.backward(step.batches, training=True))
        plus, minus = sides
        theta = [(a - b) / (2 * eps) for a, b in zip(plus.theta, minus.theta, strict=True)]
        alpha = [search.gradient(side.h, alpha_n) for side in sides]
        return theta, (alpha[0] - alpha[1]) / (2 * eps)

    return product


def by_double_backward(passes: Passes, search: SearchedLayers, alpha_n: Tensor) -> Product:
    """The same products exactly, through the reference path and plain attention."""

    def product(step: InnerStep, towards: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        alpha = alpha_n.detach().clone().requires_grad_()
        with (
            parameters_at(passes.params, step.theta),
            step.random.replayed(),
            in_mode(passes.model, training=True),
            use_reference(),
            math_attention(),
            passes.without_gradients(),
        ):
            shares, _ = passes.shares(step.batches)

            def accumulate() -> None:
                for batch, share in shares:
                    gates = list(search.gates(alpha))  # a graph per micro-batch: its own backward frees it
                    with passes.gates.graphed(gates):
                        _second(passes, batch, share, towards)

            processes.attempt(accumulate, "a double backward of the search", passes.device)
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*passes.params, alpha)]
        processes.sum_up(found, passes.device)
        return found[:-1], found[-1]

    return product


def _second(passes: Passes, batch: Batch, share: float, towards: list[Tensor]) -> None:
    """Add the derivative of ⟨∇_θ R_b, towards⟩ to `.grad`.

    By `backward`, not by `torch.autograd.grad` for these parameters alone: that leaves a function marked once_differentiable out
    without a word, because no path through it is left, and the product would lack a term.
    """
    try:
        loss = passes.loss(batch) * share
        first = torch.autograd.grad(loss, passes.params, create_graph=True, allow_unused=True)
        pairs = [(g * t).sum() for g, t in zip(first, towards, strict=True) if g is not None]
        if graphed := [p for p in pairs if p.requires_grad]:
            torch.stack(graphed).sum().backward()
    except RuntimeError as error:
        if "derivative" not in str(error) and "once_differentiable" not in str(error):
            raise
        raise ConfigError(
            f"hypergrad='unrolled_exact' needs second derivatives that this model's kernels do not have ({error}): load it with "
            "attn_implementation='eager', or use hypergrad='unrolled_fd'."
        ) from None


def check_exact(model: nn.Module) -> None:
    """Refuse, before anything is trained, a model that cannot be differentiated twice.

    Raises:
        ConfigError: a quantised base, gradient checkpointing, or fused attention that has no second derivative.
    """
    advice = "use hypergrad='unrolled_fd', which needs first derivatives only"
    if any(not p.is_floating_point() for p in model.parameters()) or getattr(model, "is_quantized", False):
        raise ConfigError(
            f"hypergrad='unrolled_exact' on a quantised base: its matrix products have no second derivative; {advice}."
        )
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            raise ConfigError(f"hypergrad='unrolled_exact' with gradient checkpointing: turn it off, or {advice}.")
    kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kind not in (None, "eager", "sdpa"):
        raise ConfigError(
            f"hypergrad='unrolled_exact' with attn_implementation={kind!r}, which has no second derivative: load the model with "
            f"'eager', or {advice}."
        )


@contextmanager
def parameters_at(params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """The parameters have these values inside the block, and their own again, bit for bit, after it."""
    before = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(params, before, strict=True):
                p.copy_(value)


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

    def step(self, batches: Sequence[Batch], *, keep: bool) -> tuple[Passed, InnerStep | None]:
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
        return passed, InnerStep(theta, batches, before, clip, *self._derivative()) if keep else None

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
