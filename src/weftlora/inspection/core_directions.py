"""What adapters do along the core directions of W, site by site: measured here into the record of `weftlora.directions`.

    δ_k = |u_kᵀ ΔW v_k| / (σ_k + ε)                change rate (`weftlora.change_rates`)
    predicted                                       those launched or started along, else the s of largest δ under the adapter's ΔW
    true                                            the same ranking under a later adapter's or a full fine-tune's ΔW
    recall     share of the true top s/2 that is among the s predicted
    accuracy   share of the s predicted that is among the true top 2s

With the papers' s = 8 these are "top 4 in 8" and "8 in top 16" (LoRA-Dash, arXiv 2409.01035). Beside the prediction stand
controls of the same size: drawn at random, largest σ, smallest σ; and what drawing at random gives on average.

Amplification, on the predicted directions: d_k of the structure's part of ΔW, that of the Dash slots, and the ratio of the
whole to the former; and LoRA's own ‖ΔW‖_F / ‖U_Δᵀ W V_Δ‖_F (arXiv 2106.09685, section 7.3), over all directions of ΔW.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from weftlora import change_rates
from weftlora.adapted.updates import Update
from weftlora.errors import AdapterError, ConfigError
from weftlora.foreign_text import html_table
from weftlora.records import Record
from weftlora.settings import is_whole

KINDS = ("predicted", "random", "chance", "top", "bottom")


SHOWN = 14
"""Rows that a notebook shows."""


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
class DirectionsReport(Record):
    """What `weftlora.directions` found."""

    directions: int
    seed: int
    against: str | None
    adapters: list[AdapterDirections]
    overlaps: list[Overlap]

    def _repr_html_(self) -> str:
        rows = [
            (
                each.adapter,
                each.phase,
                site.site,
                site.predicted[: self.directions],
                f"{site.rate[0]:.3g}" if site.rate else "",
            )
            for each in self.adapters
            for site in each.sites
        ]
        columns = ["adapter", "phase", "module", "directions, best first", "largest change rate"]
        more = [f"{len(rows) - SHOWN} more rows are in the record"] if len(rows) > SHOWN else []
        return html_table(f"{self.directions} directions per module", columns, rows[:SHOWN], more)

    def record(self) -> dict[str, Any]:
        """The report as plain data, means included; `--json` and `--out` write it."""
        out = super().record()
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


Updates = Mapping[str, Update]
TrueUpdate = Callable[[str], Update | Tensor]  # a site's true update, in factors or dense [out, in]
Tick = Callable[[int, int], None]

STRANGE = 0.02
"""‖W v̄ − σ ū‖ of a launched direction, in units of the root mean square of σ, above which it is of another W."""


@dataclass(frozen=True)
class Question:
    """What to measure: s directions, and how ties, chance and small σ are treated."""

    directions: int = 8
    full: bool = False
    seed: int = 0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not is_whole(self.directions, 1):
            raise ConfigError(
                f"directions={self.directions!r} is not a number of directions: use a whole number from 1 up."
            )


@dataclass(frozen=True)
class Weight:
    """One frozen W [out, in] with its decomposition, for as long as its site is looked at."""

    w: Tensor
    source: str
    spectrum: change_rates.Spectrum
    able: list[int]

    def rates(self, update: Update | Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(d, δ) of every core direction, [k]."""
        if isinstance(update, Tensor):
            moved = change_rates.moved_by(self.spectrum, self.w, update.to(self.w.device))
        else:
            moved = change_rates.moved(self.spectrum, self.w, *update.factors())
        return moved, change_rates.change_rate(self.spectrum, moved, eps)

    def ranked(self, rate: Tensor) -> list[int]:
        """The core directions that moved, largest δ first, ties by index."""
        values = rate.tolist()
        return sorted((k for k in self.able if values[k] > 0), key=lambda k: (-values[k], k))


def measure(
    sites: Mapping[str, Callable[[], tuple[Tensor, str]]],
    adapters: Mapping[str, Updates],
    question: Question,
    decompose: Callable[[str, Tensor], change_rates.Spectrum],
    truth: TrueUpdate | None = None,
    against: str | None = None,
    tick: Tick = lambda done, total: None,
) -> DirectionsReport:
    """The report over all sites of the adapters; one W is read, decomposed and freed at a time.

    Args:
        sites: how to read W [out, in] of a site and its source ("in memory", "dequantised" or "original"), by name.
        adapters: the updates of every site of every adapter, by label.
        truth: the true update of a site, called with its name.
        against: what `truth` is, for the record.

    Raises:
        AdapterError: an update that does not fit its W, or directions that were launched on another W.
    """
    found: dict[str, list[SiteDirections]] = {label: [] for label in adapters}
    names = [name for name in sites if any(name in updates for updates in adapters.values())]
    for done, name in enumerate(names, 1):
        started = time.perf_counter()
        w, source = sites[name]()
        spectrum = decompose(name, w)
        lowest = change_rates.floor(spectrum.sigma, (w.shape[0], w.shape[1]))
        weight = Weight(w, source, spectrum, [k for k, s in enumerate(spectrum.sigma.tolist()) if s > lowest])
        true = None if truth is None else _true_rate(name, weight, truth(name), question)
        for label, updates in adapters.items():
            if name in updates:
                _check_fits(label, name, weight, updates[name])
                looked = _look(name, weight, updates[name], true, question, time.perf_counter() - started)
                found[label].append(looked)
        tick(done, len(names))
    parts = [AdapterDirections(label, _phase(adapters[label]), rows) for label, rows in found.items()]
    overlaps = [_overlap(one, other, question.directions) for one, other in combinations(parts, 2)]
    return DirectionsReport(question.directions, question.seed, against, parts, overlaps)


