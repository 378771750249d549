"""What the terms of a site add up to: the letters of the equation, the update in the form that a node takes, and ΔW where it exists.

    u = [u_r | u_e]        [t, r + E]     what the slots read; extra slots last
    q                      [t, N or r]    what the router reads, of x without dropout
    ω = softmax(q) or softmax(q mixᵀ)     in fp32 or wider
    ω⁺ = ω of the `top` heads of largest ω, over their sum; 0 for the others; without a `top` all of ω
    h = f(u) = [ω⁺ ⊗ u_r | u_e]           [t, N·r + E]; without a router f is the identity

ω⁺ is the softmax of the logits of the heads that are left. Who listens to a router is told ω.

One site's update is two matrices, and f between them:

    y += scale · f(drop(x) downᵀ) upᵀ     down = Ã [R, in],  up = B̃ diag(g) [out, M]

Static gates, v and unequal scales are folded into `up` here, in fp32 or wider, with autograd's derivatives: they are
out × M elements, nothing per token. So an unrouted site has h = u.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from weftlora.errors import MergeError

RouterInput = Literal["x", "Ax"]
"""What a router reads: the raw input of its linear, or its projection on A."""


Role = Literal["down", "up", "gain", "router"]
"""What a trained tensor does in the equation, for an optimiser that treats roles differently (`weftlora.param_groups`).

down     A: reads x. Kaiming at the start; what LoRA-FA freezes, and what keeps the base rate in LoRA+.
up       B: writes to y, zero at the start; what LoRA+ trains faster. All heads of Hydra lie in one.
gain     scales one rank slot or one row: u and v of Tied, the gains of Dash. Never decayed: 0 is not where they rest
         (u, v), or is where they have not been launched (Dash).
router   mixes heads. Never decayed.

