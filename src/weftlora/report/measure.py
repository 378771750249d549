"""Numbers of one site from its factors alone; ΔW [out, in] is never formed.

    ΔW = B A              ‖ΔW‖_F and its singular values from the QR of both factors
    cos(B_m, B_n)         of the flattened heads; 1: the same update, 0: unrelated ones
    overlap(X, Y)         mean cos² of the principal angles = ‖P_X P_Y‖²_F / min(dim)      by chance dim / in

Source: the similarity of A and the difference of the Bs is observation II of HydraLoRA, arXiv 2404.19245, figure 3 (there, t-SNE
plots). Ours: numbers in place of plots, and the start of A beside it, because adapters of one seed have one start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weftlora.linalg import principal_angles
from weftlora.report.result import Alike, HeadSimilarity, SiteFacts
from weftlora.schedule.ranking import MeanGate, factor_pair
from weftlora.site import Site


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


def facts(
    name: str, site: Site, gate: MeanGate | None, weight_norm: float | None, why_not: str | None, stock: bool = False
) -> SiteFacts:
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
    return SiteFacts(
        site=name,
        block=block[0],
        module=block[1],
        shape=(factors.B.shape[0], factors.A.shape[1]),
        rank=rank,
        room=factors.A.shape[0],
        first_rank=site.initial_rank,
        heads=factors.heads,
        scale=None if stock else site.scale,
        trained=sum(trained_numbers(site).values()),
        norm=norm,
        norm_at=structure.figures_at if gate is None else "mean gate",
        relative=norm / weight_norm if weight_norm else None,
        effective_rank=effective_rank(sigma),
        mergeable=reason is None,
        why_not=reason,
    )


def trained_numbers(site: Site) -> dict[int, int]:
    """Trained numbers by tensor (its id, so that shared ones can be told): of rank slots, the live ones."""
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
    factors, live = site.structure.factors(site.scale), site.live()
    b_onr = factors.B.detach().double().unflatten(1, (factors.heads, -1))[:, :, live]
    table = cosines(b_onr.transpose(0, 1).flatten(1))
    pairs = [value for i, row in enumerate(table) for value in row[i + 1 :] if value is not None]
    return HeadSimilarity(name, table, sum(pairs) / len(pairs) if pairs else None)


def cosines(rows_nd: Tensor) -> list[list[float | None]]:
    """Pairwise cosines of rows, [N][N]; None beside a row of zeros."""
    lengths = rows_nd.norm(dim=1)
    table = (rows_nd @ rows_nd.T) / (lengths[:, None] * lengths).clamp_min(1e-300)
    zero = (lengths == 0).tolist()
    return [
        [None if zero[i] or zero[j] else max(-1.0, min(1.0, value)) for j, value in enumerate(row)]
        for i, row in enumerate(table.tolist())
    ]


def alike(now_ki: Tensor, then_ki: Tensor) -> Alike:
    """Two matrices with the spaces of their rows compared (give B transposed); the second is the reference.

    `cosine` and `moved` need equal shapes and are None otherwise.
    """
    now, then = now_ki.detach().double(), then_ki.detach().double()
    angles = principal_angles(now, then)
    size, same = float(then.norm()), now.shape == then.shape
    lengths = float(now.norm()) * size
    return Alike(
        angles=[math.degrees(angle) for angle in angles.tolist()],
        overlap=float(angles.cos().square().mean()) if len(angles) else None,
        chance=min(1.0, max(len(now), len(then)) / now.shape[1]),
        cosine=float((now * then).sum()) / lengths if same and lengths else None,
        moved=float((now - then).norm()) / size if same and size else None,
    )


def factor(site: Site, part: str) -> Tensor:
    """A [live, in] or Bᵀ [heads · live, out] of a site, as trained: without scale, gates and masks' dead slots."""
    live, f = site.live(), site.structure.factors(site.scale)
    if part == "A":
        return f.A.detach()[live]
    return f.B.detach().unflatten(1, (f.heads, -1))[:, :, live].flatten(1).T


def size_of_a_fresh_draw(a_ki: Tensor) -> float:
    """‖A‖_F over what a Kaiming draw of its shape has: k rows of `in` values uniform on ±1/√in have √(k/3).

    A moved by at least |this − 1| of its start's size.
    """
    return float(a_ki.detach().double().norm()) / math.sqrt(len(a_ki) / 3)
