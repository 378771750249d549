"""What is measured of one site: its update, its heads and its factors beside others; and what happened to the adapter on its way.

    ΔW = B A              ‖ΔW‖_F and its singular values from the QR of both factors; ΔW [out, in] is never formed
    cos(B_m, B_n)         of the flattened heads; 1: the same update, 0: unrelated ones
    overlap(X, Y)         mean cos² of the principal angles = ‖P_X P_Y‖²_F / min(dim)      by chance dim / in

A and B are compared with another adapter's, with their own start, or, where neither is known, with the size of a fresh draw. The
start is known where it is stored (the frozen twins of LoRA-Init) or can be drawn again from a run's seed; a draw that has no
more in common with A than chance is not its start, and is not shown as one.

Source: the similarity of A and the difference of the Bs is observation II of HydraLoRA, arXiv 2404.19245, figure 3 (there, t-SNE
plots). Ours: numbers in place of plots, and the start of A beside it, because adapters of one seed have one start.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from weftlora.adapted.routing import cosines, head_factors
from weftlora.adapter.site import Site
from weftlora.change_rates import principal_angles
from weftlora.inspection.record import (
    AdaptedModule,
    BlockCandidate,
    FactorComparison,
    FactorSimilarity,
    HeadSimilarity,
    Layers,
    RankHistory,
    RankRound,
    SiteComparison,
)
from weftlora.inspection.subject import Start, Subject
from weftlora.schedule.direction_ranking import MeanGate, factor_pair


def split_name(site: str) -> tuple[str, str]:
    """(block, module within it) of a full module name: the block is the name up to its first number.

    >>> split_name("model.layers.3.self_attn.q_proj")
    ('model.layers.3', 'self_attn.q_proj')
    """
    parts = site.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return ("", site) if at is None else (".".join(parts[: at + 1]), ".".join(parts[at + 1 :]))


def singular_values(a_ri: Tensor, b_or: Tensor) -> Tensor:
    """σ of B A, descending, [min(r, in, out)] fp64, from QR of the factors."""
    r_a = torch.linalg.qr(a_ri.double().T, mode="r").R
    r_b = torch.linalg.qr(b_or.double(), mode="r").R
    return torch.linalg.svdvals(r_b @ r_a.T)


def effective_rank(sigma: Tensor) -> float:
    """exp of the entropy of σ²/Σσ²; 0 for a matrix of zeros."""
    energy = sigma.double().square()
    if not energy.sum() > 0:
        return 0.0
    share = energy / energy.sum()
    return float(torch.special.entr(share).sum().exp())


def measure_site(
    name: str, site: Site, gate: MeanGate | None, weight_norm: float | None, why_not: str | None, stock: bool = False
) -> AdaptedModule:
    """What is known of a site from its own tensors.

    Args:
        gate: the measured mean gate of a routed site; the uniform one without it.
        weight_norm: ‖W‖_F, where W is at hand.
        why_not: why it cannot be merged into this very base, if it cannot; a routed site never can.
        stock: it was made of a stock LoRA, whose scale is inside B.
    """
    a, b, scale = factor_pair(site, gate, dash=True)
    sigma = scale * singular_values(a, b)
    norm = float(sigma.norm())
    factors, block = site.structure.factors(site.scale), split_name(name)
    rank = len(site.live())
    structure = site.structure.choice
    reason = why_not if site.mergeable else structure.no_closed_form
    return AdaptedModule(
        site=name,
        block=block[0],
        module=block[1],
        shape=(factors.B.shape[0], factors.A.shape[1]),
        rank=rank,
        max_rank=factors.A.shape[0],
        initial_rank=site.initial_rank,
        heads=factors.heads,
        scale=None if stock else site.scale,
        trained=sum(trained_numbers(site).values()),
        norm=norm,
        norm_kind=structure.figures_at if gate is None else "mean gate",
        relative=norm / weight_norm if weight_norm else None,
        effective_rank=effective_rank(sigma),
        mergeable=reason is None,
        why_not=reason,
    )


def trained_numbers(site: Site) -> dict[int, int]:
    """Trainable parameters by tensor (its id, so that shared ones can be told): of rank slots, the live ones."""
    room = site.structure.factors(site.scale).A.shape[0]
    live = len(site.live())
    slotted = set() if site.mask is None else {id(parameter) for parameter, _ in site.structure.by_slot()}
    return {id(p): p.numel() * live // room if id(p) in slotted else p.numel() for p in site.parameters()}


def stored_numbers(site: Site) -> dict[int, int]:
    """All numbers of a site's own tensors, by tensor; not the counters of the adapter as a whole, which the first site carries."""
    named = (*site.named_parameters(), *site.named_buffers())
    return {id(tensor): tensor.numel() for name, tensor in named if name not in site.counters}


