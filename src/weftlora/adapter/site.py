"""A site: the equation of one adapted module, one choice of every axis put together.

    y = x Wᵀ + b + h B̃ᵀ      with h, g, ω, B̃ as in `weftlora.kernel`

    structure   owns A, B and, where they exist, the router ω and the vectors u, v
    boost       extra slots along directions of W, with learned gains
    start       extra frozen slots, each the twin of a slot of the structure
    ranks       room for more slots than are live: 0/1 per slot of the structure, `mask`
    layers      one number for all of the site's slots, `layer_gate`, while layers are searched (or kept from a search that goes on)

g is the product of what exists: α/r × mask × layer gate × u for the slots of the structure; the learned gain × layer
gate for boost slots; −(α/r) × mask × layer gate for the frozen twin slots. What the axes of a config do not need is
None: it is neither allocated nor saved, and costs nothing in the forward.

Slots whose mask is 0 are left out of the products, so that a site with r live slots computes what plain LoRA of rank r
does, bit for bit, at its cost. In a compiled graph the mask is a factor of g instead, and shapes never change.

A structure outside of the equation is a plain function of x, which is added beside the kernel:

    y = x Wᵀ + b + γ · update(x, drop(x))        γ the layer gate

A batch of sites is a site, too: that of E experts, whose W are one parameter [E, out, in]. Its tensors have an axis of experts
before their own, but for what all experts share (A of a tied group, the layer gate, whether a launch has happened), and so have its
letters, which `weftlora.kernel.add_grouped` multiplies with the tokens of each expert. Terms know nothing of it: every expert's site
is built as any other, then they are stacked. `expert(e)` is that site again, of views, for whatever asks about one matrix: its ΔW,
its directions, its live slots.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weftlora.adapter.buffers import Remembered
from weftlora.adapter.shards import gathered
from weftlora.errors import ConfigError, MergeError
from weftlora.kernel import Factors, Role, Slots, Work, add_low_rank, delta_weight, used
from weftlora.kernel.dropout import dropped
from weftlora.terms.boost import Boost, BoostTerm
from weftlora.terms.layers import Layers
from weftlora.terms.ranks import Ranks
from weftlora.terms.start import Start, StartTerm, kaiming_uniform
from weftlora.terms.structure import Draw, OutsideTerm, Size, SlotFirst, Structure, StructureTerm

Owners = Mapping[str, StructureTerm]


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
    birth: Tensor | None
    score: Tensor | None

    def __init__(self, structure: StructureTerm, *, scale: float, dropout: float = 0.0):
        super().__init__()
        self.structure = structure
        self.scale = scale
        self.strength = 1.0  # what the whole update is multiplied by, for as long as somebody asks for it
        self.dropout = dropout
        self.outside = structure.choice.outside
        self.balance = structure.choice.balance
        self.per_head_dropout = structure.choice.per_head_dropout
        self.one_mask = False  # whether linears that read one input also drop the same of its elements
        self.boost: BoostTerm | None = None
        self.pair = "train"  # what becomes of A and B once the boost has happened: see `Boost.pair`
        self.start: StartTerm | None = None
        self.draw: Draw = kaiming_uniform
        for name in ("mask", "layer_gate", "birth", "score"):
            self.register_buffer(name, None)
        self.scales: list[float] = []  # of every site of a batch, where they differ; `scale` is then 1
        self.experts = 0  # how many sites a batch is of; 0 for one that is none
        self.per_expert: frozenset[str] = frozenset()  # the names of the tensors with an axis of experts
        self.part_of: ExpertOf | None = None  # of the views of one expert: the batch
        self.counters: set[str] = set()  # buffers of the adapter as a whole, which its first site carries
        self._keep: Tensor | None = None
        self._keeps: dict[int, Tensor] = {}  # the same of single experts of a batch
        self._live = Remembered(_live_slots)
        self.ranks_of: list[int] = []  # the initial rank of every expert of a batch
        self.initial_rank = 0  # r of its first day, which its scale and its share of a budget keep
        self.size = Size(0, 0, 0)
        self.slot_parameters = 0  # trainable parameters of one slot, 0 where slots cannot move
        self.awaits_search = False  # training is refused but to what comes before it
        self.untrained = ""  # the sentence that refuses it
        self.recorder: Callable[[Tensor], None] | None = None  # set by `weftlora.routing` for the length of a block
        self.gate_meter: Callable[[Tensor], None] | None = None  # set by a controller for the forwards of one step
        self.expert_meters: dict[int, Callable[[Tensor], None]] = {}  # the same of single experts of a batch
        self.rates: dict[
            str, tuple[float, float]
        ] = {}  # rate and decay that `weftlora.param_groups` last gave each tensor
        self.watch: object | None = None  # on an adapter's first site: what looks at the groups of its optimiser
        self.schedule: object | None = (
            None  # on an adapter's first site: its `weftlora.schedule.schedule.Schedule`, if it has one
        )

    def factors(self) -> Factors:
        """All terms of the site put together, as the kernel takes them."""
        f = gathered(self.structure.factors(self.scale))
        if self._rests:
            f = _detached(f if self.pair == "freeze" else f.only(slice(0)))
        if self.layer_gate is not None:
            f = replace(f, gate=_times(self.layer_gate.expand(f.A.shape[-2]), f.gate))
        if self.scales:
            wide = torch.promote_types(f.A.dtype, torch.float32)
            each = torch.tensor(self.scales, dtype=wide, device=f.A.device)[:, None]
            f = replace(f, gate=_times(each.expand(-1, f.A.shape[-2]), f.gate))
        if self.keep is not None:
            f = replace(f, keep=self.keep)
        if self.mask is not None:
            whole = self.experts > 0 or self.mask.is_meta or torch.compiler.is_compiling()
            f = replace(f, gate=_times(self.mask, f.gate)) if whole else f.only(self._live.read(self.mask))
        extra: list[Slots] = []
        if self.boost is not None:
            extra.append(self.boost.slots(self.scale, self.mask, self.layer_gate))
        if self.start is not None:  # a twin goes where its slot goes
            twins = self.start.slots(self.scale, self.mask, self.layer_gate)
            extra += [] if twins is None else [twins._replace(keep=self.keep)]
        if extra:
            f = replace(f, extra=tuple(extra))
        return f if self.strength == 1.0 else _times_all(f, self.strength)

    @property
    def _rests(self) -> bool:
        """Whether A and B have ended with the launch of the boost; not while that is still to be read from a file."""
        if self.pair == "train" or self.boost is None:
            return False
        return not any(buffer.is_meta for buffer in self.boost.buffers()) and self.boost.happened

    def work(self, mask: Tensor | None = None) -> Work:
        """What this site asks of one forward; `mask`: bits of a dropout mask already drawn.

        Raises:
            ConfigError: a training forward that would silently leave out what the config asks for.
        """
        self._check_training()
        dropout = self.dropout if self.training else 0.0
        return Work(self.factors(), dropout, self.per_head_dropout, self._listener(), mask if dropout else None)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        add: Callable[[Tensor, Tensor, Work], Tensor] | None = None,
    ) -> Tensor:
        """The base output y [..., out] plus this site's update of x [..., in]; shape and dtype of y. `mask` as in `work`.

        `add` adds it where x is not what the matrices are multiplied with: tokens, or an image (`weftlora.adapted.reading`).
        """
        if add is not None:
            return add(x, y, self.work(mask))
        return self._beside(x, y, mask) if self.outside else add_low_rank(y, x, self.work(mask))

    def _beside(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """y + γ · update, of a structure that the kernel does not have."""
        self._check_training()
        term = cast(OutsideTerm, self.structure)
        if not torch.compiler.is_compiling():
            _say_once(term.choice.title)
        p = self.dropout if self.training else 0.0
        update = term.update(x, dropped(x, p, mask) if p else x, self.scale)
        if self.layer_gate is not None:
            update = update * self.layer_gate.to(update)
        return y + (update if self.strength == 1.0 else update * self.strength).to(y.dtype)

    def _check_training(self) -> None:
        """Refuse a training forward that would silently leave out what the config asks for."""
        if not self.training:
            return
        if self.balance and self.recorder is None and torch.is_grad_enabled() and not _in_backward():
            raise ConfigError(
                f"{self.structure.choice.title}(balance={self.balance:g}) adds its load-balance term to your loss, which this loop "
                "does not do: run the forward inside `with weftlora.routing(model) as routing` and add routing.balance_loss(), use "
                "weftlora train, or set balance=0."
            )
        if self.awaits_search and torch.is_grad_enabled() and not _in_backward():
            raise ConfigError(self.untrained)

    def hear_expert(self, e: int, meter: Callable[[Tensor], None] | None) -> None:
        """Let `meter` hear the weights that the heads of one expert of a batch are used with; None ends that."""
        self.expert_meters = {number: held for number, held in self.expert_meters.items() if number != e}
        if meter is not None:
            self.expert_meters[e] = meter

    def heard(self, omega: Tensor, tokens: Sequence[slice]) -> None:
        """Tell those who listen to single experts of a batch: ω [S, N], of each expert at its tokens."""
        if self.expert_meters and not _in_backward():
            weights = self.used(omega)
            for e, meter in self.expert_meters.items():
                meter(weights[tokens[e]])

    def _listener(self) -> Callable[[Tensor], None] | None:
        """Who wants to see the router in this forward, nobody in a recomputation: the recorder all weights, the meter those used."""
        recorder, meter = self.recorder, self.gate_meter
        if (recorder is None and meter is None) or _in_backward():
            return None

        def tell(omega: Tensor) -> None:
            if recorder is not None:
                recorder(omega)
            if meter is not None:
                meter(self.used(omega))

        return tell

    def used(self, omega: Tensor) -> Tensor:
        """Of a router's weights [..., N] those that its heads are mixed with."""
        return used(omega, self.structure.factors(self.scale).top)

    def roles(self) -> Iterator[tuple[str, nn.Parameter, Role | None]]:
        """The parameters that the site's terms own, each with its name in its term and what it does in the equation, if its term
        says so."""
        for term in (self.structure, self.boost, self.start):
            if term is not None:
                for name, parameter in term.named_parameters(recurse=False):
                    yield name, parameter, term.roles.get(name)

    def live(self) -> list[int]:
        """The structure's live slots, ascending."""
        if self.pair == "drop" and self._rests:
            return []
        slots = range(self.structure.factors(self.scale).A.shape[0])
        return list(slots) if self.mask is None else self.mask.nonzero().flatten().tolist()

    def fresh_row(self, generator: torch.Generator) -> Tensor:
        """A row of A [in], fp32 on the CPU, as a slot has it at the start."""
        return self.draw(1, self.size.fan_in, device="cpu", generator=generator)[0]

    @torch.no_grad()
    def fill_zero_factor(self) -> None:
        """Draw the factor that starts at zero like the others, where it is this site's own and not on meta; dead slots stay zero."""
        for e in range(self.experts):
            self.expert(e).fill_zero_factor()
        if self.experts:
            return
        value = getattr(self.structure, self.structure.zero, None)
        if not isinstance(value, Tensor) or value.is_meta:
            return
        drawn = kaiming_uniform(*value.shape) if value.dim() == 2 else torch.empty_like(value).uniform_(-1, 1)
        value.copy_(drawn)
        for parameter, by_slot in self.structure.by_slot():
            if parameter is value and self.mask is not None:
                by_slot(value)[self.mask == 0] = 0

    @property
    def keep(self) -> Tensor | None:
        """[K, slots], set while slots are scored, of a batch [E, K, slots]; see `Factors.keep`."""
        if not self._keeps:
            return self._keep
        one = next(iter(self._keeps.values()))
        return torch.stack([self._keeps.get(e, torch.ones_like(one)) for e in range(self.experts)])

    @keep.setter
    def keep(self, value: Tensor | None) -> None:
        if self.part_of is None:
            self._keep, self._keeps = value, {}
            return
        batch, e = self.part_of
        batch._keeps = {number: held for number, held in batch._keeps.items() if number != e}
        if value is not None:
            batch._keeps[e] = value

    @property
    def listeners(self) -> tuple[object, ...]:
        """All that only watches this site or scales its slots for a while, to be put back by `listen_again`."""
        return self.recorder, self.gate_meter, self.expert_meters, self._keep, self._keeps

    def unheard(self) -> None:
        """Let nobody listen to the router."""
        self.recorder, self.gate_meter, self.expert_meters = None, None, {}

    def listen_again(self, before: tuple[object, ...]) -> None:
        """As it was when `listeners` was asked."""
        self.recorder, self.gate_meter, self.expert_meters, self._keep, self._keeps = before  # type: ignore[assignment]

    # ------------------------------------------------------------------ a batch of sites

    def expert(self, e: int) -> Site:
        """The site of expert `e`: a view, which is made anew whenever somebody asks, because hosts replace tensors.

        What is written into its tensors is written into the batch's; what is set on it is forgotten with it.
        """
        view = cast(Site, self._view(self, "", e))
        view.experts, view.per_expert, view.part_of = 0, frozenset(), ExpertOf(self, e)
        if self.scales:
            view.scale, view.scales = self.scales[e], []
        view.initial_rank = self.ranks_of[e]
        view._keep, view._keeps = self._keeps.get(e), {}
        view._live = Remembered(_live_slots)
        return view

    def _view(self, module: nn.Module, prefix: str, e: int) -> nn.Module:
        view = copy.copy(module)
        view.__dict__ = dict(module.__dict__)
        for kind in ("_parameters", "_buffers"):
            held: dict[str, Tensor | None] = getattr(module, kind)
            view.__dict__[kind] = {
                name: value[e] if value is not None and prefix + name in self.per_expert else value
                for name, value in held.items()
            }
        view._modules = {
            name: None if child is None else self._view(child, f"{prefix}{name}.", e)
            for name, child in module._modules.items()
        }
        return view

    def by_slot(self) -> list[tuple[nn.Parameter, SlotFirst]]:
        """The parameters that have a part per rank slot, A first, and how to see a tensor of their shape with the slots of this site
        first (a view). Of one expert the parameters are the batch's."""
        found = self.structure.by_slot()
        if self.part_of is None:
            return found
        e = self.part_of.number

        def own(see: SlotFirst) -> SlotFirst:
            return lambda t: see(t[e])

        return [(held_by(parameter), own(see)) for parameter, see in found]

    def register_counter(self, name: str, value: Tensor) -> None:
        """Keep a buffer of the adapter as a whole on this site, its first: it is saved and loaded with it."""
        self.register_buffer(name, value)
        self.counters.add(name)

    def delta_weight(self) -> Tensor:
        """ΔW [out, in] in fp32, of a batch [E, out, in]; raises `MergeError` where there is none."""
        if self.experts:
            return torch.stack([self.expert(e).delta_weight() for e in range(self.experts)])
        if self.outside:
            raise MergeError(f"{self.structure.choice.no_closed_form}; keep the adapter unmerged.")
        with torch.no_grad():
            return delta_weight(self.factors())

    @property
    def mergeable(self) -> bool:
        """Whether the update is the same for every token, so that it can be added to W."""
        return self.structure.choice.no_closed_form is None

    @property
    def routed(self) -> bool:
        """Whether a router mixes heads, whose weights can be listened to."""
        return self.structure.choice.routed

    @property
    def phase(self) -> str:
        """Where what starts along directions is in time; "plain" where nothing does."""
        extra = self.boost or self.start
        return "plain" if extra is None else extra.phase

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, dropout={self.dropout:g}"