A term says them in its `roles`, by the names of its parameters. What is no parameter of a term has none: rank masks and layer
gates are decided by controllers, the directions of Dash and the twins of LoRA-Init are frozen, so all of these are buffers.
"""


Axis = Literal["slots", "in", "out", "heads"]
"""What an axis of a tensor runs over: rank slots, the input or output features of the base, heads."""

AXES: Mapping[str, tuple[Axis, ...]] = {
    "A": ("slots", "in"),
    "B": ("out", "slots"),
    "gate": ("slots",),
    "v": ("out",),
    "router": ("heads", "in"),
}
"""Of each letter of `Factors` (a router that reads A x has its slots in the place of in). Where a base is split along in or out, a
letter with that axis is split as it is, and the others are whole."""


class Slots(NamedTuple):
    """Extra rank slots outside the structure: y += ((x downᵀ) ⊙ gate) upᵀ. No router, no `v`."""

    down: Tensor  # [E, in]
    up: Tensor  # [out, E]
    gate: Tensor  # [E]
    keep: Tensor | None = None  # [K, E], see `Factors.keep`


@dataclass(frozen=True)
class Factors:
    """What the terms of one site add up to: the letters of the equation, ready for the kernel.

    Tensors may be of any floating dtype and on any device; the kernel casts these small factors to the dtype and device
    of x and never casts x.
    """

    A: Tensor  # [r, in]
    B: Tensor  # [out, r], or [out, N·r] with a router
    scale: float = 1.0  # common to all slots of the structure: α/r
    gate: Tensor | None = None  # [r], the gates that are not one common number
    v: Tensor | None = None  # [out]
    router: Tensor | None = None  # [N, in], or [N, r] with router_input="Ax"
    router_input: RouterInput = "x"
    extra: tuple[Slots, ...] = ()
    keep: Tensor | None = (
        None  # [K, r]: the tokens are K equal consecutive parts; part k has slot r scaled by keep[k, r]
    )
    top: int | None = None  # how many heads every token uses; None is all of them

    @property
    def heads(self) -> int:
        """How many B heads the router mixes; 1 where there is no router."""
        return 1 if self.router is None else self.router.shape[-2]

    def only(self, slots: slice | Tensor) -> Factors:
        """These factors with some of the structure's slots, in their order: a slice, or indices [k] int64."""

        def columns(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[..., slots]

        by_head = self.B.unflatten(-1, (self.heads, self.A.shape[-2])) if self.router is not None else self.B
        b = cast(Tensor, columns(by_head))
        return replace(
            self,
            A=self.A[..., slots, :],
            B=b.flatten(-2) if self.router is not None else b,
            gate=columns(self.gate),
            router=columns(self.router) if self.router_input == "Ax" else self.router,
            keep=columns(self.keep),
        )


def delta_weight(f: Factors) -> Tensor:
    """ΔW = B̃ diag(g) Ã of an unrouted site, [out, in], computed in fp32 (fp64 if the factors are).

    Raises:
        MergeError: the update depends on the token, so no ΔW exists.
    """
    if f.router is not None:
        raise MergeError("a routed update depends on the token, so it cannot be merged; keep the adapter unmerged.")
    dtype = torch.promote_types(f.A.dtype, torch.float32)
    A, B = f.A.to(dtype), f.B.to(dtype)
    if f.v is not None:
        B = f.v.to(dtype)[:, None] * B
    with without_autocast(A):
        delta = (B if f.gate is None else B * f.gate.to(dtype)) @ A * f.scale
        for slots in f.extra:
            delta += (slots.up.to(dtype) * slots.gate.to(dtype)) @ slots.down.to(dtype)
    return delta


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on t's device, for code that has cast what it needs."""
    on = torch.is_autocast_enabled(t.device.type)
    return torch.autocast(t.device.type, enabled=False) if on else nullcontext()


def like(t: Tensor, x: Tensor) -> Tensor:
    """t in the dtype and on the device of x."""
    return t.to(device=x.device, dtype=x.dtype)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts side by side, in the dtype and on the device of the first; one that all sites of a batch share, for each of them."""
    if len(parts) == 1:
        return parts[0]
    lead = parts[0].shape[:-2]
    for p in parts:  # max(..., key=len) is no part of a compiled graph
        lead = p.shape[:-2] if p.dim() - 2 > len(lead) else lead
    return torch.cat([like(p, parts[0]).expand(*lead, *p.shape[-2:]) for p in parts], dim)


def by_part(u: Tensor, keep: Tensor | None) -> Tensor:
    """u [..., slots] with the slots of its k-th part, along the first axes, scaled by keep[k]."""
    if keep is None:
        return u
    lead = u.shape[:-1].numel()
    apart = u.reshape(len(keep), lead // len(keep), u.shape[-1])
    return (apart * keep.to(u)[:, None]).reshape(u.shape)


def softmax(logits: Tensor) -> Tensor:
    """Over the last axis, in fp32 or wider."""
    return torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def used(omega: Tensor, top: int | None) -> Tensor:
    """ω⁺ [..., N] of ω [..., N]: the `top` largest over their sum, 0 for the others; of equal ones those of the lowest index."""
    if top is None or top >= omega.shape[-1]:
        return omega
    first = omega.sort(dim=-1, descending=True, stable=True).indices[..., :top]
    kept = omega * torch.zeros_like(omega).scatter_(-1, first, 1.0)
    return kept / kept.sum(-1, keepdim=True)


def mixture(u: Tensor, omega: Tensor, r: int) -> Tensor:
    """h [t, N·r + E] in u's dtype, rounded once, of u [t, r + E] and ω⁺ [t, N]."""
    h = (omega[:, :, None] * u[:, None, :r]).flatten(1).to(u.dtype)
    return h if u.shape[1] == r else torch.cat([h, u[:, r:]], 1)


def mixture_backward(
    gh: Tensor | None, gomega: Tensor | None, u: Tensor, omega: Tensor, r: int, top: int | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of u and of the logits; gh [t, ≥ N·r + E] is h's, gomega [t, N] what came to ω from elsewhere."""
    glogits = None
    if gh is None:
        gu = torch.zeros_like(u)
    else:
        heads, mixed = omega.shape[1], used(omega, top)
        by_head = gh[:, : heads * r].unflatten(1, (heads, r)).to(omega.dtype)
        g = (by_head * u[:, None, :r]).sum(2)
        if mixed is omega and gomega is not None:
            g, gomega = g + gomega, None
        glogits = _through_softmax(g, mixed)
        gu = (mixed[:, :, None] * by_head).sum(1).to(u.dtype)
        if u.shape[1] > r:
            gu = torch.cat([gu, gh[:, heads * r : heads * r + u.shape[1] - r]], 1)
    if gomega is not None:
        told = _through_softmax(gomega, omega)
        glogits = told if glogits is None else glogits + told
    assert glogits is not None  # a member without any gradient is left out before
    return gu, glogits.to(u.dtype)


def _through_softmax(g: Tensor, omega: Tensor) -> Tensor:
    """The gradient of the logits, given that of their softmax; of those left out, whose ω is 0, it is 0."""
    return omega * (g - (g * omega).sum(1, keepdim=True))


@dataclass(frozen=True)
class Work:
    """What a site asks of one forward: its factors, and how they are applied.

    `dropout` is 0 outside training; `on_mix` is called with the router's weights [..., N]; `mask` are the bits of a mask already
    drawn (`weftlora.kernel.dropout.draw`), instead of a fresh one.
    """

    factors: Factors
    dropout: float = 0.0
    per_head_dropout: bool = False
    on_mix: Callable[[Tensor], None] | None = None
    mask: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether this is left to `reference`: a mask per head, as the released HydraLoRA code has them."""
        return self.per_head_dropout and self.dropout > 0 and self.factors.router is not None

    @property
    def scored(self) -> bool:
        """Whether parts of the batch have gates of their own, as while slots are scored."""
        return self.factors.keep is not None or any(slots.keep is not None for slots in self.factors.extra)


class Branch(NamedTuple):
    """The matrices of one update. `route` are rows that read x itself for the router, beside `down`.

    Unrouted: heads = 0. Routed by x: route = router [N, in]. Routed by A x: mix = router [N, r] on what `route` = A reads, or,
    where no dropout stands before them, on what `down` reads (route None).
    """

    down: Tensor
    up: Tensor
    scale: float
    heads: int
    r: int
    route: Tensor | None
    mix: Tensor | None
    top: int | None = None


def branch(f: Factors, device: torch.device, dropout: bool) -> Branch:
    """The branch of these factors on `device`; `dropout`: the slots read x through a mask, the router does not.

    Factors of a batch of sites have an axis of sites before theirs, and so have the matrices; what all of its sites share has none.
    """
    r = f.A.shape[-2]
    up = f.B.to(device)
    gate = f.gate
    own_scale = bool(f.extra) and f.scale != 1.0  # then the scale is not that of all columns
    if gate is not None or f.v is not None or own_scale:
        up = up.to(torch.promote_types(up.dtype, torch.float32))
    if own_scale:
        up = up * f.scale
    if gate is not None:
        each = like(gate, up).unsqueeze(-2)
        up = (up.unflatten(-1, (f.heads, r)) * each.unsqueeze(-2)).flatten(-2) if f.router is not None else up * each
    if f.v is not None:
        up = like(f.v, up).unsqueeze(-1) * up
    if f.extra:
        wide = torch.promote_types(f.extra[0].up.dtype, torch.float32)
        up = joined([up, *(slots.up.to(wide) * slots.gate.to(wide).unsqueeze(-2) for slots in f.extra)], -1)
    down = joined([f.A.to(device), *(slots.down for slots in f.extra)], -2)
    route = mix = None
    if f.router is not None:
        router = f.router.to(device)
        rows = f.A.to(device).view(f.A.shape) if dropout else None  # a view: Dynamo takes no tensor twice in one node
        route, mix = (router, None) if f.router_input == "x" else (rows, router)
    return Branch(down, up, 1.0 if f.extra else f.scale, 0 if f.router is None else f.heads, r, route, mix, f.top)
