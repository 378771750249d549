"""The closed form of a site as one pair of matrices, no SVD: ΔW = B̃ diag(g) Ã, so

    Ã = [A; V̄ᵀ; A₀]        B̃ diag(g) = [s · v ⊙ B ⊙ g | Ū ⊙ gains | −s · B₀]        with s = α/r

Every scale and gate goes into B, so that the pair has scale 1. Slots that contribute exactly nothing (switched off, not
launched) are left out; those of an adapter that is not trained yet (B = 0) stay. An extra slot whose row of Ã is a multiple of
another slot's needs no slot of its own, its column is added to that one: the Dash slots of LoRA-TSD lie along the same
directions as the frozen −B₀A₀, so its rank is 2r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weftlora.adapter.site import Site
from weftlora.errors import AdapterError, MergeError

SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that servers reserve room for (the values of vLLM's max_lora_rank from 8 up)."""


@dataclass(frozen=True)
class Pair:
    """ΔW = B A of one site, fp64 on the CPU."""

    a: Tensor  # [R, in]
    b: Tensor  # [out, R]

    @property
    def rank(self) -> int:
        """R, the number of slots."""
        return len(self.a)

    def padded(self, rank: int) -> Pair:
        """The same product with `rank` ≥ R slots; the new ones are zero."""
        room = rank - self.rank
        return Pair(F.pad(self.a, (0, 0, 0, room)), F.pad(self.b, (0, room)))

    def transposed(self) -> Pair:
        """The pair of ΔWᵀ."""
        return Pair(self.b.T, self.a.T)

    def delta(self) -> Tensor:
        """ΔW [out, in]."""
        return self.b @ self.a

    def rounded(self, dtype: torch.dtype) -> Pair:
        """With its factors rounded to `dtype`."""
        return Pair(self.a.to(dtype).double(), self.b.to(dtype).double())


@dataclass(frozen=True)
class Stack:
    """ΔW of every expert of one fused parameter, in the layout that stock peft reads for it: one rank, the largest, A of expert after
    expert in one matrix, B of slot after slot."""

    pairs: tuple[Pair, ...]
    room: int = 0

    @property
    def rank(self) -> int:
        """That of every expert."""
        return max(self.room, *(pair.rank for pair in self.pairs))

    def padded(self, rank: int) -> Stack:
        """The same products with `rank` slots."""
        return Stack(self.pairs, rank)

    def transposed(self) -> Stack:
        """The stack of ΔWᵀ."""
        return Stack(tuple(pair.transposed() for pair in self.pairs), self.room)

    @property
    def a(self) -> Tensor:
        """[E·R, in]: row e·R + k is slot k of expert e."""
        return torch.cat([pair.padded(self.rank).a for pair in self.pairs])

    @property
    def b(self) -> Tensor:
        """[out, R·E]: column k·E + e is slot k of expert e."""
        return torch.stack([pair.padded(self.rank).b for pair in self.pairs], 2).flatten(1)

    def delta(self) -> Tensor:
        """ΔW [E, out, in]."""
        return torch.stack([pair.delta() for pair in self.pairs])

    def rounded(self, dtype: torch.dtype) -> Stack:
        """With its factors rounded to `dtype`."""
        return Stack(tuple(pair.rounded(dtype) for pair in self.pairs), self.room)


def closed_form(site: Site, mean_gate: Tensor | None = None) -> Pair:
    """The live slots of a site.

    Args:
        mean_gate: [N] for a routed site: the weights at which its heads are fixed.

    Raises:
        MergeError: the site is routed and no gate is given, or outside the equation, so no pair exists.
    """
    if site.outside:
        raise MergeError(f"{site.structure.choice.no_closed_form}: there is no pair of matrices.")
    f = site.factors()
    a, b = _plain(f.A), _plain(f.B)
    if f.router is not None:
        if mean_gate is None:
            raise MergeError(
                "a routed update depends on the token, so it cannot be written as a pair of matrices; fix its gates first."
            )
        b = torch.einsum("onr,n->or", b.unflatten(1, (f.heads, len(a))), _plain(mean_gate))
    if f.v is not None:
        b = _plain(f.v)[:, None] * b
    b = b * (f.scale if f.gate is None else f.scale * _plain(f.gate))
    for slots in f.extra:
        down, up, gate = (_plain(t) for t in (slots.down, slots.up, slots.gate))
        at_work = (gate != 0) & down.any(1) & up.any(0)
        a, b = _beside(a, b, down[at_work], (up * gate)[:, at_work])
    return Pair(a, b)


PARALLEL = 1e-12
"""1 − |cosine| below which two rows are multiples of each other: an angle of 1.4e-6, what fp32 leaves of equal directions."""


def _beside(a: Tensor, b: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with the extra slots `down` [E, in] and `up` [out, E], each in a slot of its own unless its row is there already."""
    if not len(a) or not len(down):
        return torch.cat([a, down]), torch.cat([b, up], 1)
    near = (F.normalize(down) @ F.normalize(a).T).abs()
    closeness, where = near.max(1)
    own = closeness < 1 - PARALLEL
    b = b.clone()
    for slot in (~own).nonzero().flatten().tolist():
        row = a[where[slot]]
        b[:, where[slot]] += up[:, slot] * (down[slot] @ row) / (row @ row)
    return torch.cat([a, down[own]]), torch.cat([b, up[:, own]], 1)


def combined(pairs: Iterable[Pair]) -> Pair:
    """The sum of several updates of one site: their slots side by side."""
    each = list(pairs)
    return Pair(torch.cat([pair.a for pair in each]), torch.cat([pair.b for pair in each], 1))


def common_rank(pairs: Mapping[str, Pair | Stack], server_ranks: bool) -> int:
    """One rank with room for every site; one that servers know, if asked for.

    Raises:
        AdapterError: `server_ranks`, and a site has more slots than any server takes.
    """
    site, largest = max(((name, pair.rank) for name, pair in pairs.items()), key=lambda item: item[1])
    if not server_ranks:
        return largest
    fitting = [rank for rank in SERVER_RANKS if rank >= largest]
    if not fitting:
        raise AdapterError(
            f"{site} has rank {largest} and servers take a rank of {SERVER_RANKS[-1]} at most: export it without server_ranks, or "
            "merge it."
        )
    return fitting[0]


def _plain(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)
