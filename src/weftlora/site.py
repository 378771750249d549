"""A site: the equation of one adapted module, and the only file that sees every term.

    y = x Wᵀ + b + h B̃ᵀ      with h, g, ω, B̃ as in `weftlora.kernel`

    structure   Plain · Hydra · Tied     owns A, B and, where they exist, the router ω and the vectors u, v
    boost       none · Dash              extra slots along directions of W, with learned gains
    start       Kaiming · Directions     extra frozen slots, each the twin of a slot of the structure
    ranks       Uniform · Reallocate     room for more slots than are live
    mask        0/1 per slot of the structure, only where ranks are reallocated
    layer_gate  one number for all of the site's slots, while layers are searched (or kept from a search that goes on)

g is the product of what exists: α/r × mask × layer gate × u for the slots of the structure; the learned gain × layer
gate for boost slots; −(α/r) × mask × layer gate for the frozen twin slots. What the axes of a config do not need is
None: it is neither allocated nor saved, and costs nothing in the forward.

Slots whose mask is 0 are left out of the products, so that a site with r live slots computes what plain LoRA of rank r
does, bit for bit, at its cost. In a compiled graph the mask is a factor of g instead, and shapes never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftlora.errors import ConfigError
from weftlora.kernel import Factors, Role, Slots, Work, add_low_rank, delta_weight
from weftlora.known import Known
from weftlora.terms.boost.dash import Dash, DashTerm
from weftlora.terms.layers.every import All
from weftlora.terms.layers.only import Only
from weftlora.terms.layers.search import Search
from weftlora.terms.ranks.reallocate import Reallocate
from weftlora.terms.ranks.uniform import Uniform
from weftlora.terms.start.directions import Directions, DirectionsTerm
from weftlora.terms.start.kaiming import Kaiming, kaiming_uniform
from weftlora.terms.structure.hydra import Hydra, HydraTerm
from weftlora.terms.structure.plain import Plain, PlainTerm
from weftlora.terms.structure.tied import PARTS, Part, Tied, TiedTerm, start_value

Structure = Plain | Hydra | Tied
Owners = dict[Part, TiedTerm]


class ExtraSlots(Protocol):
    """A term that adds slots of its own beside the structure's."""

    def slots(self, scale: float, mask: Tensor | None, layer_gate: Tensor | None) -> Slots | None:
        """Its rows of A, columns of B̃ and gates, given the α/r, mask [r] and layer gate [] of the site; None without any."""
        ...


def _live_slots(mask: Tensor) -> slice | Tensor:
    """A slice where the live slots come first, as at the start, else their indices [k]."""
    found = mask.nonzero().flatten()
    return slice(len(found)) if found.tolist() == list(range(len(found))) else found


