"""The record of `weftlora.inspect`: plain numbers, no tensors, and the few sentences that they come to, most important first.

What could not be known is None, and `left_out` says why.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from weftlora.foreign_text import html_table
from weftlora.records import Record


@dataclass(frozen=True)
class Parameters:
    """How many numbers, a tensor that sites share counted once."""

    trained: int
    """Moved by training; of the rank slots, the live ones."""
    stored: int
    """In the adapter's own tensors, fixed ones and room for further slots included."""
    saved_modules: int
    """In modules that are trained and saved in full beside the adapter, such as a classification head."""
    base: int | None
    """Of the frozen base."""


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module."""

    site: str
    """The module's full name."""
    block: str
    """The name up to its first number; empty outside of all blocks."""
    module: str
    """The rest of the name."""
    shape: tuple[int, int]
    """(out, in)."""
    rank: int
    """Live rank slots, per head."""
    max_rank: int
    """Slots there is room for."""
    initial_rank: int
    heads: int
    scale: float | None
    """α/r; None where it is inside B, as in stock adapters."""
    trained: int
    norm: float
    """‖ΔW‖_F, everything in it: scales, masks, gates, Dash and the frozen twins of LoRA-Init."""
    norm_kind: str
    """exact; for a routed site, whose ΔW depends on the token, "mean gate" (measured) or "uniform gate"."""
    relative: float | None
    """‖ΔW‖_F / ‖W‖_F."""
    effective_rank: float
    """exp of the entropy of the shares σ²/Σσ² of ΔW: 1 for one direction, r for r equal ones; 0 where ΔW = 0."""
    mergeable: bool
    why_not: str | None


@dataclass(frozen=True)
class BlockCandidate:
    """One candidate of a search, or one adapted block where nothing was searched (then all numbers are None)."""

    name: str
    selected: bool
    alpha: float | None = None
    alpha_hat: float | None = None
    distance: float | None = None
    """α minus the threshold: the margin, with its sign."""
    near_tie: bool = False
    """One more step of the search could have turned it."""


@dataclass(frozen=True)
class Layers:
    """Which blocks (or modules) carry the adapter, and who said so."""

    source: str
    granularity: str
    candidates: list[BlockCandidate]
    margin: float | None


@dataclass(frozen=True)
class RankRound:
    """One round of moving rank slots. `taken`: (site, slot, score); `made`: (site, slot); `ranks`: live slots after it; `way`: how
    slots were scored ("taylor (auto)" where weftlora chose it), None in a run of before that was told."""

    step: int
    round: int
    taken: list[tuple[str, int, float | None]]
    made: list[tuple[str, int]]
    ranks: dict[str, int]
    way: str | None = None


@dataclass(frozen=True)
class RankHistory:
    """The rounds in order; `before` are the live slots ahead of the first."""

    source: str
    before: dict[str, int]
    rounds: list[RankRound]

    @property
    def told(self) -> str:
        """Its rounds and how they scored slots, in words."""
        ways = [way for way in dict.fromkeys(each.way for each in self.rounds) if way]
        return _count(len(self.rounds), "round") + (f", scored by {' and '.join(ways)}" if ways else "")


@dataclass(frozen=True)
class Usage:
    """What one router did over `tokens` tokens."""

    tokens: int
    mean: list[float]
    """Mean gate, [N]."""
    entropy: float
    """Mean over tokens of the entropy of ω / ln N: 1 where every token mixes all heads evenly, 0 where it takes one."""
    balance: float
    """Entropy of the mean gate / ln N: 1 where all heads are used equally over the data."""
    top1: list[float]
    """Share of tokens whose largest gate is this head's (ties: the lowest index), [N]."""


@dataclass(frozen=True)
class SiteUsage:
    """One router, over everything and per domain."""

    site: str
    whole: Usage
    domains: dict[str, Usage]
    information: float | None = None
    """Mutual information of head and domain, of ln N: 0 where every domain uses the heads alike. None where there are not two."""

    def apart(self, domain: str) -> float:
        """How differently a domain uses the heads: Σ|mean of the domain − mean of all| / 2, 0 the same and 1 other heads."""
        return sum(abs(a - b) for a, b in zip(self.domains[domain].mean, self.whole.mean, strict=True)) / 2