class ExpertOf(NamedTuple):
    """Of which batch a site is a view, and of which of its experts."""

    batch: Site
    number: int


T = TypeVar("T", bound=Tensor)


def held_by(t: T) -> T:
    """The parameter that a tensor of an expert's site is a view of; itself, where it is none."""
    return t if isinstance(t, nn.Parameter) or t._base is None else cast(T, t._base)


def build_site(
    structure: Structure,
    size: tuple[int, int, int],
    *,
    scale: float,
    dropout: float,
    owners: Owners | None = None,
    boost: Boost | None = None,
    start: Start | None = None,
    ranks: Ranks | None = None,
    layers: Layers | None = None,
    slots: int | None = None,
) -> Site:
    """A fresh site whose function is exactly the base's; values come from torch's global generator.

    Args:
        size: (r, in, out).
        owners: the terms that already own a shared part of this site's groups; parts not named are owned here.
        boost: extra slots, empty until their launch.
        start: what draws A, and what it keeps for later (None is Kaiming).
        ranks: may make room for more slots, which are dead (all zero) until they are made.
        layers: gives the site a layer gate, 1 at first, if the choice has one.
        slots: how many slots to have, those without a use dead; None leaves it to `ranks`.
    """
    r, fan_in, out = size
    room = slots - r if slots is not None else 0 if ranks is None else ranks.capacity(r, fan_in, out) - r
    draw = kaiming_uniform if start is None else start.draw
    site = Site(structure.build(Size(r, fan_in, out), room, owners or {}, draw), scale=scale, dropout=dropout)
    site.initial_rank = r
    site.size = Size(r, fan_in, out)
    by_slot = site.structure.by_slot()
    site.slot_parameters = sum(view(p).numel() for p, view in by_slot) // (r + room) if by_slot else 0
    site.draw = draw
    for name, value in ({} if ranks is None else ranks.state(r, room)).items():
        site.register_buffer(name, value)
    if room and site.mask is None:
        site.mask = F.pad(torch.ones(r), (0, room))
    if boost is not None:
        site.boost, site.pair = boost.build(fan_in, out), boost.pair
    if start is not None:
        site.start = start.build(r + room, fan_in, out)
    if layers is not None and layers.gated:
        site.register_buffer("layer_gate", torch.ones((), dtype=torch.float64))
    if layers is not None and layers.untrained is not None:
        site.awaits_search, site.untrained = True, layers.untrained
    return site


