"""Plain: one A and one B per site.

    ΔW = (α/r) B A          A [r, in], B [out, r]

Source: LoRA, arXiv 2106.09685, equation 3.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weftlora.kernel import Axis, Factors, Role
from weftlora.terms.events import Controller, Timeline
from weftlora.terms.structure import Draw, Place, Size, SlotFirst, Structure, StructureTerm, Unshared, sides_of


@dataclass(frozen=True)
class Plain(Structure):
    """One pair of factors per site: stock LoRA's function."""

    method: ClassVar[str] = "plain LoRA"
    saves: ClassVar[Mapping[str, str]] = {"A": "A [r, in]", "B": "B [out, r]"}

    def build(self, size: Size, room: int, owners: Mapping[str, StructureTerm], draw: Draw) -> PlainTerm:
        """A drawn, B zero."""
        return PlainTerm(F.pad(draw(size.r, size.fan_in), (0, 0, 0, room)), size.out)

    def tensors(self) -> frozenset[str]:
        """A and B."""
        return frozenset(self.saves)

    def shared_keys(self, place: Place) -> dict[str, Hashable]:
        """Nothing is shared."""
        return {}

    def sides(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        """Of A and B."""
        return sides_of(tensors.get("A"), tensors.get("B"))

    def check(self, dropout: float) -> None:
        """Any will do."""

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """Nothing happens."""
        return []


class PlainTerm(Unshared):
    """Owns A [r, in] and B [out, r] of one site."""

    roles: ClassVar[Mapping[str, Role]] = {"A": "down", "B": "up"}
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]] = {"A": ("slots", "in"), "B": ("out", "slots")}
    choice = Plain()

    def __init__(self, a: torch.Tensor, out_features: int):
        super().__init__()
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(a.new_zeros(out_features, a.shape[0]))

    def factors(self, scale: float) -> Factors:
        """A and B."""
        return Factors(self.A, self.B, scale)

    def by_slot(self) -> list[tuple[nn.Parameter, SlotFirst]]:
        """Rows of A, columns of B."""
        slots = self.A.shape[0]
        return [(self.A, lambda t: t), (self.B, lambda t: t.unflatten(1, (-1, slots)).movedim(2, 0))]

    def linear(self) -> list[Tensor]:
        """B."""
        return [self.B]

    def fix(self, omega: Tensor) -> None:
        """Nothing is routed."""
