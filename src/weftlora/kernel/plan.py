"""What a node is made of: what of its linears is no tensor, their tensors, and what they read of x; flat lists of these.

Autograd takes and saves tensors in one flat row; `flat` makes it, `split` and `latents_of` read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Member(NamedTuple):
    """What of one linear is no tensor. `mask`: which mask its slots read x through, -1 for x itself."""

    scale: float  # 1/(1 − p) of its mask included
    heads: int
    r: int
    mask: int
    told: bool  # whether ω is handed out


class Parts(NamedTuple):
    """The tensors of one linear: either `weight` [out, in] and `bias`, or `base` [..., out], the output it is added to."""

    weight: Tensor | None
    bias: Tensor | None
    base: Tensor | None
    down: Tensor
    up: Tensor
    route: Tensor | None
    mix: Tensor | None


class Plan(NamedTuple):
    """A node's members and masks; p is the masks' probability."""

    members: tuple[Member, ...]
    masks: int
    p: float


class Latents(NamedTuple):
    """What one member reads: u [t, R'] (padded) and, routed, ω [t, N] and, where the router reads through mix, q."""

    u: Tensor
    q: Tensor | None
    omega: Tensor | None


def split(tensors: Sequence[Tensor | None]) -> list[Parts]:
    """The flat tensors of a node, member by member."""
    n = len(Parts._fields)
    return [Parts(*tensors[i : i + n]) for i in range(0, len(tensors), n)]  # type: ignore[arg-type]


def flat(each: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """All tensors, one member after the other."""
    return [t for own in each for t in own]


def latents_of(tensors: Sequence[Tensor]) -> list[Latents]:
    """The flat latents of a node, member by member."""
    n = len(Latents._fields)
    return [Latents(*tensors[i : i + n]) for i in range(0, len(tensors), n)]


def spread(members: Sequence[Member], told: Sequence[Tensor | None]) -> list[Tensor | None]:
    """ω's gradients by member, None for those whose ω was not handed out."""
    given = iter(told)
    return [next(given) if m.told else None for m in members]