class Site(nn.Module):
    """One adapter on one module.

    Args:
        structure: the term that owns A and B.
        scale: α/r (α/√r with rsLoRA), fixed at the initial rank: surviving slots are not rescaled when slots move.
        dropout: probability of dropping an element of the adapter's input in training.
    """

    mask: Tensor | None
    layer_gate: Tensor | None

    def __init__(self, structure: PlainTerm | HydraTerm | TiedTerm, *, scale: float, dropout: float = 0.0):
        super().__init__()
        self.structure = structure
        self.scale = scale
        self.dropout = dropout
        self.one_mask = False  # whether linears that read one input also drop the same of its elements
        self.boost: nn.Module | None = None
        self.start: nn.Module | None = None
        self.register_buffer("mask", None)
        self.register_buffer("layer_gate", None)
        self.keep: Tensor | None = None  # [K, slots], set while slots are scored; see `Factors.keep`
        self._live = Known(_live_slots)
        self.initial_rank = 0  # r of its first day, which its scale and its share of a budget keep
        self.awaits_search = False  # with layers=Search: training is refused but to `weftlora.search_layers`
        self.recorder: Callable[[Tensor], None] | None = None  # set by `weftlora.routing` for the length of a block
        self.gate_meter: Callable[[Tensor], None] | None = None  # set by a controller for the forwards of one step
        self.rates: dict[
            str, tuple[float, float]
        ] = {}  # rate and decay that `weftlora.param_groups` last gave each tensor
        self.watch: object | None = None  # on an adapter's first site: what looks at the groups of its optimiser
        self.schedule: object | None = (
            None  # on an adapter's first site: its `weftlora.schedule.Schedule`, if it has one
        )

    def factors(self) -> Factors:
        """All terms of the site put together, as the kernel takes them."""
        f = self.structure.factors(self.scale)
        if self.layer_gate is not None:
            f = replace(f, gate=_times(self.layer_gate.expand(f.A.shape[0]), f.gate))
        if self.keep is not None:
            f = replace(f, keep=self.keep)
        if self.mask is not None:
            whole = self.mask.is_meta or torch.compiler.is_compiling()
            f = replace(f, gate=_times(self.mask, f.gate)) if whole else f.only(self._live.read(self.mask))
        extra: list[Slots] = []
        if self.boost is not None:
            boosted = cast(ExtraSlots, self.boost).slots(self.scale, self.mask, self.layer_gate)
            extra += [] if boosted is None else [boosted]
        if self.start is not None:  # a twin goes where its slot goes
            twins = cast(ExtraSlots, self.start).slots(self.scale, self.mask, self.layer_gate)
            extra += [] if twins is None else [twins._replace(keep=self.keep)]
        if extra:
            f = replace(f, extra=tuple(extra))
        return f

    def work(self, mask: Tensor | None = None) -> Work:
        """What this site asks of one forward; `mask`: bits of a dropout mask already drawn.

        Raises:
            ConfigError: a training forward that would silently leave out what the config asks for.
        """
        choice = self.structure.choice if isinstance(self.structure, HydraTerm) else None
        if choice is not None and choice.balance and self.recorder is None and self.training:
            _require_recorder(choice)
        if self.awaits_search and self.training:
            _require_search()
        per_head = choice is not None and choice.per_head_dropout
        dropout = self.dropout if self.training else 0.0
        return Work(self.factors(), dropout, per_head, self._listener(), mask if dropout else None)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The base output y [..., out] plus this site's update of x [..., in]; shape and dtype of y. `mask` as in `work`."""
        return add_low_rank(y, x, self.work(mask))

    def _listener(self) -> Callable[[Tensor], None] | None:
        """Who wants to see the router's weights in this forward; nobody in a recomputation."""
        recorder, meter = self.recorder, self.gate_meter
        if (recorder is None and meter is None) or _in_backward():
            return None
        if recorder is None or meter is None:
            return recorder or meter

        def both(omega: Tensor) -> None:
            recorder(omega)
            meter(omega)

        return both

    def roles(self) -> Iterator[tuple[str, nn.Parameter, Role]]:
        """The parameters that the site's terms own, each with its name in its term and what it does in the equation."""
        for term in (self.structure, self.boost, self.start):
            if term is not None:
                of = cast("Mapping[str, Role]", term.roles)
                for name, parameter in term.named_parameters(recurse=False):
                    yield name, parameter, of[name]

    def live(self) -> list[int]:
        """The structure's live slots, ascending."""
        slots = range(self.structure.factors(self.scale).A.shape[0])
        return list(slots) if self.mask is None else self.mask.nonzero().flatten().tolist()

    def fresh_row(self, generator: torch.Generator) -> Tensor:
        """A row of A [in], fp32 on the CPU, as a slot has it at the start."""
        return kaiming_uniform(1, self.structure.factors(self.scale).A.shape[1], device="cpu", generator=generator)[0]

    def delta_weight(self) -> Tensor:
        """ΔW [out, in] in fp32; raises `MergeError` on a routed site."""
        with torch.no_grad():
            return delta_weight(self.factors())

    @property
    def mergeable(self) -> bool:
        """Whether the update is the same for every token, so that it can be added to W."""
        return not isinstance(self.structure, HydraTerm)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, dropout={self.dropout:g}"


