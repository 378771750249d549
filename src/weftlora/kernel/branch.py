"""One site's update as the node takes it: two matrices, and what stands between them.

    y += scale · f(drop(x) downᵀ) upᵀ        down = Ã [R, in],  up = B̃ diag(g) [out, M]

Static gates, v and unequal scales are folded into `up` here, in fp32 or wider, with autograd's derivatives: they are
out × M numbers, nothing per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from weftlora.kernel.factors import Factors, joined, like


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


def branch(f: Factors, device: torch.device, dropout: bool) -> Branch:
    """The branch of these factors on `device`; `dropout`: the slots read x through a mask, the router does not."""
    r = f.A.shape[0]
    up = f.B.to(device)
    gate = f.gate
    own_scale = bool(f.extra) and f.scale != 1.0  # then the scale is not that of all columns
    if gate is not None or f.v is not None or own_scale:
        up = up.to(torch.promote_types(up.dtype, torch.float32))
    if own_scale:
        up = up * f.scale
    if gate is not None:
        up = (
            (up.unflatten(1, (f.heads, r)) * like(gate, up)).flatten(1) if f.router is not None else up * like(gate, up)
        )
    if f.v is not None:
        up = like(f.v, up)[:, None] * up
    if f.extra:
        wide = torch.promote_types(f.extra[0].up.dtype, torch.float32)
        up = joined([up, *(slots.up.to(wide) * slots.gate.to(wide) for slots in f.extra)], 1)
    down = joined([f.A.to(device), *(slots.down for slots in f.extra)], 0)
    route = mix = None
    if f.router is not None:
        router = f.router.to(device)
        rows = f.A.to(device).view(f.A.shape) if dropout else None  # a view: Dynamo takes no tensor twice in one node
        route, mix = (router, None) if f.router_input == "x" else (rows, router)
    return Branch(down, up, 1.0 if f.extra else f.scale, 0 if f.router is None else f.heads, r, route, mix)
