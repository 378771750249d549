"""The equation in einsums and autograd's own derivatives: what the fast path is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from weftlora.kernel.dropout import dropped
from weftlora.kernel.factors import Work, by_part, like, softmax, used


def reference(x: Tensor, work: Work) -> Tensor:
    """h B̃ᵀ as the equation is written, without the base output. x [..., in] → [..., out], in the dtype of x.

    The router always sees x itself, without dropout.
    """
    f, p = work.factors, work.dropout
    A, B = like(f.A, x), like(f.B if f.v is None else f.v.to(f.B)[:, None] * f.B, x)
    g_r = f.scale * (torch.ones_like(A[:, 0]) if f.gate is None else like(f.gate, x))
    x_dropped = dropped(x, p, work.mask) if p else x
    if f.router is None:
        u_r = by_part(torch.einsum("...i,ri->...r", x_dropped, A), f.keep)
        y = torch.einsum("...r,r,or->...o", u_r, g_r, B)
    else:
        router_input = x if f.router_input == "x" else by_part(torch.einsum("...i,ri->...r", x, A), f.keep)
        omega = softmax(torch.einsum("...i,ni->...n", router_input, like(f.router, x)))
        if work.on_mix is not None:
            work.on_mix(omega)
        x_n = dropped(x[..., None, :].expand(*x.shape[:-1], f.heads, -1), p) if work.plain else None
        u_nr = torch.einsum("...i,ri->...r", x_dropped, A)[..., None, :] if x_n is None else x_n @ A.T
        h = used(omega, f.top).to(x.dtype)[..., None] * (by_part(u_nr, f.keep) * g_r)
        y = torch.einsum("...nr,onr->...o", h, B.unflatten(1, (f.heads, A.shape[0])))
    for slots in f.extra:
        u_e = by_part(torch.einsum("...i,ei->...e", x_dropped, like(slots.down, x)), slots.keep)
        y = y + torch.einsum("...e,e,oe->...o", u_e, *(like(t, x) for t in (slots.gate, slots.up)))
    return y
