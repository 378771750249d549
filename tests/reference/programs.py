"""Training programs written from the papers, sharing no code with weftlora: what its hypergradients are derivatives of.

Plain functions of fp64 tensors; torch is used for arithmetic and for the gradients of a loss alone. Optimisers are those of
"Decoupled Weight Decay Regularization" (arXiv 1711.05101) and plain descent, clipping is by the norm of all gradients, the
transformer is that of "LLaMA" (arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Loss = Callable[[list[Tensor], Tensor], Tensor]
"""(θ, gates of the blocks [N]) → loss."""


@dataclass
class Descent:
    """An optimiser and what it remembers."""

    kind: str  # "adamw", "sgd", "sign_sgd"
    lr: float
    decay: float
    clip: float  # the largest norm; 0 is none
    t: int = 0
    m: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)

    def step(self, theta: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        norm = sum(float((g * g).sum()) for g in gradients) ** 0.5
        if self.clip and norm > self.clip:
            gradients = [g * (self.clip / norm) for g in gradients]
        if self.kind == "sign_sgd":
            gradients = [g.sign() for g in gradients]
        if self.kind != "adamw":
            return [p - self.lr * (g + self.decay * p) for p, g in zip(theta, gradients, strict=True)]
        self.t += 1
        m = self.m or [torch.zeros_like(p) for p in theta]
        v = self.v or [torch.zeros_like(p) for p in theta]
        self.m = [0.9 * a + 0.1 * g for a, g in zip(m, gradients, strict=True)]
        self.v = [0.999 * b + 0.001 * g * g for b, g in zip(v, gradients, strict=True)]
        moved = []
        for p, a, b in zip(theta, self.m, self.v, strict=True):
            unbiased, square = a / (1 - 0.9**self.t), b / (1 - 0.999**self.t)
            moved.append(p - self.lr * self.decay * p - self.lr * unbiased / (square.sqrt() + 1e-8))
        return moved


def gates(alpha: Tensor) -> Tensor:
    """α̂ = N softmax(α)."""
    e = (alpha - alpha.max()).exp()
    return len(alpha) * e / e.sum()


def after(
    theta: list[Tensor], alpha: Tensor, train: Loss, validation: Loss, opt: Callable[[], Descent], k: int
) -> float:
    """The validation loss after k steps from `theta`, α standing still."""
    optimiser, gate = opt(), gates(alpha)
    for _ in range(k):
        leaves = [p.detach().clone().requires_grad_() for p in theta]
        gradients = torch.autograd.grad(train(leaves, gate), leaves)
        theta = optimiser.step(theta, list(gradients))
    with torch.no_grad():
        return float(validation(theta, gate))


def central(program: Callable[[Tensor], float], alpha: Tensor, h: float) -> Tensor:
    """Its gradient by central differences of fourth order: (4 D(h) − D(2h)) / 3."""

    def slope(i: int, step: float) -> float:
        unit = torch.zeros_like(alpha)
        unit[i] = step
        return (program(alpha + unit) - program(alpha - unit)) / (2 * step)

    return torch.tensor([(4 * slope(i, h) - slope(i, 2 * h)) / 3 for i in range(len(alpha))], dtype=torch.float64)


def lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, gate: Tensor, scale: float) -> Tensor:
    """x Wᵀ + α̂ s (x Aᵀ) Bᵀ."""
    return x @ weight.T + gate * scale * (x @ a.T) @ b.T


def rotated(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary positions of x [rows, heads, time, width]: pairs (i, i + width / 2)."""
    time, half = x.shape[-2], x.shape[-1] // 2
    angle = torch.arange(time, dtype=x.dtype)[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def transformer_loss(
    weights: dict[str, Tensor],
    heads: int,
    eps: float,
    tokens: Tensor,
    labels: Tensor,
    adapted: Callable[[Tensor, str], Tensor],
    blocks: int,
) -> Tensor:
    """Cross-entropy of the next token; `adapted(x, name)` is the output of one linear module of the blocks."""
    x = weights["model.embed_tokens.weight"][tokens]
    rows, time, width = x.shape
    future = torch.full((time, time), float("-inf"), dtype=x.dtype).triu(1)
    for i in range(blocks):
        at = f"model.layers.{i}."
        y = normed(x, weights[at + "input_layernorm.weight"], eps)
        q, k, v = (
            adapted(y, f"{at}self_attn.{name}").view(rows, time, heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotated(q), rotated(k)
        mixed = ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5 + future).softmax(-1) @ v
        x = x + adapted(mixed.transpose(1, 2).reshape(rows, time, width), f"{at}self_attn.o_proj")
        y = normed(x, weights[at + "post_attention_layernorm.weight"], eps)
        gated = adapted(y, f"{at}mlp.gate_proj")
        x = x + adapted(gated * gated.sigmoid() * adapted(y, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
    logits = normed(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
    logits, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    kept = wanted != -100
    logits, wanted = logits[kept], wanted[kept]
    return (logits.logsumexp(-1) - logits[torch.arange(len(wanted)), wanted]).mean()


def by_name(names: Sequence[str], theta: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, theta, strict=True))