@dataclass(frozen=True)
class HeadPoint:
    """What one head gave for one row, on the two axes along which a site's head outputs differ most."""

    domain: str
    head: int
    x: float
    y: float


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of the heads of one site, s Bₙ A x, each a mean over the tokens of a row."""

    site: str
    between_heads: float
    """Share of their variance that is between the means of the heads."""
    between_domains: float | None
    """Share of what is left within heads that is between domains; None where there are not two."""
    chance: float | None
    """What that share is, on average, where domains are dealt to rows by chance."""
    explained: list[float]
    """Share of the variance along the two principal axes."""
    points: list[HeadPoint]
    """Of some sites only, spread evenly over the network."""


@dataclass(frozen=True)
class Routers:
    """All routers over the same rows."""

    source: str
    rows: int
    sites: list[SiteUsage]
    domains: list[str]
    outputs: list[HeadOutputs] = field(default_factory=list)


@dataclass(frozen=True)
class HeadSimilarity:
    """Cosines between the B heads of one site, flattened, [N][N]; None where a head is 0."""

    site: str
    cosine: list[list[float | None]]
    mean: float | None
    """Over the pairs of different heads."""


@dataclass(frozen=True)
class FactorSimilarity:
    """One factor beside another of the same shape."""

    angles: list[float]
    """Principal angles in degrees between the spaces the two span (rows of A, columns of B), ascending."""
    overlap: float | None
    """Mean squared cosine of these angles: 1 the same space, 0 orthogonal ones. None where one of the two is 0."""
    chance: float
    """What two random spaces of these sizes overlap on average."""
    cosine: float | None
    """Of the flattened matrices."""
    relative_change: float | None
    """‖now − then‖_F / ‖then‖_F."""


@dataclass(frozen=True)
class SiteComparison:
    """A and B of one site beside those of something else; B is None where nothing is known of it."""

    site: str
    A: FactorSimilarity | None
    B: FactorSimilarity | None
    norm_ratio: float | None = None
    """Only where the start of A is not known: ‖A‖_F over that of a fresh Kaiming draw."""


@dataclass(frozen=True)
class FactorComparison:
    """What A and B are compared with. `kind`: "stored start", "start drawn again", "adapter", or "fresh draw" (sizes only)."""

    kind: str
    what: str
    sites: list[SiteComparison]


@dataclass(frozen=True)
class Chosen:
    """A core direction that Dash launched or LoRA-Init started from; `gain` is what Dash has learned for it."""

    index: int | None
    """Of the direction in W's spectrum; None, as are σ and δ, where a file from elsewhere does not say."""
    sigma: float | None
    rate: float | None
    """Change rate δ at the moment of choice."""
    gain: float | None


@dataclass(frozen=True)
class SiteDirections:
    """Chosen directions of one site, and δ now of every core direction (σ descending) where W was decomposed."""

    site: str
    phase: str
    chosen: list[Chosen]
    sigma: list[float] | None = None
    rate: list[float] | None = None


@dataclass(frozen=True)
class TiedGroup:
    """Sites that share tensors."""

    parts: str
    """Which: "A, B", "A" or "B"."""
    sites: list[str]
    stored: int
    """Numbers in the shared tensors."""
    untied: int
    """Numbers if every site had its own."""


@dataclass(frozen=True)
class Inspection(Record):
    """Everything `weftlora.inspect` found about one adapter."""

    source: str
    adapter: str
    method: str
    trained_by: str | None
    """The recipe of the run, where there is one."""
    base: str | None
    """What the frozen base is; None where it was not at hand."""
    steps: int | None
    settings: dict[str, Any]
    parameters: Parameters
    sites: list[AdaptedModule]
    layers: Layers
    history: RankHistory | None
    routers: Routers | None
    heads: list[HeadSimilarity]
    factor_comparison: FactorComparison | None
    directions: list[SiteDirections]
    groups: list[TiedGroup]
    left_out: list[str] = field(default_factory=list)
    """What was not measured and why, a sentence each."""

    def _repr_html_(self) -> str:
        moved = sorted(self.sites, key=lambda site: -site.norm)[:SHOWN]
        rows = [
            (each.site, each.rank, f"{each.norm:.3g}", "" if each.relative is None else f"{each.relative:.2%}")
            for each in moved
        ]
        more = [f"{len(self.sites) - SHOWN} more modules are in the record"] if len(self.sites) > SHOWN else []
        return html_table(
            f"{self.method}: {self.source}", ["module", "rank", "‖ΔW‖", "of W"], rows, [*more, *self.verdict]
        )

    @property
    def verdict(self) -> list[str]:
        """What it comes to, a sentence each; see `weftlora.inspection.record`."""

        return verdict(self)


SHOWN = 8
"""Modules that a notebook shows: those that moved most."""
EVEN = 0.98
"""Normalised entropy above which a router mixes all heads as good as evenly."""
CHOICE = 0.6
"""Normalised entropy below which a token goes to one head mostly: with three heads, a largest gate of about 0.8."""
USED = 0.9
"""Entropy of the mean gate above which no head is neglected."""
SAME = 0.9
"""Cosine above which heads do the same."""
SLIGHT = 0.5
"""Cosine above which heads are more alike than not."""


