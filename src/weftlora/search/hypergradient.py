"""The inner steps of a search, which train θ while α stands still, and the hypergradient through them.

Reverse accumulation, with one Hessian-vector product per step:

    γ_k = ∇_θ R_k(θ_k, α);   n = ‖γ_k‖;   g_k = c_k γ_k,  c_k = min(1, M / n)                           clipping
    m_{k+1} = β₁ m_k + (1 − β₁) g_k;      v_{k+1} = β₂ v_k + (1 − β₂) g_k²
    θ_{k+1} = (1 − η_k w) θ_k − η_k (m_{k+1} / b₁) / d,   d = √(v_{k+1} / b₂) + ε,   b_i = 1 − β_i^{t+1}

    λ = ∇_θ R_val(θ_K, α);   g = ∂_α R_val(θ_K, α);   μ = ν = 0;   for k = K−1 … 0:
        m̄ = μ − P λ,   P = η_k / (b₁ d);      v̄ = ν + Q λ,   Q = η_k m_{k+1} / (2 b₁ d² √(v_{k+1} b₂))
        ḡ = (1 − β₁) m̄ + 2 (1 − β₂) g_k v̄
        γ̄ = c_k (ḡ − γ_k ⟨γ_k, ḡ⟩ / n²) where clipping binds, else ḡ
        λ ← (1 − η_k w) λ + ∇²_θθ R_k γ̄;   g ← g + (∂_α ∇_θ R_k)ᵀ γ̄;   μ ← β₁ m̄;   ν ← β₂ v̄

SGD: P = η, Q = 0, β₁ = 0. sign-SGD: P = Q = 0, because a sign does not move with its number. What happened before the first of
the K steps is a constant (warm start).

Where Adam has seen next to nothing of an element, its step is nearly η sign(g): the derivative is a spike of height η / ε at g = 0
and nothing beside it, while a step on α that turns the sign moves θ by 2 η. How much that can be is `Unrolled.rough`.

Finite differences give both products from one pair of first-order passes at θ_k ± ε γ̄, with ε = c / ‖γ̄‖; the exact way is
a double backward through the reference path of the kernel.

Source: the adjoint and the finite differences are ours (specs), the choice c = 1e-2 is that of DARTS, arXiv 1806.09055.
Flexora's text speaks of unrolled differentiation, its released code keeps the direct term only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weftlora.adapted.hooks import in_mode
from weftlora.adapter.shards import is_sharded, number
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
    gradients: list[Tensor]  # γ, not clipped
    clip: float  # c
    keep: list[float]  # 1 − η w
    push: list[Tensor | float]  # P
    bend: list[Tensor | float]  # Q
    betas: tuple[float, float] = (0.0, 0.0)
    turning: list[Tensor | float] = field(
        default_factory=list
    )  # η where the step may turn from one sign to the other, else 0

    def jumps(self, lam: Sequence[Tensor]) -> float:
        """Σ (η λ_p)² over the elements whose step may turn: by how much that may change R, squared."""
        return sum(
            number((t * value.double()).square().sum())
            for t, value in zip(self.turning, lam, strict=True)
            if isinstance(t, Tensor)
        )

    def back(
        self, lam: Sequence[Tensor], mu: Sequence[Tensor], nu: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """γ̄, and μ and ν of the step before."""
        (first, second), clip = self.betas, self.clip
        m = [u - p * value for u, p, value in zip(mu, self.push, lam, strict=True)]
        v = [u + q * value for u, q, value in zip(nu, self.bend, lam, strict=True)]
        bar = [(1 - first) * a + 2 * (1 - second) * clip * g * b for a, b, g in zip(m, v, self.gradients, strict=True)]
        if clip < 1:
            norm = _dot(self.gradients, self.gradients)
            along = _dot(self.gradients, bar) / norm
            bar = [clip * (b - along * g) for b, g in zip(bar, self.gradients, strict=True)]
        return bar, [first * each for each in m], [second * each for each in v]


@dataclass(frozen=True)
class Unrolled:
    """g [N] fp64 with the inner steps differentiated.

    `rough`: how large what elements of Adam that turn may add to g is, beside g. A derivative does not see it: at 0 it is good to
    the last digit, above 1 it says little of a step on α.
    """

    gradient: Tensor
    rough: float


def adjoint(steps: Sequence[InnerStep], lam: list[Tensor], g_n: Tensor, product: Product, reach: float) -> Unrolled:
    """`lam` and `g_n` are the validation gradients at the last θ; `reach` is how far a step moves α."""
    mu = [torch.zeros_like(value) for value in lam]
    nu = [torch.zeros_like(value) for value in lam]
    jumps = 0.0
    for step in reversed(steps):
        jumps += step.jumps(lam)
        towards, mu, nu = step.back(lam, mu, nu)
        theta, alpha = product(step, towards)
        lam = [k * value + u for k, value, u in zip(step.keep, lam, theta, strict=True)]
        g_n = g_n + alpha
    norm = float(g_n.norm())
    return Unrolled(g_n, math.sqrt(jumps) / (reach * norm) if norm else 0.0)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    sums = [number((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True)]
    return float(torch.tensor(sums, dtype=torch.float64).sum())


def by_differences(passes: Passes, search: SearchedLayers, alpha_n: Tensor) -> Product:
    """H ḡ and (∂_α ∇_θ R)ᵀ ḡ by central differences; the perturbation of θ has norm `search.fd_step`."""

    def product(step: InnerStep, towards: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        norm = math.sqrt(_dot(towards, towards))
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
            f"hypergrad='unrolled_exact' does not work on a quantised base, whose matrix products have no second derivative: {advice}."
        )
    if is_sharded(model):
        raise ConfigError(
            "hypergrad='unrolled_exact' does not work on a model that is split among processes, where "
            f"there are no second derivatives: {advice}."
        )
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            raise ConfigError(
                f"hypergrad='unrolled_exact' does not work with gradient checkpointing: turn that off, or {advice}."
            )
    kind = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kind not in (None, "eager", "sdpa"):
        raise ConfigError(
            f"hypergrad='unrolled_exact' does not work with attn_implementation={kind!r}, which has no "
            "second derivative: load the model with "
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
                raise ConfigError(f"{name}={value!r} is not a count: use a whole number from 1 up.")
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
        reach: how far a step moves α.
    """

    def __init__(self, model: nn.Module, passes: Passes, settings: Inner, steps: int, reach: float = 0.0):
        self.reach = reach
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
                    "all labels of a training batch are ignored: its step on θ is skipped (further ones are only counted)"
                )
        if not passed.finite:
            self.skipped += 1
            return passed, None
        theta = [p.detach().clone() for p in self.passes.params] if keep else []
        clip = self._clip(passed.theta)
        derivative = self._update(passed.theta, clip)
        if not keep:
            return passed, None
        return passed, InnerStep(theta, batches, before, passed.theta, clip, **derivative)

    def _clip(self, gradients: list[Tensor]) -> float:
        if not self.settings.max_grad_norm:
            return 1.0
        norm = math.sqrt(_dot(gradients, gradients))
        return min(1.0, self.settings.max_grad_norm / max(norm, 1e-12))

    def _update(self, gradients: list[Tensor], clip: float) -> dict[str, Any]:
        """Take the step; see `_derivative`."""
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
            return self._derivative()
        finally:
            for p, gradient in zip(self.passes.params, held, strict=True):
                p.grad = gradient

    def _derivative(self) -> dict[str, Any]:
        """What the adjoint needs of the step just taken, beside θ and γ: fields of `InnerStep`."""
        found: dict[int, tuple[float, Tensor | float, Tensor | float, Tensor | float]] = {}
        betas = (0.0, 0.0)
        for group in self.optimizer.param_groups:
            rate = group["lr"]
            for p in group["params"]:
                push: Tensor | float = 0.0 if self.settings.optimizer == "sign_sgd" else rate
                bend: Tensor | float = 0.0
                turning: Tensor | float = 0.0
                if isinstance(self.optimizer, torch.optim.AdamW):
                    betas = group["betas"]
                    push, bend = _adam(self.optimizer.state[p], group)
                    turning = rate * _may_turn(self.optimizer.state[p], p, betas[1], self.reach)
                found[id(p)] = (1 - rate * group["weight_decay"], push, bend, turning)
        parts = zip(*(found[id(p)] for p in self.passes.params), strict=True)
        return {**dict(zip(("keep", "push", "bend", "turning"), map(list, parts), strict=True)), "betas": betas}

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, beside θ."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "taken": self.taken,
            "skipped": self.skipped,
            "unlabelled": self.unlabelled,
        }


def _adam(state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """P and Q of one parameter after a step of Adam; Q is 0 where v is: there was no gradient yet, so m is 0 too."""
    t, (first, second) = float(state["step"]), group["betas"]
    b1, b2 = 1 - first**t, 1 - second**t
    root = state["exp_avg_sq"].sqrt() / math.sqrt(b2)
    push = group["lr"] / b1 / (root + group["eps"])
    bend = push * state["exp_avg"] / (2 * b2 * root * (root + group["eps"]))
    return push, bend.where(root > 0, 0.0)


def _may_turn(state: dict[str, Any], p: Tensor, second: float, reach: float) -> Tensor:
    """Which elements' steps may turn from one sign to the other when α moves by `reach`.

    Their gradient then moves by about `reach` of what is usual in their tensor, and all of theirs so far were smaller than that.
    An element that never had one (A while B = 0) stays where it is for every α.
    """
    assert p.grad is not None
    seen, usual = state["exp_avg_sq"], p.grad.double().square().mean()
    return ((seen <= 2 * (1 - second) * reach**2 * usual) & (seen > 0)).double()
