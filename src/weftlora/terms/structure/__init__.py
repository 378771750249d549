"""Who owns A and B, the router ω, and the vectors u and v.

    a structure inside the equation gives its letters:    h B̃ᵀ of `weftlora.kernel` with A, B, and where it has them ω, u, v
    a structure outside of it gives a forward of its own: y += γ · update(x, drop(x)), a plain function; γ is the layer gate

`Structure` is the choice, `StructureTerm` the tensors of one site. One outside the equation (`OutsideTerm`) runs beside the
kernel, which knows nothing of it. It gives letters too, of a pair that stands in for it in figures, and its choice says in
`no_closed_form` why it leaves no stock LoRA.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import ClassVar, Literal, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from weftlora.kernel import Axis, Factors, Role
from weftlora.terms.choice import Choice

SlotFirst = Callable[[Tensor], Tensor]
"""Shows a tensor with its rank slots along the first axis (a view)."""


class Size(NamedTuple):
    """Of one site: rank, in and out features."""

    r: int
    fan_in: int
    out: int


class Place(NamedTuple):
    """Where a site stands: full name of its module, its size, and which projections beside it (its own name included) read the
    same tensor; None if it is no separate q, k or v. Of an expert `name` is that of the parameter of all of them."""

    name: str
    size: Size
    reads: tuple[str, ...] | None
    expert: bool = False


class Draw(Protocol):
    """Random rows of A, as the choice of the axis `start` draws them."""

    def __call__(
        self,
        rows: int,
        fan_in: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """[rows, fan_in] fp32."""
        ...


class Structure(Choice):
    """Who owns A and B of a site, and how they are used."""

    axis: ClassVar[str] = "structure"
    method: ClassVar[str]
    """What sentences call an adapter of this structure: "HydraLoRA"."""
    alpha_per_rank: ClassVar[float] = 2.0
    """lora_alpha over r, where the config does not say."""
    targets: Literal["all-linear", "attention inputs", "experts"] = "all-linear"
    """What is adapted where the config does not say."""
    no_closed_form: ClassVar[str | None] = None
    """Why no single ΔW exists, as a clause: merging and exact export are refused with it."""
    figures_at: ClassVar[str] = "exact"
    """What figures of ΔW are taken at where none exists: "uniform gate"."""
    routed: ClassVar[bool] = False
    """Whether its letters have a router, whose mean over data makes an approximate export."""
    shares: ClassVar[bool] = False
    """Whether sites may hold one tensor together, as `shared_keys` says."""
    outside: ClassVar[bool] = False
    """Whether it is outside the equation: its terms are `OutsideTerm`s."""
    balance: float = 0.0
    """Weight of the load-balance term that its routers ask of the loss."""
    per_head_dropout: bool = False
    """Whether every head reads x through a mask of its own."""

    @abstractmethod
    def build(self, size: Size, room: int, owners: Mapping[str, StructureTerm], draw: Draw) -> StructureTerm:
        """The tensors of a fresh site, whose update is exactly 0.

        Args:
            room: rank slots to have beside the r live ones: rows and columns of zeros, after them.
            owners: terms that already own a shared part of this site's groups; parts not named are owned here.
            draw: random rows of A.
        """

    @abstractmethod
    def tensors(self) -> frozenset[str]:
        """The names of `saves` that exist with these fields."""

    @abstractmethod
    def shared_keys(self, place: Place) -> dict[str, Hashable]:
        """A key per part that a site at this place shares: sites of equal keys have one tensor. {} where every site has its own."""

    @abstractmethod
    def sides(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        """(in, out) of a site, as far as its own saved tensors say."""

    @abstractmethod
    def check(self, dropout: float) -> None:
        """Raise `ConfigError` if the adapter's dropout leaves it without effect."""


class StructureTerm(nn.Module, ABC):
    """The tensors of one site: trained ones parameters, frozen ones buffers, named by the letters of the equation."""

    choice: Structure
    roles: ClassVar[Mapping[str, Role]] = {"A": "down", "B": "up"}
    """What each of its parameters does in the equation, by name, which is all that an optimiser is told."""
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]] = {}
    """What the axes of each of its tensors run over, by name. How it is split among processes follows: along in or out where the base
    is (`weftlora.kernel.AXES`), by its rows under a wrapper that splits every parameter so, else not at all."""
    zero: str = "B"
    """The name of the factor that is zero at step 0, which has to be trained."""

    @abstractmethod
    def factors(self, scale: float) -> Factors:
        """The letters of the equation, `scale` being α/r; outside of it, those of a pair that stands in for it in figures."""

    @abstractmethod
    def by_slot(self) -> list[tuple[nn.Parameter, SlotFirst]]:
        """The parameters that have a part per rank slot, A first, and how to see a tensor of their shape with the slots first.
        [] where slots cannot move."""

    @abstractmethod
    def linear(self) -> list[Tensor]:
        """Factors that the update is linear in, each by itself, the site's own first; [] if there is none."""

    @abstractmethod
    def fix(self, omega: Tensor) -> None:
        """Weigh the heads by ω [N] for every token from now on; where nothing is routed, nothing happens."""

    @abstractmethod
    def shared(self) -> dict[str, Tensor]:
        """By name, the tensors that other sites may hold too, as they are now."""

    @property
    @abstractmethod
    def is_alone(self) -> bool:
        """Whether no other site shares anything with this one."""

    @property
    @abstractmethod
    def trains_shared(self) -> bool:
        """Whether a tensor that is trained here is another site's too."""

    @abstractmethod
    def hand_over(self) -> None:
        """Give what other sites share to one of them; called before this site's adapter goes away."""


class Unshared(StructureTerm):
    """A structure whose sites have nothing in common: what sharing asks is answered."""

    @final
    def shared(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    @property
    @final
    def is_alone(self) -> bool:
        """Always."""
        return True

    @property
    @final
    def trains_shared(self) -> bool:
        """Never."""
        return False

    @final
    def hand_over(self) -> None:
        """There is nothing to give."""


def sides_of(a: Tensor | None, b: Tensor | None) -> tuple[int | None, int | None]:
    """(in, out) as A [slots, in] and B [out, slots] have them; None for what is not there."""
    return None if a is None else a.shape[1], None if b is None else b.shape[0]


class OutsideTerm(Unshared):
    """A structure that the equation does not have: its update is a function of its own, run beside the kernel."""

    @abstractmethod
    def update(self, x: Tensor, dropped: Tensor, scale: float) -> Tensor:
        """What is added to the base's output, [..., out] in the dtype of x; exactly 0 at the start.

        Args:
            x: what the module reads [..., in].
            dropped: the same through dropout, which is x itself outside training.
            scale: α/r.
        """
