"""The record of `weftlora.directions`: plain numbers per site, and their means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

KINDS = ("predicted", "random", "chance", "top", "bottom")


@dataclass(frozen=True)
class Hits:
    """How well a choice of s directions meets the true ones; both in [0, 1]."""

    recall: float
    """Share of the true top s/2 that was chosen."""
    accuracy: float
    """Share of the chosen that is in the true top 2s."""


@dataclass(frozen=True)
class Amplification:
    """The update on its predicted directions, without and with the Dash slots."""

    index: list[int]
    lora: list[float]
    """d_k = u_kᵀ ΔW v_k of the structure's part of ΔW, the frozen slots of LoRA-Init included."""
    dash: list[float]
    """d_k of the Dash slots: their gains."""
    total_over_lora: float | None
    """Σ|lora + dash| / Σ|lora|; None where the latter is 0."""
    norm: float
    """‖ΔW‖_F."""
    seen: float
    """‖U_Δᵀ W V_Δ‖_F: how much of W lies along the directions of ΔW."""
    factor: float | None
    """norm / seen: LoRA's amplification factor."""


@dataclass(frozen=True)
class SiteSpectrum:
    """Every core direction of one W, σ descending."""

    sigma: list[float]
    rate: list[float]
    true_rate: list[float] | None


@dataclass(frozen=True)
class SiteDirections:
    """One adapter at one site. Lists are best direction first."""

    site: str
    shape: tuple[int, int]
    """(out, in)."""
    able: int
    """Core directions above the rank floor: what could be chosen from."""
    ranked_on: str
    """The W that was decomposed: "in memory", "dequantised" or "original"."""
    index: list[int]
    """The core directions of largest change rate under the adapter's ΔW (0 is the largest σ)."""
    sigma: list[float]
    rate: list[float]
    moved: list[float]
    """u_kᵀ ΔW v_k of the same directions, with its sign."""
    launched: list[int] | None
    """The directions of the Dash slots, once they are launched; without Dash, those that LoRA-Init started A and B along."""
    hits: dict[str, Hits] | None
    """By what chose: predicted, random, top (σ), bottom (σ), and chance, the average of random; None without a truth here."""
    amplification: Amplification
    spectrum: SiteSpectrum | None
    seconds: float
    """For reading, decomposing and ranking."""

    @property
    def predicted(self) -> list[int]:
        """The directions that were launched or started from, else those of largest change rate."""
        return self.launched or self.index


@dataclass(frozen=True)
class AdapterDirections:
    """One adapter. `phase`: "plain", "before the launch" or "launched" (Dash), "before the switch" or "switched" (LoRA-Init)."""

    adapter: str
    phase: str
    sites: list[SiteDirections]

    def mean_hits(self) -> dict[str, Hits] | None:
        """Means over the sites that have hits."""
        rows = [site.hits for site in self.sites if site.hits is not None]
        if not rows:
            return None
        return {
            kind: Hits(_mean(row[kind].recall for row in rows), _mean(row[kind].accuracy for row in rows))
            for kind in KINDS
        }

    def mean_total_over_lora(self) -> float | None:
        """Mean of the ratio of the whole update to the structure's on the predicted directions."""
        return _mean_of_known(site.amplification.total_over_lora for site in self.sites)

    def mean_factor(self) -> float | None:
        """Mean of LoRA's amplification factor."""
        return _mean_of_known(site.amplification.factor for site in self.sites)


@dataclass(frozen=True)
class Overlap:
    """Predicted directions that two adapters share."""

    adapters: tuple[str, str]
    sites: int
    grid: list[list[int]]
    """grid[i][j]: at how many sites the i-th direction of the first is the j-th of the second."""
    shared: float
    """Shared directions per site."""
    chance: float
    """What two random choices share on average."""


@dataclass(frozen=True)
class DirectionsReport:
    """What `weftlora.directions` found."""

    directions: int
    seed: int
    against: str | None
    adapters: list[AdapterDirections]
    overlaps: list[Overlap]

    def record(self) -> dict[str, Any]:
        """The report as plain data, means included; `--json` and `--out` write it."""
        out = dataclasses.asdict(self)
        for row, adapter in zip(out["adapters"], self.adapters, strict=True):
            hits = adapter.mean_hits()
            row["mean"] = {
                "hits": None if hits is None else {kind: dataclasses.asdict(each) for kind, each in hits.items()},
                "total_over_lora": adapter.mean_total_over_lora(),
                "factor": adapter.mean_factor(),
            }
        return out


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None