def build_site(
    structure: Structure,
    size: tuple[int, int, int],
    *,
    scale: float,
    dropout: float,
    owners: Owners | None = None,
    boost: Dash | None = None,
    start: Kaiming | Directions | None = None,
    ranks: Uniform | Reallocate | None = None,
    layers: All | Only | Search | None = None,
) -> Site:
    """A fresh site whose function is exactly the base's; values come from torch's global generator.

    Args:
        size: (r, in, out).
        owners: for Tied, the terms that already own a shared part of this site's groups; parts not named are owned here.
        boost: extra slots, empty until their launch.
        start: Kaiming (None too); Directions starts as Kaiming does, with twin slots that are empty until the switch.
        ranks: with Reallocate, room for more slots, which are dead (all zero) until they are made.
        layers: gives the site a layer gate, 1 at first, if the choice has one.
    """
    r, fan_in, out = size
    room = ranks.capacity(r, fan_in, out) - r if isinstance(ranks, Reallocate) else 0
    term: PlainTerm | HydraTerm | TiedTerm
    match structure:
        case Plain():
            term = PlainTerm(F.pad(kaiming_uniform(r, fan_in), (0, 0, 0, room)), out)
        case Hydra():
            router_in = fan_in if structure.router_input == "x" else r
            router = kaiming_uniform(structure.heads, router_in)
            router = router if structure.router_init == "kaiming" else torch.zeros_like(router)
            router = F.pad(router, (0, room if structure.router_input == "Ax" else 0))
            term = HydraTerm(structure, F.pad(kaiming_uniform(r, fan_in), (0, 0, 0, room)), out, router)
        case Tied():
            owners = owners or {}
            values = {part: start_value(structure, part, size, kaiming_uniform) for part in PARTS if part not in owners}
            term = TiedTerm(structure, {p: value for p, value in values.items() if value is not None}, owners)
    site = Site(term, scale=scale, dropout=dropout)
    site.initial_rank = r
    if isinstance(ranks, Reallocate):
        site.mask = F.pad(torch.ones(r), (0, room))
        site.register_buffer(
            "birth", torch.zeros(r + room, dtype=torch.long)
        )  # the round that made the slot; 0: the start
        site.register_buffer("score", torch.zeros(r + room, dtype=torch.float64))  # in the last round that scored it
    if boost is not None:
        site.boost = DashTerm(boost, fan_in, out)
    if isinstance(start, Directions):
        site.start = DirectionsTerm(start, r + room, fan_in, out)
    if isinstance(layers, Search) or (isinstance(layers, Only) and layers.gated):
        site.register_buffer("layer_gate", torch.ones((), dtype=torch.float64))
        site.awaits_search = isinstance(layers, Search)
    return site


def _times(gate: Tensor, other: Tensor | None) -> Tensor:
    return gate if other is None else other * gate.to(other)


def _in_backward() -> bool:
    """Whether autograd is running: a forward now is gradient checkpointing's recomputation, not another step."""
    return torch._C._current_graph_task_id() != -1


def _require_recorder(choice: Hydra) -> None:
    if torch.is_grad_enabled() and not _in_backward():
        raise ConfigError(
            f"Hydra(balance={choice.balance:g}) adds its load-balance term to your loss, which this loop does not do: run the "
            "forward inside `with weftlora.routing(model) as routing` and add routing.balance_loss(), use weftlora train, or set "
            "balance=0."
        )


def _require_search() -> None:
    if torch.is_grad_enabled() and not _in_backward():
        raise ConfigError(
            "layers=Search() chooses the blocks before training, which this loop does not do: call weftlora.search_layers first and "
            "train with its selection (layers=selection.layers), or use layers=All()."
        )
