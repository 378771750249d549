"""Brackets of rank slots, three ways: by definition, exact and fast, and to second order.

    last-in   L(M∖i) − L(M)        first-in   L(∅) − L({i})

By definition: for every slot two full forward passes, one with it off and one with it alone. Slow and plain; the other ways are
compared with it. Slots of a boost (Dash) belong to the base: they stay on.

Exact, fast: replicas with gates of their own, the prefix kept, and a control in every forward pass. Per trajectory (the whole model
for last-in, the base for first-in) and share of the rows, one pass keeps what every block gives; then, block by block, passes that
start there, whose first replica is not ablated and whose others are, each in one slot. A bracket is a difference within one
pass, so the drift between kernels of different shapes is not in it.

To second order, for all slots from two forward and backward passes:

    last-in    −∂L/∂α_i + ½ F_i        at all gates 1
    first-in   −∂L/∂α_i                at all gates 0
    F_i = N Σ_rows (∂L_row/∂α_i)²      empirical Fisher of the gate; L_row is the row's share of L, N the labels that count

Every row has gates of its own, so one backward pass gives the gradients of all rows. After training ∂L/∂α at gate 1 is near 0,
which is why last-in needs the curvature. Source: ours; the paper has exact scores only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor

from weftlora.adapted.layer import WeftLayer
from weftlora.adapter.site import Site
from weftlora.scoring.network import Network
from weftlora.scoring.rows import Batch
from weftlora.terms.ranks.reallocate import GATE_MOVE, GATE_STEPS

SlotId = tuple[int, int]
Told = Callable[[int, int], None]


def brackets_by_definition(sites: Sequence[Site], slots: Sequence[SlotId], loss: Callable[[], Tensor]) -> Tensor:
    """[slots, 2, rows] fp64.

    Args:
        slots: (number of the site, slot).
        loss: one forward pass; [rows] fp64, which sum to the loss.
    """
    whole = loss()
    with only(sites, []):
        base = loss()
    found = torch.zeros(len(slots), 2, len(whole), dtype=torch.float64)
    live = [(m, slot) for m, site in enumerate(sites) for slot in site.live()]
    for n, each in enumerate(slots):
        with only(sites, [other for other in live if other != each]):
            found[n, 0] = (loss() - whole).cpu()
        with only(sites, [each]):
            found[n, 1] = (base - loss()).cpu()
    return found


@contextmanager
def only(sites: Sequence[Site], slots: Sequence[SlotId]) -> Iterator[None]:
    """These slots and no others, for the length of the block."""
    masks = [cast(Tensor, site.mask) for site in sites]
    before = [mask.clone() for mask in masks]  # written in place: those of experts are parts of one tensor
    on: dict[int, list[int]] = {}
    for m, slot in slots:
        on.setdefault(m, []).append(slot)
    try:
        for m, mask in enumerate(masks):
            mask.zero_()
            mask[on.get(m, [])] = 1
        yield
    finally:
        for mask, was in zip(masks, before, strict=True):
            mask.copy_(was)


REPLICAS = 32  # fewer would spend more than a thirty-second on the control
ENOUGH = {"cpu": 1024}  # tokens per pass: on a CPU, more fall out of its caches (measured: 3 tenths slower at 16384)


def exact_brackets(
    network: Network,
    layers: Sequence[WeftLayer],
    sites: Sequence[Site],
    slots: Sequence[SlotId],
    batch: Batch,
    *,
    chunk_tokens: int | None = None,
    terms: Sequence[int] = (0, 1),
    tell: Told = lambda done, total: None,
) -> Tensor:
    """[slots, 2, rows] fp64; terms that are not wanted (0 last-in, 1 first-in) stay 0.

    Args:
        layers, sites: the adapted modules and their sites, in one order.
        slots: (number of the site, slot).
        tell: called with how much is done, and of how much: blocks that have been run.
    """
    found = torch.zeros(len(slots), 2, len(batch["labels"]), dtype=torch.float64)
    numbers = {id(layer): network.block_of(layer) for layer in dict.fromkeys(layers)}
    blocks = [numbers[id(layer)] for layer in layers]
    by_block: dict[int, list[int]] = {}
    for n, (m, _) in enumerate(slots):
        by_block.setdefault(blocks[m] or 0, []).append(n)
    size, replicas = shares(batch, chunk_tokens)
    parts = torch.arange(len(batch["labels"])).split(size)
    depth = len(network.blocks) or 1
    work = {block: len(list(_even(at, replicas - 1))) * max(depth - block, 1) for block, at in by_block.items()}
    done, total = 0, len(parts) * len(terms) * sum(work.values())
    for rows in parts:
        part = {k: v[rows.to(v.device)] for k, v in batch.items()}
        for term in terms:
            with base_of(sites) if term else whole_of(sites):
                prefix = network.prefix(part)
            for block, positions in sorted(by_block.items()):
                for chunk in _even(positions, replicas - 1):
                    ablated = [slots[n] for n in chunk]
                    with _each(sites, ablated, alone=bool(term)):
                        losses = network.losses(part, len(chunk) + 1, prefix[:block])
                    change = (losses[1:] - losses[:1]).cpu()
                    for n, row in zip(chunk, -change if term else change, strict=True):
                        found[n, term, rows] = row
                done += work[block]
                tell(done, total)
    return found


def shares(batch: Batch, chunk_tokens: int | None) -> tuple[int, int]:
    """Rows per pass, and replicas of them: `chunk_tokens` in all, at least two replicas of one row; None chooses."""
    rows, tokens = len(batch["labels"]), max([v.shape[1] for v in batch.values() if v.dim() > 1], default=1)
    if chunk_tokens is None:
        chunk_tokens = max(ENOUGH.get(batch["labels"].device.type, 16384), tokens * REPLICAS // 4)
    size = min(rows, max(1, chunk_tokens // (tokens * REPLICAS)))
    return size, max(2, chunk_tokens // (tokens * size))


def _parts(batch: Batch, chunk_tokens: int | None) -> list[tuple[Tensor, Batch]]:
    """The batch in parts that are forwarded one at a time, each with the numbers of its rows: one replica of as many rows as fit."""
    size, replicas = shares(batch, chunk_tokens)
    rows = torch.arange(len(batch["labels"])).split(size * replicas)
    return [(own, {k: v[own.to(v.device)] for k, v in batch.items()}) for own in rows]


def _even(positions: list[int], most: int) -> Iterator[list[int]]:
    """As few chunks as possible, of equal size."""
    size = math.ceil(len(positions) / math.ceil(len(positions) / most))
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


@contextmanager
def whole_of(sites: Sequence[Site]) -> Iterator[None]:
    """All live slots on."""
    yield


@contextmanager
def base_of(sites: Sequence[Site]) -> Iterator[None]:
    """All slots off."""
    with only(sites, []):
        yield


@contextmanager
def _each(sites: Sequence[Site], slots: Sequence[SlotId], *, alone: bool) -> Iterator[None]:
    """Replica 0 as the trajectory is, replica k + 1 with slots[k] off, or it alone on."""
    mine = sorted({m for m, _ in slots})
    masks = {m: cast(Tensor, sites[m].mask).clone() for m in mine}
    with ExitStack() as stack:
        if alone:
            stack.enter_context(base_of(sites))
        try:
            for m in mine:
                site, mask = sites[m], masks[m]
                cast(Tensor, site.mask).copy_(mask)
                keep = torch.full(
                    (len(slots) + 1, len(mask)), float(not alone), dtype=torch.float64, device=mask.device
                )
                for k, (module, slot) in enumerate(slots):
                    if module == m:
                        keep[k + 1, slot] = float(alone)
                site.keep = keep
            yield
        finally:
            for m in mine:
                sites[m].keep = None


def estimated_brackets(
    network: Network,
    sites: Sequence[Site],
    slots: Sequence[SlotId],
    batch: Batch,
    *,
    chunk_tokens: int | None = None,
    tell: Told = lambda done, total: None,
) -> Tensor:
    """[slots, 2, rows] fp64."""
    found = torch.zeros(len(slots), 2, len(batch["labels"]), dtype=torch.float64)
    by_site: dict[int, list[int]] = {}
    for n, (m, _) in enumerate(slots):
        by_site.setdefault(m, []).append(n)
    columns = {m: torch.tensor([slots[n][1] for n in at]) for m, at in by_site.items()}
    parts = _parts(batch, chunk_tokens)
    for done, (rows, part) in enumerate(parts):
        for term, gate in enumerate((1.0, 0.0)):
            slope = gate_gradients(network, sites, part, gate)
            for m, at in by_site.items():
                own = slope[m][:, columns[m]].T
                curved = 0.5 * network.loss.count * own**2 if term == 0 else 0.0
                found[torch.tensor(at)[:, None], term, rows[None, :]] = curved - own
            tell(2 * done + term + 1, 2 * len(parts))
    return found


def sensitivities(
    network: Network,
    sites: Sequence[Site],
    slots: Sequence[SlotId],
    batch: Batch,
    *,
    chunk_tokens: int | None = None,
    tell: Told = lambda done, total: None,
) -> Tensor:
    """[slots] fp64: |w ∂L/∂w|, averaged over the slot's part of every parameter, summed over these.

    Source: the importance of a number in AdaLoRA, arXiv 2303.10512, equations 7 and 8, without its smoothing over steps.
    """
    views = [site.by_slot() for site in sites]
    params = list(dict.fromkeys(p for each in views for p, _ in each))
    slopes = {p: torch.zeros_like(p, dtype=torch.float64) for p in params}
    parts = _parts(batch, chunk_tokens)
    for done, (_, part) in enumerate(parts):
        with torch.enable_grad():
            found = torch.autograd.grad(network.losses(part).sum(), params, allow_unused=True)
        for p, slope in zip(params, found, strict=True):
            if slope is not None:
                slopes[p] += slope.double()
        tell(done + 1, len(parts))
    worth = []
    for each in views:
        of_site = [view((p.detach().double() * slopes[p]).abs()).flatten(1).mean(1) for p, view in each]
        worth.append(torch.stack(of_site).sum(0).cpu())
    return torch.stack([worth[m][slot] for m, slot in slots])


def trained_gates(
    network: Network,
    sites: Sequence[Site],
    slots: Sequence[SlotId],
    batch: Batch,
    *,
    chunk_tokens: int | None = None,
    tell: Told = lambda done, total: None,
) -> Tensor:
    """[slots] fp64: α' = 2 sigmoid(a') after some steps of descent on the loss of the batch, from a' = 0.

    The step is as long as lets the a' of largest slope at the start move by GATE_MOVE. Where no gate has a slope all stay 1.

    Source: equation 5 of ALoRA, whose ablation scores slots by architecture weights as differentiable architecture search trains
    them; that they are trained in the round, from 1, and by how much is ours.
    """
    values = [torch.zeros(len(cast(Tensor, site.mask)), dtype=torch.float64) for site in sites]
    parts = _parts(batch, chunk_tokens)
    rate: float | None = None
    for step in range(GATE_STEPS):
        slopes = [torch.zeros_like(value) for value in values]
        for done, (_, part) in enumerate(parts):
            gates = [2 * value.sigmoid() for value in values]
            for slope, found in zip(slopes, gate_gradients(network, sites, part, gates), strict=True):
                slope += found.sum(0)
            tell(step * len(parts) + done + 1, GATE_STEPS * len(parts))
        down = [slope * 2 * v.sigmoid() * (1 - v.sigmoid()) for slope, v in zip(slopes, values, strict=True)]
        if rate is None:
            largest = max(float(slope.abs().max()) for slope in down)
            rate = GATE_MOVE / largest if largest else 0.0
        for value, slope in zip(values, down, strict=True):
            value -= rate * slope
    return torch.stack([2 * values[m][slot].sigmoid() for m, slot in slots])


def gate_gradients(
    network: Network, sites: Sequence[Site], batch: Batch, gate: float | Sequence[Tensor]
) -> list[Tensor]:
    """∂L_row/∂α per site, [rows, slots] fp64 on the CPU, with every gate at `gate`, or those of each site at `gate[site]` [slots]."""
    leaves = []
    for m, site in enumerate(sites):
        mask = cast(Tensor, site.mask)
        dtype = torch.promote_types(site.structure.factors(1.0).A.dtype, torch.float32)
        at = torch.full((len(mask),), gate) if isinstance(gate, float) else gate[m]
        leaves.append(at.to(mask.device, dtype).repeat(len(batch["labels"]), 1))
    try:
        with torch.enable_grad():
            for site, leaf in zip(sites, leaves, strict=True):
                site.keep = leaf.requires_grad_()
            loss = network.losses(batch).sum()
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    finally:
        for site in sites:
            site.keep = None
    return [
        torch.zeros(leaf.shape, dtype=torch.float64) if slope is None else slope.double().cpu()
        for leaf, slope in zip(leaves, slopes, strict=True)
    ]