def heads(name: str, site: Site) -> HeadSimilarity | None:
    """How alike the heads of a routed site are; None where there is one B."""
    if not site.routed:
        return None
    table = cosines(head_factors(site).double().transpose(0, 1).flatten(1))
    pairs = [value for i, row in enumerate(table) for value in row[i + 1 :] if value is not None]
    return HeadSimilarity(name, table, sum(pairs) / len(pairs) if pairs else None)


def factor_similarity(now_ki: Tensor, then_ki: Tensor) -> FactorSimilarity:
    """Two matrices with the spaces of their rows compared (give B transposed); the second is the reference.

    `cosine` and `relative_change` need equal shapes and are None otherwise.
    """
    now, then = now_ki.detach().double(), then_ki.detach().double()
    angles = principal_angles(now, then)
    size, same = float(then.norm()), now.shape == then.shape
    lengths = float(now.norm()) * size
    return FactorSimilarity(
        angles=[math.degrees(angle) for angle in angles.tolist()],
        overlap=float(angles.cos().square().mean()) if len(angles) else None,
        chance=min(1.0, max(len(now), len(then)) / now.shape[1]),
        cosine=float((now * then).sum()) / lengths if same and lengths else None,
        relative_change=float((now - then).norm()) / size if same and size else None,
    )


def factor(site: Site, part: str) -> Tensor:
    """A [live, in] or Bᵀ [heads · live, out] of a site, as trained: without scale, gates and masks' dead slots."""
    if part == "A":
        return site.structure.factors(site.scale).A.detach()[site.live()]
    return head_factors(site).flatten(1).T


def size_of_a_fresh_draw(a_ki: Tensor) -> float:
    """‖A‖_F over what a Kaiming draw of its shape has: k rows of `in` values uniform on ±1/√in have √(k/3).

    A moved by at least |this − 1| of its start's size.
    """
    return float(a_ki.detach().double().norm()) / math.sqrt(len(a_ki) / 3)


NOTHING_IN_COMMON = 0.1
"""Of the way from chance to 1: an overlap below it is that of another draw."""


def compare_factors(subject: Subject) -> FactorComparison | None:
    """What A and B are compared with, and how they compare; what cannot be known is added to `left_out`."""
    start = subject.start
    if start is not None and start.kind == "adapter":
        return _beside(subject, start)
    if (stored := _twins(subject)) is not None:
        return _beside(subject, stored)
    if any(_started(site) for site in subject.sites.values()):
        return None  # A began anew along directions that no twin keeps
    if start is not None:
        compared = _beside(subject, start)
        if _is_the_start(compared):
            return compared
        subject.left_out.append("A against its start: what the run's seed draws here has nothing in common with A.")
    return _sizes(subject)


def _is_the_start(compared: FactorComparison) -> bool:
    factors = [site.A for site in compared.sites if site.A is not None and site.A.overlap is not None]
    above = [
        (one.overlap - one.chance) / (1 - one.chance) for one in factors if one.overlap is not None and one.chance < 1
    ]
    return bool(factors) and (not above or sum(above) / len(above) > NOTHING_IN_COMMON)


def _beside(subject: Subject, start: Start) -> FactorComparison:
    rows = []
    for name, site in subject.sites.items():
        pair: dict[str, Any] = {}
        for part, known in (("A", start.A), ("B", start.B)):
            now, then = factor(site, part), known.get(name)
            if now is None or then is None:
                continue
            if start.kind == "start drawn again":  # has all slots there is room for; later ones did not start there
                slots = _first_slots(site)
                now, then = site.structure.factors(1.0).A.detach()[slots], then[slots]
            if len(now):
                pair[part] = factor_similarity(now, then.to(now.device))
        if pair:
            rows.append(SiteComparison(name, pair.get("A"), pair.get("B")))
    return FactorComparison(start.kind, start.what, rows)


