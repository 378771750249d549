"""The record of `weftlora.inspect`: plain numbers, no tensors. What could not be known is None, and `left_out` says why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


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
class SiteFacts:
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
    room: int
    """Slots there is room for."""
    first_rank: int
    heads: int
    scale: float | None
    """α/r; None where it is inside B, as in stock adapters."""
    trained: int
    norm: float
    """‖ΔW‖_F, everything in it: scales, masks, gates, Dash and the frozen twins of LoRA-Init."""
    norm_at: str
    """exact; for a routed site, whose ΔW depends on the token, "mean gate" (measured) or "uniform gate"."""
    relative: float | None
    """‖ΔW‖_F / ‖W‖_F."""
    effective_rank: float
    """exp of the entropy of the shares σ²/Σσ² of ΔW: 1 for one direction, r for r equal ones; 0 where ΔW = 0."""
    mergeable: bool
    why_not: str | None


@dataclass(frozen=True)
class BlockChoice:
    """One candidate of a search, or one adapted block where nothing was searched (then all numbers are None)."""

    name: str
    selected: bool
    alpha: float | None = None
    alpha_hat: float | None = None
    distance: float | None = None
    """α minus the threshold: the margin, with its sign."""
    near: bool = False
    """One more step of the search could have turned it."""


@dataclass(frozen=True)
class Layers:
    """Which blocks (or modules) carry the adapter, and who said so."""

    source: str
    granularity: str
    candidates: list[BlockChoice]
    margin: float | None


@dataclass(frozen=True)
class RankRound:
    """One round of moving rank slots. `taken`: (site, slot, score); `made`: (site, slot); `ranks`: live slots after it."""

    step: int
    round: int
    taken: list[tuple[str, int, float | None]]
    made: list[tuple[str, int]]
    ranks: dict[str, int]


@dataclass(frozen=True)
class RankHistory:
    """The rounds in order; `before` are the live slots ahead of the first."""

    source: str
    before: dict[str, int]
    rounds: list[RankRound]


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

    def apart(self, domain: str) -> float:
        """How differently a domain uses the heads: Σ|mean of the domain − mean of all| / 2, 0 the same and 1 other heads."""
        return sum(abs(a - b) for a, b in zip(self.domains[domain].mean, self.whole.mean, strict=True)) / 2


@dataclass(frozen=True)
class Routers:
    """All routers over the same rows."""

    source: str
    rows: int
    sites: list[SiteUsage]
    domains: list[str]


@dataclass(frozen=True)
class HeadSimilarity:
    """Cosines between the B heads of one site, flattened, [N][N]; None where a head is 0."""

    site: str
    cosine: list[list[float | None]]
    mean: float | None
    """Over the pairs of different heads."""


@dataclass(frozen=True)
class Alike:
    """One factor beside another of the same shape."""

    angles: list[float]
    """Principal angles in degrees between the spaces the two span (rows of A, columns of B), ascending."""
    overlap: float | None
    """Mean squared cosine of these angles: 1 the same space, 0 orthogonal ones. None where one of the two is 0."""
    chance: float
    """What two random spaces of these sizes overlap on average."""
    cosine: float | None
    """Of the flattened matrices."""
    moved: float | None
    """‖now − then‖_F / ‖then‖_F."""


@dataclass(frozen=True)
class SiteAgainst:
    """A and B of one site beside those of something else; B is None where nothing is known of it."""

    site: str
    A: Alike | None
    B: Alike | None
    size: float | None = None
    """Only where the start of A is not known: ‖A‖_F over that of a fresh Kaiming draw."""


@dataclass(frozen=True)
class Against:
    """What A and B are compared with. `kind`: "stored start", "start drawn again", "adapter", or "fresh draw" (sizes only)."""

    kind: str
    what: str
    sites: list[SiteAgainst]


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
class Inspection:
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
    sites: list[SiteFacts]
    layers: Layers
    history: RankHistory | None
    routers: Routers | None
    heads: list[HeadSimilarity]
    against: Against | None
    directions: list[SiteDirections]
    groups: list[TiedGroup]
    left_out: list[str] = field(default_factory=list)
    """What was not measured and why, a sentence each."""

    def record(self) -> dict[str, Any]:
        """The inspection as plain data; `--json` prints it."""
        return dataclasses.asdict(self)

    @property
    def verdict(self) -> list[str]:
        """What it comes to, a sentence each; see `weftlora.report.verdict`."""
        from weftlora.report.verdict import verdict

        return verdict(self)