def verdict(found: Inspection) -> list[str]:
    """The sentences; numbers are those of the record, rounded."""
    said = [_size(found), _movement(found), *_routers(found), *_ranks(found), *_layers(found), *_directions(found)]
    return [*said, _merging(found)]


def _size(found: Inspection) -> str:
    p, blocks = found.parameters, {site.block for site in found.sites if site.block}
    of_base = f" ({p.trained / p.base:.2%} of the base)" if p.base else ""
    shared = f", in {_count(len(found.groups), 'tied group')}" if found.groups else ""
    where = f" in {_count(len(blocks), 'block')}" if blocks else ""
    return (
        f"{p.trained:,} trainable parameters{of_base} on {_count(len(found.sites), 'adapted module')}{where}{shared}."
    )


def _movement(found: Inspection) -> str:
    moving = [site for site in found.sites if site.norm > 0]
    if not moving:
        return "ΔW is 0 in every adapted module: this adapter does nothing yet."
    still = (
        f"; {_count(len(found.sites) - len(moving), 'module')} did not move" if len(moving) < len(found.sites) else ""
    )
    relative = [site.relative for site in moving if site.relative is not None]
    if relative:
        most = max(moving, key=lambda site: site.relative or 0.0)
        return (
            f"ΔW is {statistics.median(relative):.2%} of W at the median module and {most.relative:.2%} at most, in {most.site}"
            f"{still}."
        )
    most = max(moving, key=lambda site: site.norm)
    median = statistics.median(site.norm for site in moving)
    return f"‖ΔW‖ is {median:.3g} at the median module and largest, {most.norm:.3g}, in {most.site}{still}."


def _routers(found: Inspection) -> list[str]:
    said = []
    if found.routers is not None:
        entropy = statistics.mean(site.whole.entropy for site in found.routers.sites)
        balance = statistics.mean(site.whole.balance for site in found.routers.sites)
        said.append(
            f"The routers {_routing(entropy, balance)}: entropy {entropy:.2f}, balance {balance:.2f} (1 is even)."
        )
    known = [site.mean for site in found.heads if site.mean is not None]
    if known:
        mean = statistics.mean(known)
        how = "do nearly the same" if mean > SAME else "are more alike than not" if mean > SLIGHT else "are distinct"
        said.append(f"The heads {how}: their B's have a mean cosine of {mean:.2f}.")
    elif found.heads:
        said.append("All heads are 0: nothing has been trained.")
    return said


def _routing(entropy: float, balance: float) -> str:
    """What they do; balance less entropy is how much the head depends on the token (mutual information, of ln N)."""
    if entropy > EVEN:
        return "mix all heads almost evenly for every token, so they hardly route"
    if balance - entropy < 1 - EVEN:
        return "give every token nearly the same mix of heads, so they hardly route"
    how = "choose among the heads" if entropy < CHOICE else "mix the heads in shares that depend on the token"
    return f"{how}, and {'use all of them' if balance > USED else 'prefer some of them'}"


def _ranks(found: Inspection) -> list[str]:
    if found.history is None:
        return []
    taken = sum(len(each.taken) for each in found.history.rounds)
    now = sum(site.rank for site in found.sites)
    empty = sum(site.rank == 0 for site in found.sites)
    none = f"; {_count(empty, 'module')} ended without any" if empty else ""
    return [f"{_count(taken, 'move')} of rank slots in {found.history.told}, among {now}{none}."]


def _layers(found: Inspection) -> list[str]:
    layers = found.layers
    if layers.margin is None:
        return []
    chosen = sum(candidate.selected for candidate in layers.candidates)
    near = [candidate.name for candidate in layers.candidates if candidate.near_tie]
    doubt = f"; one more step could have turned {', '.join(near)}" if near else ""
    return [
        f"{chosen} of {_count(len(layers.candidates), layers.granularity)} selected, with a margin of {layers.margin:.2g}{doubt}."
    ]


def _directions(found: Inspection) -> list[str]:
    waiting = sorted({site.phase for site in found.directions if site.phase.startswith("before")})
    if waiting:
        return [f"This adapter is still {waiting[0]}: it has chosen no directions of W so far."]
    gains = [abs(c.gain) for site in found.directions for c in site.chosen if c.gain is not None]
    return (
        [f"Dash has learned gains of {statistics.mean(gains):.2g} on average, {max(gains):.2g} at most."]
        if gains
        else []
    )


def _merging(found: Inspection) -> str:
    cannot = [site for site in found.sites if not site.mergeable]
    if not cannot:
        there = "" if found.base else " (whether this base allows it was not checked)"
        return f"Every module can be merged exactly{there}."
    which = "No module" if len(cannot) == len(found.sites) else f"Of {len(found.sites)} modules, {len(cannot)}"
    return f"{which} can{'' if which == 'No module' else 'not'} be merged: {str(cannot[0].why_not).rstrip('.')}."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