def _first_slots(site: Site) -> list[int]:
    """Live slots that were there at the start."""
    return [slot for slot in site.live() if site.birth is None or int(site.birth[slot]) == 0]


def _started(site: Site) -> bool:
    return site.start is not None and site.start.happened


def _twins(subject: Subject) -> Start | None:
    """The start that LoRA-Init's frozen twins are."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for name, site in subject.sites.items():
        if site.start is not None and (stored := site.start.stored()) is not None:
            live = site.live()
            A[name], B[name] = stored[0][live], stored[1][:, live].T
    return Start("stored start", "the start of A and B, which LoRA-Init keeps as frozen twins", A, B) if A else None


def _sizes(subject: Subject) -> FactorComparison | None:
    """Where the start is not known: how far A moved at least, from its size alone."""
    rows = []
    for name, site in subject.sites.items():
        slots = _first_slots(site)
        value = factor(site, "A") if len(slots) == len(site.live()) else site.structure.factors(1.0).A[slots]
        if value is not None and len(value):
            rows.append(SiteComparison(name, None, None, size_of_a_fresh_draw(value)))
    subject.left_out.append(
        "Angles of A against its start: no file keeps the start of A. Compared instead: its size with that of a fresh draw; "
        "give against=... (--against), such as an early checkpoint."
    )
    return FactorComparison("fresh draw", "the size that a fresh Kaiming draw of A has", rows)


def layers(subject: Subject) -> Layers:
    """The candidates of the search with α and margins, where its selection is at hand; else the blocks that are adapted."""
    if (selection := subject.selection) is not None:
        rows = [
            BlockCandidate(c.name, c.selected, c.alpha, c.alpha_hat, c.distance, c.near) for c in selection.candidates
        ]
        return Layers("the search's selection", selection.granularity, rows, selection.margin)
    blocks = dict.fromkeys(split_name(name)[0] or name for name in subject.sites)
    source = "all that are targeted" if subject.config is None else subject.config.layers.source
    return Layers(source, "block", [BlockCandidate(name, True) for name in blocks], None)


def rank_history(subject: Subject) -> RankHistory | None:
    """The rounds of moving rank slots; None where none was recorded.

    A round that was repeated after a kill stands there once, as it went the last time.
    """
    told = [event for event in subject.events if event.get("event") == "reallocation"]
    try:
        mine = [_round(event, subject) for event in told if event.get("adapter") in (None, "default", subject.adapter)]
    except (KeyError, TypeError, ValueError, OverflowError):
        subject.left_out.append(f"Ranks over time: {subject.events_from} is damaged.")
        return None
    as_it_went = {each.round: each for each in mine}
    rounds = [as_it_went[number] for number in sorted(as_it_went)]
    born = {name: site.birth for name, site in subject.sites.items() if site.birth is not None}
    if rounds:
        return RankHistory(subject.events_from, {n: site.initial_rank for n, site in subject.sites.items()}, rounds)
    if born:
        made = sum(int((birth[site.live()] > 0).sum()) for n, birth in born.items() for site in [subject.sites[n]])
        live = sum(len(site.live()) for site in subject.sites.values())
        last = max(int(birth.max()) for birth in born.values())
        if last:
            subject.left_out.append(
                f"Ranks over time: a run's events.jsonl tells them. The adapter itself knows that {made} of its {live} live slots "
                f"were made later, the last in round {last}."
            )
    return None


def _round(event: dict[str, Any], subject: Subject) -> RankRound:
    return RankRound(
        step=int(event["step"]),
        round=int(event["round"]),
        taken=[(str(name), int(slot), score) for name, slot, score in event["pruned"]],
        made=[(str(name), int(slot)) for name, slot in event["added"]],
        ranks={name: int(event["ranks"][name]) for name in subject.sites},
        way=str(event["score"]) if event.get("score") else None,
    )
