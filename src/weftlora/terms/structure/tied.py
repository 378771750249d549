"""Tied: one A and B for a whole group of sites, and two vectors per site.

    ΔW_l = s · diag(v_l) B diag(u_l) A        A [r, in], B [out, r] shared; u_l [r], v_l [out] of site l

Source: Tied-LoRA, arXiv 2311.09578; s = α/r with α = r in the paper. Which of A, B, u, v are trained is a set; the others
are frozen. The start is the one rule that makes ΔW = 0 and lets gradients flow: exactly one factor is zero, and that
factor is trained (B if it is, else v, else u, else A). The sites of a group look the shared tensors up in the site that
owns them, at every forward, because hosts reassign parameters (casts, device moves, low-memory loading).

Recovered from third parties, because the paper's table could not be read: TL6 trains A, B, u and v (12.506 % of LoRA on
LLaMA-2-7B at r = 8 agrees with the headline 12.5 %), TL5 trains A and B. TL1-TL4 are not offered under those names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from weftlora.errors import ConfigError, suggest
from weftlora.kernel import Axis, Factors, Role
from weftlora.terms.events import Controller, Timeline
from weftlora.terms.structure import Draw, Place, Size, SlotFirst, Structure, StructureTerm, sides_of

Part = Literal["A", "B", "u", "v"]
Group = Literal["module_type", "shape", "fused_qkv", "experts"]

PARTS: tuple[Part, ...] = ("A", "B", "u", "v")
PRESETS: dict[str, frozenset[Part]] = {
    "tl5": frozenset({"A", "B"}),
    "tl6": frozenset({"A", "B", "u", "v"}),
    "vera": frozenset({"u", "v"}),
}


def trained_parts(train: str | Collection[str]) -> frozenset[Part]:
    """The trained subset of {A, B, u, v} that `train` means: a preset's name, letters such as "Bu" (in either case), or a
    collection of letters."""
    if isinstance(train, str) and train.lower() in PRESETS:
        return PRESETS[train.lower()]
    letters: list[Any] = list(train) if isinstance(train, (str, list, tuple, set, frozenset)) else [train]
    named = {part.lower(): part for part in PARTS}
    for letter in letters:
        if not isinstance(letter, str) or letter.lower() not in named:
            names = suggest(str(train), [*PRESETS, *PARTS]) if isinstance(train, str) else "use one of A, B, u, v."
            raise ConfigError(f"Tied(train={train!r}) names {letter!r}, which is not a part: {names}")
    if not letters:
        raise ConfigError(
            f"Tied(train={train!r}) trains nothing: name some of A, B, u, v or a preset ({', '.join(PRESETS)})."
        )
    return frozenset(named[letter.lower()] for letter in letters)


def zero_part(trained: Collection[Part]) -> Part:
    """The factor that starts at zero: the first trained of B, v, u, A."""
    return next(part for part in ("B", "v", "u", "A") if part in trained)


@dataclass(frozen=True)
class Tied(Structure):
    """One A and B shared by a group of sites, with per-site scaling vectors u and v.

    Args:
        train: which of A, B, u, v are trained: "tl6" (all), "tl5" (A, B), "vera" (u, v), letters ("Bu") or a collection.
        group: "module_type" ties sites of the same last name and shape (all q_proj); "shape" ties equal shapes;
            "fused_qkv" (paper) treats q, k, v of a layer as one module: A shared by all of them, u by the layer's
            three, B by each kind; "experts" gives the experts of one fused parameter of a layer one A, and each a B of its own, as
            HydraLoRA observes that A is what tasks have in common (ours; other modules are as with "module_type"). Rank and shape
            are part of every group.
        zero: the factor that starts at zero; None takes the rule. A frozen one would never move and is refused.
        init: the values of a random A or B: "kaiming", or "normal" (σ = 1, the first author's code).
    """

    method: ClassVar[str] = "Tied-LoRA"
    headline: ClassVar[tuple[str, ...] | None] = ("train",)
    saves: ClassVar[Mapping[str, str]] = {"A": "A [r, in]", "B": "B [out, r]", "u": "u [r]", "v": "v [out]"}
    refuses: ClassVar[Mapping[str, str]] = {
        "Reallocate": "tied modules share one A and B: a slot cannot move to another module",
        "Directions": "one shared pair cannot start at each module's own directions",
    }
    alpha_per_rank: ClassVar[float] = 1.0
    shares: ClassVar[bool] = True
    targets: Literal["all-linear", "attention inputs", "experts"] = field(
        init=False, repr=False, compare=False, default="attention inputs"
    )

    train: str | Collection[str] = "tl6"
    group: Group = "module_type"
    zero: Part | None = None
    init: Literal["kaiming", "normal"] = "kaiming"
    trained: frozenset[Part] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        trained = trained_parts(self.train)
        object.__setattr__(self, "trained", trained)
        if not isinstance(self.train, str):
            object.__setattr__(self, "train", "".join(part for part in PARTS if part in trained))
        if self.group not in (groups := ("module_type", "shape", "fused_qkv", "experts")):
            raise ConfigError(f"Tied(group={self.group!r}): {suggest(str(self.group), groups)}")
        if self.group == "experts":
            object.__setattr__(self, "targets", "experts")
        if self.init not in ("kaiming", "normal"):
            raise ConfigError(f"Tied(init={self.init!r}): {suggest(str(self.init), ['kaiming', 'normal'])}")
        if self.zero is not None and self.zero not in PARTS:
            raise ConfigError(f"Tied(zero={self.zero!r}): {suggest(str(self.zero), PARTS)}")
        if self.zero is not None and self.zero not in trained:
            raise ConfigError(
                f"Tied(train={self.train!r}, zero={self.zero!r}) is a dead start: {self.zero} would be zero and frozen, so "
                f"every gradient stays exactly zero; leave zero out ({zero_part(trained)} then starts at zero)."
            )

    @property
    def starts_at_zero(self) -> Part:
        """The one factor that is zero at step 0."""
        return self.zero or zero_part(self.trained)

    def build(self, size: Size, room: int, owners: Mapping[str, StructureTerm], draw: Draw) -> TiedTerm:
        """The parts that no other site owns yet, exactly one kind of which is zero."""
        values = {part: start_value(self, part, size, draw) for part in PARTS if part not in owners}
        return TiedTerm(self, {p: value for p, value in values.items() if value is not None}, cast(Any, dict(owners)))

    def tensors(self) -> frozenset[str]:
        """A and B; u and v where they are trained: a frozen 1 does not exist."""
        return frozenset({"A", "B"} | ({"u", "v"} & self.trained))

    def shared_keys(self, place: Place) -> dict[str, Hashable]:
        """Equal keys share.

        module_type   A, B: (last name, in, out, r)
        shape         A, B: (in, out, r)
        fused_qkv     q, k, v of one attention count as one module: A: (which of q, k, v read one input, in, r) over all layers;
                      B: (last name, in, out, r) over all layers; u: the attention it stands in, shared by its q, k, v.
                      Modules outside attention inputs fall back to module_type.
        experts       of the experts of one parameter A: (the parameter, in, r). Other modules fall back to module_type.

        Source: one fused QKV projection per layer in the paper; "shape" is the baseline of VB-LoRA.
        """
        r, fan_in, out = place.size
        parent, _, last = place.name.rpartition(".")
        if self.group == "shape":
            pair: Hashable = ("shape", fan_in, out, r)
            return {"A": pair, "B": pair}
        if self.group == "experts" and place.expert:
            return {"A": ("experts", place.name, fan_in, r)}
        kind: Hashable = ("type", last, fan_in, out, r)
        if place.reads is None or self.group != "fused_qkv":
            return {"A": kind, "B": kind}
        return {
            "A": ("fused", place.reads, fan_in, r),
            "B": kind,
            "u": ("instance", parent, place.reads, fan_in, r),
        }

    def sides(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        """Of whatever of A, B and v is the site's own."""
        return sides_of(tensors.get("A"), tensors.get("B", tensors.get("v")))

    def check(self, dropout: float) -> None:
        """Any will do."""

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """Nothing happens."""
        return []


class TiedTerm(StructureTerm):
    """The parts of one site: owned ones as parameters (trained) or buffers (frozen), the others looked up in `owner`.

    `owner[part]` is the term that holds a shared part, kept out of the module tree so that it is stored, optimised and
    saved once. A part that is 1 and frozen (u or v) does not exist.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": "down", "B": "up", "u": "gain", "v": "gain"}
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]] = {
        "A": ("slots", "in"),
        "B": ("out", "slots"),
        "u": ("slots",),
        "v": ("out",),
    }
    choice: Tied

    def __init__(self, choice: Tied, owned: dict[Part, Tensor], owner: dict[Part, TiedTerm]):
        super().__init__()
        self.choice = choice
        self.zero = choice.starts_at_zero
        for part, value in owned.items():
            if part in choice.trained:
                self.register_parameter(part, nn.Parameter(value))
            else:
                self.register_buffer(part, value)
        self._owner = {part: (term,) for part, term in owner.items()}  # a tuple: nn.Module must not register it
        self._members: dict[Part, list[TiedTerm]] = {part: [] for part in PARTS}
        for part, term in owner.items():
            term._members[part].append(self)

    def part(self, name: Part) -> Tensor | None:
        """The tensor called `name` as it is now, wherever it lives; None for a u or v that is a frozen 1."""
        term = self._owner[name][0] if name in self._owner else self
        value: Tensor | None = getattr(term, name, None)
        return value

    def factors(self, scale: float) -> Factors:
        """A, B, u and v, wherever they live."""
        A, B = self.part("A"), self.part("B")
        assert A is not None
        assert B is not None
        return Factors(A, B, scale, gate=self.part("u"), v=self.part("v"))

    def by_slot(self) -> list[tuple[nn.Parameter, SlotFirst]]:
        """Slots of a shared pair cannot move."""
        return []

    def linear(self) -> list[Tensor]:
        """v and u; not B, which would give only the sum over the sites that share it."""
        parts: tuple[Part, ...] = ("v", "u")
        return [value for part in parts if (value := self.part(part)) is not None]

    def fix(self, omega: Tensor) -> None:
        """Nothing is routed."""

    def shared(self) -> dict[str, Tensor]:
        """All parts: which of them others hold depends on the group."""
        return {name: value for name in PARTS if (value := self.part(name)) is not None}

    @property
    def trains_shared(self) -> bool:
        """Whether A or B is trained."""
        return not self.choice.trained.isdisjoint("AB")

    @property
    def is_alone(self) -> bool:
        """Whether no other site shares anything with this one."""
        return not self._owner and not any(self._members.values())

    def hand_over(self) -> None:
        """Give every owned shared part to the next member of its group; called before this site's adapter goes away."""
        for part, members in self._members.items():
            if not members:
                continue
            heir, *rest = members
            value = getattr(self, part, None)
            del heir._owner[part]
            if isinstance(value, nn.Parameter):
                heir.register_parameter(part, value)
            elif value is not None:
                heir.register_buffer(part, value)
            heir._members[part] = rest
            for member in rest:
                member._owner[part] = (heir,)
            members.clear()
        for part, (term,) in self._owner.items():
            term._members[part].remove(self)
        self._owner.clear()


def start_value(
    choice: Tied, part: Part, size: tuple[int, int, int], random: Callable[[int, int], Tensor]
) -> Tensor | None:
    """The value of one part at step 0, fp32; None for a u or v that stays a frozen 1.

    Args:
        size: (r, in, out) of the site.
        random: (rows, fan_in) → values [rows, fan_in] of a factor that does not start at zero.
    """
    r, fan_in, out = size
    shape = {"A": (r, fan_in), "B": (out, r), "u": (r,), "v": (out,)}[part]
    if part == choice.starts_at_zero:
        return torch.zeros(shape)
    if part in ("u", "v"):
        return torch.ones(shape) if part in choice.trained else None
    return torch.randn(shape) if choice.init == "normal" else random(*shape)
