"""f of the equation, h = f(u): the identity, or the router's mixture of N heads; and its derivative.

    u = [u_r | u_e]        [t, r + E]     what the slots read; extra slots last
    q                      [t, N or r]    what the router reads, of x without dropout
    ω = softmax(q) or softmax(q mixᵀ)     in fp32 or wider
    h = [ω ⊗ u_r | u_e]    [t, N·r + E]

All static gates are folded into B̃ beforehand, so an unrouted site has h = u.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(logits: Tensor) -> Tensor:
    """Over the last axis, in fp32 or wider."""
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def mixture(u: Tensor, omega: Tensor, r: int) -> Tensor:
    """h [t, N·r + E] in u's dtype, rounded once, of u [t, r + E] and ω [t, N]."""
    h = (omega[:, :, None] * u[:, None, :r]).flatten(1).to(u.dtype)
    return h if u.shape[1] == r else torch.cat([h, u[:, r:]], 1)


def mixture_backward(
    gh: Tensor | None, gomega: Tensor | None, u: Tensor, omega: Tensor, r: int
) -> tuple[Tensor, Tensor]:
    """Gradients of u and of the logits; gh [t, ≥ N·r + E] is h's, gomega [t, N] what came to ω from elsewhere."""
    if gh is None:
        gu = torch.zeros_like(u)
    else:
        heads = omega.shape[1]
        by_head = gh[:, : heads * r].unflatten(1, (heads, r)).to(omega.dtype)
        through_u = (by_head * u[:, None, :r]).sum(2)
        gomega = through_u if gomega is None else gomega + through_u
        gu = (omega[:, :, None] * by_head).sum(1).to(u.dtype)
        if u.shape[1] > r:
            gu = torch.cat([gu, gh[:, heads * r : heads * r + u.shape[1] - r]], 1)
    assert gomega is not None  # a member without any gradient is left out before
    glogits = omega * (gomega - (gomega * omega).sum(1, keepdim=True))
    return gu, glogits.to(u.dtype)