def build_batch(
    structure: Structure,
    ranks_of: Sequence[int],
    sides: tuple[int, int],
    *,
    scales: Sequence[float],
    dropout: float,
    owners: Owners | None = None,
    shares: Sequence[str] = (),
    boost: Boost | None = None,
    start: Start | None = None,
    ranks: Ranks | None = None,
    layers: Layers | None = None,
) -> Site:
    """A fresh batch of sites, one per entry of `ranks_of`, as `build_site` makes each.

    Args:
        ranks_of: of every expert. Where they differ all have room for the largest, and a mask says which slots are live.
        sides: (in, out) of every expert.
        scales: of every expert.
        owners: as in `build_site`, of parts that experts of other batches own already.
        shares: the parts that the experts of this batch share with each other, which the first owns.
    """
    fan_in, out = sides
    slots = max(r if ranks is None else ranks.capacity(r, fan_in, out, experts=True) for r in ranks_of)
    uneven = len(set(ranks_of)) > 1
    kept = dict(owners or {})
    sites: list[Site] = []
    for r, scale in zip(ranks_of, scales, strict=True):
        site = build_site(
            structure,
            (r, fan_in, out),
            scale=scale,
            dropout=dropout,
            owners=kept,
            boost=boost,
            start=start,
            ranks=ranks,
            layers=layers,
            slots=slots,
        )
        if uneven and site.mask is None:
            site.mask = torch.ones(slots)
        for part in shares:
            kept.setdefault(part, site.structure)
        sites.append(site)
    return _stacked(sites, ranks_of, scales)


