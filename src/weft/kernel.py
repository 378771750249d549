"""The one equation of weft, for every token x of a site with frozen weight W.

    u = drop(x) Aᵀ          A  [R, in]     rank slots
    z = g ⊙ u               g  [R]         static gates: scale × rank mask × layer gate × tied u
    h = ω(x) ⊗ z            ω  [N]         softmax router over N heads, only where one exists; else h = z
    y = x Wᵀ + b + h B̃ᵀ     B̃ = [v ⊙ B | Ū]

`B` is [out, N·r] (head n owns columns n·r … n·r+r−1) or [out, r]; `v` scales the rows of B only. Extra slots (the
directions of Dash, the frozen −B₀A₀ of LoRA-Init) have rows in A and columns Ū in B̃ of their own, their own gates, and
no router: on a routed site they are one more head of weight 1.

Letters of the einsums: t token, i in, o out, r rank slot, n head, e extra slot.

`reference` is the equation in einsums and autograd's own derivatives; `add_low_rank` is the same function with one
GEMM down over [A; extra; router] and one GEMM up over all heads and extra slots, in which nothing of size tokens × out
exists besides the result. `WEFT_REFERENCE=1` in the environment makes every site use `reference`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import MergeError

RouterInput = Literal["x", "Ax"]

_use_reference = os.environ.get("WEFT_REFERENCE") == "1"


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


def reference(
    x: Tensor,
    f: Factors,
    *,
    dropout: float = 0.0,
    per_head_dropout: bool = False,
    on_mix: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """h B̃ᵀ as the equation is written, without the base output. x [..., in] → [..., out], in the dtype of x.

    Args:
        dropout: probability of dropping an input element; 0 outside training. The router always sees x itself.
        per_head_dropout: a fresh mask for every head (the released HydraLoRA code) instead of one shared mask.
        on_mix: called with the router's weights [..., N] in fp32.
    """
    A, B = _like(f.A, x), _like(f.B if f.v is None else f.v.to(f.B)[:, None] * f.B, x)
    g_r = f.scale * (torch.ones_like(A[:, 0]) if f.gate is None else _like(f.gate, x))
    x_dropped = F.dropout(x, dropout) if dropout else x
    if f.router is None:
        u_r = _parts(torch.einsum("...i,ri->...r", x_dropped, A), f.keep)
        y = torch.einsum("...r,r,or->...o", u_r, g_r, B)
    else:
        router_input = x if f.router_input == "x" else _parts(torch.einsum("...i,ri->...r", x, A), f.keep)
        omega = _softmax(torch.einsum("...i,ni->...n", router_input, _like(f.router, x)))
        if on_mix is not None:
            on_mix(omega)
        x_n = F.dropout(x[..., None, :].expand(*x.shape[:-1], f.heads, -1), dropout) if per_head_dropout else None
        u_nr = torch.einsum("...i,ri->...r", x_dropped, A)[..., None, :] if x_n is None else x_n @ A.T
        h = omega.to(x.dtype)[..., None] * (_parts(u_nr, f.keep) * g_r)
        y = torch.einsum("...nr,onr->...o", h, B.unflatten(1, (f.heads, A.shape[0])))
    for slots in f.extra:
        u_e = _parts(torch.einsum("...i,ei->...e", x_dropped, _like(slots.down, x)), slots.keep)
        y = y + torch.einsum("...e,e,oe->...o", u_e, *(_like(t, x) for t in (slots.gate, slots.up)))
    return y


def add_low_rank(
    y: Tensor,
    x: Tensor,
    f: Factors,
    *,
    dropout: float = 0.0,
    per_head_dropout: bool = False,
    on_mix: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """y + h B̃ᵀ: base output y [..., out] plus the low-rank update of x [..., in]; arguments as in `reference`.

    Under autocast the GEMMs run in the autocast dtype and the router's softmax in fp32. The result has y's dtype.
    """
    if _use_reference:
        return y + reference(x, f, dropout=dropout, per_head_dropout=per_head_dropout, on_mix=on_mix).to(y.dtype)
    x_ti = x.reshape(-1, x.shape[-1])
    dropped = F.dropout(x_ti, dropout) if dropout else x_ti
    r, heads = f.A.shape[0], f.heads
    router_down = f.router if f.router_input == "x" else None

    down = [f.A, *(slots.down for slots in f.extra)]
    fused_router = router_down is not None and dropped is x_ti
    u = F.linear(dropped, _like(_cat([*down, router_down] if fused_router else down, 0), x))  # type: ignore[list-item]
    rank = r + sum(slots.down.shape[0] for slots in f.extra)

    u_r = _parts(u[:, :r], f.keep)
    z = u_r if f.gate is None else u_r * f.gate.to(u)
    scale, scaled_late = f.scale, len(f.extra) == 0  # one factor for all columns rides in the up GEMM for free
    if f.router is not None:
        logits = u[:, rank:] if fused_router else _router_logits(x_ti, f, None if dropout else u_r)
        omega = _softmax(logits)
        if on_mix is not None:
            on_mix(omega.view(*x.shape[:-1], heads))
        z = _per_head_latent(x_ti, f, dropout) if per_head_dropout and dropout else z[:, None, :]
        z = (omega[:, :, None] * z).to(u.dtype).reshape(len(x_ti), heads * r)
    up = f.B if f.v is None else f.v.to(f.B)[:, None] * f.B
    if f.extra:
        parts, start = [z * scale], r
        for slots in f.extra:
            u_e = _parts(u[:, start : start + slots.down.shape[0]], slots.keep)
            parts.append(u_e * slots.gate.to(u))
            start += slots.down.shape[0]
        z = torch.cat(parts, 1)
        up = _cat([up, *(slots.up for slots in f.extra)], 1)
    y_to = y.reshape(-1, y.shape[-1])
    # B̃ᵀ row-major: autograd then forms its gradient as zᵀ g; the other form, gᵀ z, took 9 times as long (fp32, CPU, r = 8)
    operands = (y_to, z.to(y.dtype), _like(up, y).T.contiguous())
    with _without_autocast(y):  # they are of y's dtype already, and so must the result be, fp32 under autocast included
        out = torch.addmm(*operands, alpha=scale if scaled_late else 1.0)
    return out.view(y.shape)


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
    with _without_autocast(A):
        delta = (B if f.gate is None else B * f.gate.to(dtype)) @ A * f.scale
        for slots in f.extra:
            delta += (slots.up.to(dtype) * slots.gate.to(dtype)) @ slots.down.to(dtype)
    return delta


@contextmanager
def use_reference(on: bool = True) -> Iterator[None]:
    """Within the block every site computes with `reference` (or, with False, with the fast path)."""
    global _use_reference
    before, _use_reference = _use_reference, on
    try:
        yield
    finally:
        _use_reference = before


def _without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    on = torch.is_autocast_enabled(t.device.type)
    return torch.autocast(t.device.type, enabled=False) if on else nullcontext()


def _parts(u: Tensor, keep: Tensor | None) -> Tensor:
    """u [..., slots] with the slots of its k-th part, along the first axes, scaled by keep[k]."""
    if keep is None:
        return u
    lead = u.shape[:-1].numel()
    apart = u.reshape(len(keep), lead // len(keep), u.shape[-1])
    return (apart * keep.to(u)[:, None]).reshape(u.shape)


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(device=x.device, dtype=x.dtype)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p.to(parts[0]) for p in parts], dim)


def _softmax(logits: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, -1, dtype=dtype)


def _router_logits(x_ti: Tensor, f: Factors, latent: Tensor | None) -> Tensor:
    """Logits where they cannot ride in the down GEMM: dropout stands between x and A, or the router reads A x.

    `latent` is A x [t, r] where x was not dropped.
    """
    assert f.router is not None
    if f.router_input == "Ax" and latent is None:
        latent = _parts(F.linear(x_ti, _like(f.A, x_ti)), f.keep)
    source = x_ti if f.router_input == "x" or latent is None else latent
    return F.linear(source, _like(f.router, source))


def _per_head_latent(x_ti: Tensor, f: Factors, dropout: float) -> Tensor:
    """g ⊙ u with a mask per head, [t, n, r]."""
    x_nti = F.dropout(x_ti.expand(f.heads, *x_ti.shape), dropout)
    u_tnr = _parts(F.linear(x_nti, _like(f.A, x_ti)).transpose(0, 1), f.keep)
    return u_tnr if f.gate is None else u_tnr * f.gate.to(u_tnr)
