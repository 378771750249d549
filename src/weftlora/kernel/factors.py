"""What the terms of a site add up to: the letters of the equation, and ΔW where it exists."""

from __future__ import annotations

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

    @property
    def heads(self) -> int:
        """How many B heads the router mixes; 1 where there is no router."""
        return 1 if self.router is None else self.router.shape[0]

    def only(self, slots: slice | Tensor) -> Factors:
        """These factors with some of the structure's slots, in their order: a slice, or indices [k] int64."""

        def columns(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[..., slots]

        by_head = self.B.unflatten(1, (self.heads, self.A.shape[0])) if self.router is not None else self.B
        b = cast(Tensor, columns(by_head))
        return replace(
            self,
            A=self.A[slots],
            B=b.flatten(1) if self.router is not None else b,
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
        raise MergeError(
            "a routed update depends on the token, so it has no weight-space form; keep the adapter unmerged."
        )
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
    """The parts side by side, in the dtype and on the device of the first."""
    return parts[0] if len(parts) == 1 else torch.cat([like(p, parts[0]) for p in parts], dim)


def by_part(u: Tensor, keep: Tensor | None) -> Tensor:
    """u [..., slots] with the slots of its k-th part, along the first axes, scaled by keep[k]."""
    if keep is None:
        return u
    lead = u.shape[:-1].numel()
    apart = u.reshape(len(keep), lead // len(keep), u.shape[-1])
    return (apart * keep.to(u)[:, None]).reshape(u.shape)