def _stacked(sites: Sequence[Site], ranks_of: Sequence[int], scales: Sequence[float]) -> Site:
    """The first of these sites, its tensors become those of all: what each has of its own stands in a row, the rest is common."""
    batch, *others = sites
    for site in others:
        site.structure.hand_over()  # they are gone with this function
    tensors = [{**dict(site.named_parameters()), **dict(site.named_buffers())} for site in sites]
    own = frozenset(
        name for name, value in tensors[0].items() if value.dim() and all(name in each for each in tensors[1:])
    )
    for path, module in batch.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in list(module.named_parameters(recurse=False)):
            if prefix + name in own:
                rows = torch.stack([each[prefix + name].detach() for each in tensors])
                setattr(module, name, nn.Parameter(rows, requires_grad=value.requires_grad))
        for name, _ in list(module.named_buffers(recurse=False)):
            if prefix + name in own:
                setattr(module, name, torch.stack([each[prefix + name] for each in tensors]))
    batch.experts, batch.per_expert, batch.ranks_of = len(sites), own, list(ranks_of)
    batch.initial_rank = max(ranks_of)
    if len(set(scales)) > 1:
        batch.scale, batch.scales = 1.0, list(scales)
    return batch


@functools.cache
def _say_once(title: str) -> None:
    warnings.warn(
        f"{title} is outside the equation of weftlora's kernel: its modules run on its own forward, beside the base's.",
        stacklevel=4,
    )


def _detached(f: Factors) -> Factors:
    """The same without a gradient for what the structure has."""
    parts = {name: getattr(f, name) for name in ("A", "B", "gate", "v", "router")}
    return replace(f, **{name: part.detach() for name, part in parts.items() if part is not None})


def _times_all(f: Factors, strength: float) -> Factors:
    """The same with the whole update multiplied."""
    extra = tuple(slots._replace(gate=slots.gate * strength) for slots in f.extra)
    return replace(f, scale=f.scale * strength, extra=extra)


def _times(gate: Tensor, other: Tensor | None) -> Tensor:
    return gate if other is None else other * gate.to(other)


def _in_backward() -> bool:
    """Whether autograd is running: a forward now is gradient checkpointing's recomputation, not another step.

    Never in a compiled graph, which holds its recomputation in itself and could not ask.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