def _look(
    name: str, weight: Weight, update: Update, true: Tensor | None, question: Question, seconds: float
) -> SiteDirections:
    moved, rate = weight.rates(update, question.eps)
    ranked, sigma = weight.ranked(rate), weight.spectrum.sigma.tolist()
    predicted = list(update.index) or ranked[: question.directions]
    rates, shown = rate.tolist(), ranked[: question.directions]
    hits = None
    if true is not None and (order := weight.ranked(true)):
        hits = dict(_all_hits(predicted, order, weight.able, question, name))
    spectrum = SiteSpectrum(sigma, rates, None if true is None else true.tolist()) if question.full else None
    return SiteDirections(
        site=name,
        shape=(weight.w.shape[0], weight.w.shape[1]),
        able=len(weight.able),
        ranked_on=weight.source,
        index=shown,
        sigma=[sigma[k] for k in shown],
        rate=[rates[k] for k in shown],
        moved=[float(moved[k]) for k in shown],
        launched=list(update.index) or None,
        hits=hits,
        amplification=_amplification(weight, update, predicted),
        spectrum=spectrum,
        seconds=seconds,
    )


def _all_hits(
    predicted: list[int], order: list[int], able: list[int], question: Question, name: str
) -> Iterator[tuple[str, Hits]]:
    """Hits of the prediction and of every control of its size, by name."""
    s = len(predicted)
    few, many = set(order[: (question.directions + 1) // 2]), set(order[: 2 * question.directions])
    drawn = random.Random(f"{question.seed}/{name}").sample(able, min(s, len(able)))
    for kind, chosen in (
        ("predicted", predicted),
        ("random", drawn),
        ("top", able[:s]),
        ("bottom", able[len(able) - s :]),
    ):
        yield kind, Hits(len(few & set(chosen)) / len(few), len(many & set(chosen)) / s if s else 0.0)
    yield "chance", Hits(min(s, len(able)) / len(able), len(many) / len(able))


def _true_rate(name: str, weight: Weight, update: Update | Tensor, question: Question) -> Tensor:
    shape = update.shape if isinstance(update, Update) else tuple(update.shape)
    if shape != tuple(weight.w.shape):
        raise AdapterError(
            f"{name} is {list(weight.w.shape)} in the base, but its update to compare with is {list(shape)}: give a fine-tune "
            "of the same base."
        )
    return weight.rates(update, question.eps)[1]


def _check_fits(label: str, name: str, weight: Weight, update: Update) -> None:
    if update.shape != tuple(weight.w.shape):
        raise AdapterError(
            f"{name} is {list(weight.w.shape)} in the base, but {list(update.shape)} in the adapter {label}: give the base it "
            "was trained on."
        )
    if update.up is None or update.down is None or update.sigma is None or not update.index:
        return
    w, up, down, sigma = (t.to(weight.spectrum.side) for t in (weight.w, update.up, update.down, update.sigma))
    size = weight.spectrum.sigma.square().mean().sqrt()
    off = (w @ down.T - up * sigma).norm(dim=0).max() / size
    if not off <= STRANGE:
        raise AdapterError(
            f"the adapter {label} has directions for {name} that are not those of this weight (off by {off:.0%}): give the base "
            "it was trained on, or its unquantised original."
        )


def _amplification(weight: Weight, update: Update, chosen: list[int]) -> Amplification:
    lora = change_rates.moved(weight.spectrum, weight.w, update.a, update.b)[chosen].tolist()
    dash = [0.0] * len(chosen) if update.gain is None else [float(g) for g in update.gain]
    whole = sum(abs(a + b) for a, b in zip(lora, dash, strict=True))
    alone = sum(map(abs, lora))
    norm, seen = _as_lora_measures_it(weight.w, *update.factors())
    return Amplification(
        index=chosen,
        lora=lora,
        dash=dash,
        total_over_lora=whole / alone if alone else None,
        norm=norm,
        seen=seen,
        factor=norm / seen if seen else None,
    )


def _as_lora_measures_it(w: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    """‖ΔW‖_F and ‖U_Δᵀ W V_Δ‖_F of ΔW = B A, from QR of the factors: ΔW itself is never formed."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T)
    kept = sigma > sigma[0] * 1e-12
    u_delta, v_delta = q_b @ u[:, kept], q_a @ vt[kept].T
    return float(sigma.norm()), float((u_delta.T @ w.to(a) @ v_delta).norm())


def _phase(updates: Updates) -> str:
    return next(iter(updates.values())).phase


def _overlap(one: AdapterDirections, other: AdapterDirections, count: int) -> Overlap:
    """Which rank in one adapter is which rank in the other, counted over the sites that both have."""
    there = {site.site: site for site in other.sites}
    pairs = [(site.predicted[:count], there[site.site].predicted[:count], site.able)
             for site in one.sites if site.site in there]  # fmt: skip
    grid = [[0] * count for _ in range(count)]
    for first, second, _ in pairs:
        for i, k in enumerate(first):
            if k in second:
                grid[i][second.index(k)] += 1
    n = max(len(pairs), 1)
    return Overlap(
        adapters=(one.adapter, other.adapter),
        sites=len(pairs),
        grid=grid,
        shared=sum(map(sum, grid)) / n,
        chance=sum(len(first) * len(second) / able for first, second, able in pairs) / n,
    )
