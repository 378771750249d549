"""What adapters do along the core directions of W, site by site: measured here, shown elsewhere.

    δ_k = |u_kᵀ ΔW v_k| / (σ_k + ε)                change rate (`weftlora.linalg`)
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

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from weftlora import linalg
from weftlora.errors import AdapterError, ConfigError
from weftlora.glue.report import (
    AdapterDirections,
    Amplification,
    DirectionsReport,
    Hits,
    Overlap,
    SiteDirections,
    SiteSpectrum,
)
from weftlora.glue.updates import Update
from weftlora.numbers import is_whole

Updates = Mapping[str, Update]
Truth = Callable[[str], Update | Tensor]  # a site's true update, in factors or dense [out, in]
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
                f"directions={self.directions!r} is no number of directions: use a whole number from 1 up."
            )


@dataclass(frozen=True)
class Weight:
    """One frozen W [out, in] with its decomposition, for as long as its site is looked at."""

    w: Tensor
    source: str
    spectrum: linalg.Spectrum
    able: list[int]

    def rates(self, update: Update | Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(d, δ) of every core direction, [k]."""
        if isinstance(update, Tensor):
            moved = linalg.moved_by(self.spectrum, self.w, update.to(self.w.device))
        else:
            moved = linalg.moved(self.spectrum, self.w, *update.factors())
        return moved, linalg.change_rate(self.spectrum, moved, eps)

    def ranked(self, rate: Tensor) -> list[int]:
        """The core directions that moved, largest δ first, ties by index."""
        values = rate.tolist()
        return sorted((k for k in self.able if values[k] > 0), key=lambda k: (-values[k], k))


def measure(
    sites: Mapping[str, Callable[[], tuple[Tensor, str]]],
    adapters: Mapping[str, Updates],
    question: Question,
    decompose: Callable[[str, Tensor], linalg.Spectrum],
    truth: Truth | None = None,
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
        lowest = linalg.floor(spectrum.sigma, (w.shape[0], w.shape[1]))
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
            f"the adapter {label} launched directions in {name} that are none of this weight (off by {off:.0%}): give the base "
            "it was trained on, or its unquantised original."
        )


def _amplification(weight: Weight, update: Update, chosen: list[int]) -> Amplification:
    lora = linalg.moved(weight.spectrum, weight.w, update.a, update.b)[chosen].tolist()
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
