"""Which directions of a frozen weight W a fine-tune moves, and how far.

    W = U diag(σ) Vᵀ, σ descending        core direction i: u_i v_iᵀ
    d_i = u_iᵀ ΔW v_i                     how far ΔW moves it
    δ_i = |d_i| / (σ_i + ε)               change rate

Source: LoRA-Dash, arXiv 2409.01035 (definition of the change rate and of task-specific directions). ε is unread there:
ours is 1e-8 σ_max. ΔW = c B A is never formed: d = c · rowsum((Uᵀ B) ∘ (A V)ᵀ).

Only one side of the decomposition is needed for all rates. The Gram route takes it from the smaller of WᵀW and WWᵀ in
fp64 (fp32 Gram loses directions from σ_max/σ_min ≈ 2e3 on, so it does not exist here); the SVD route, in fp64 too, is the
plain reference and what small matrices cost nothing to use. Directions with σ below √(max(m, n) · eps₆₄) · σ_max cannot be
told from rounding by either and are left out. (A floor of max(m, n) · eps₃₂ · σ_max would, at 4096, leave out everything
below 5e-4 σ_max, which is where task-specific directions are found.)

Letters: o out, i in, r rank, k core direction, s kept direction.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Route = Literal["gram", "svd"]
SELECT = ("rate", "top", "bottom", "random")
"""The rules of `decide`."""


@dataclass(frozen=True)
class Spectrum:
    """One side of a thin SVD, enough for all change rates: σ descending [k] and the vectors of the smaller side, fp64."""

    sigma: Tensor  # [k]
    side: Tensor  # [small, k]: V where in ≤ out, else U
    tall: bool  # in ≤ out, so that `side` is V


@dataclass(frozen=True)
class Directions:
    """Core directions of one W, best first: indices in the spectrum, σ, change rates, and the vectors themselves."""

    index: Tensor  # [s] int64
    sigma: Tensor  # [s] fp64
    rate: Tensor  # [s] fp64
    up: Tensor  # [out, s] fp64: ū
    down: Tensor  # [s, in] fp64: v̄ᵀ


def spectrum(w_oi: Tensor, route: Route = "gram") -> Spectrum:
    """Singular values and the vectors of the smaller side of W [out, in], computed in fp64 with autocast off."""
    with torch.autocast(w_oi.device.type, enabled=False), torch.no_grad():
        w = w_oi.detach().to(torch.float64)
        tall = w.shape[1] <= w.shape[0]
        if route == "svd":
            u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
            return Spectrum(sigma, vt.T if tall else u, tall)
        gram = w.T @ w if tall else w @ w.T
        eigenvalues, vectors = torch.linalg.eigh(gram)
        return Spectrum(eigenvalues.clamp_min(0).sqrt().flip(0), vectors.flip(1), tall)


def floor(sigma: Tensor, shape: tuple[int, int]) -> float:
    """The singular value below which a direction is rounding noise: √(max(m, n) · eps₆₄) · σ_max."""
    largest = float(sigma[0]) if len(sigma) else 0.0
    return float((max(shape) * torch.finfo(torch.float64).eps) ** 0.5 * largest)


def moved(spec: Spectrum, w_oi: Tensor, a_ri: Tensor, b_or: Tensor, scale: float = 1.0) -> Tensor:
    """d_k = u_kᵀ (scale · B A) v_k of every core direction [k], fp64, without ΔW and without the larger side.

    Directions below the floor, whose larger-side vector is undetermined, get 0.
    """
    with torch.autocast(w_oi.device.type, enabled=False), torch.no_grad():
        w, a, b = (t.detach().to(spec.side) for t in (w_oi, a_ri, b_or))
        if spec.tall:
            products = (((w.T @ b).T @ spec.side) * (a @ spec.side)).sum(0)
        else:
            products = ((b.T @ spec.side) * ((a @ w.T) @ spec.side)).sum(0)
        lowest = floor(spec.sigma, (w.shape[0], w.shape[1]))
        return torch.where(
            spec.sigma > lowest, scale * products / spec.sigma.clamp_min(1e-300), torch.zeros_like(products)
        )


def moved_by(spec: Spectrum, w_oi: Tensor, delta_oi: Tensor) -> Tensor:
    """d_k of a dense ΔW [out, in], such as that of a full fine-tune; otherwise as `moved`."""
    with torch.autocast(w_oi.device.type, enabled=False), torch.no_grad():
        w, delta = w_oi.detach().to(spec.side), delta_oi.detach().to(spec.side)
        products = (
            (w @ spec.side) * (delta @ spec.side) if spec.tall else (w.T @ spec.side) * (delta.T @ spec.side)
        ).sum(0)
        lowest = floor(spec.sigma, (w.shape[0], w.shape[1]))
        return torch.where(spec.sigma > lowest, products / spec.sigma.clamp_min(1e-300), torch.zeros_like(products))


def change_rate(spec: Spectrum, moved_k: Tensor, eps: float = 1e-8) -> Tensor:
    """δ_k = |d_k| / (σ_k + eps · σ_max), [k] fp64; 0 where nothing moved, in a W of zeros too."""
    return moved_k.abs() / (spec.sigma + eps * spec.sigma[:1]).clamp_min(1e-300)


def decide(rate: list[float], sigma: list[float], lowest: float, count: int, select: str, seed: str) -> list[int]:
    """Which core directions to choose, best first: of those that moved and are above the floor, at most `count`.

    "rate": largest change rate, ties by index; "top": largest σ; "bottom": smallest σ; "random": drawn with `seed`.
    """
    able = [k for k, (r, s) in enumerate(zip(rate, sigma, strict=True)) if r > 0 and s > lowest]
    if select == "random":
        return random.Random(seed).sample(able, min(count, len(able)))
    if select == "rate":
        able.sort(key=lambda k: (-rate[k], k))
    if select == "bottom":
        able.reverse()
    return able[:count]


def pick(spec: Spectrum, w_oi: Tensor, rate_k: Tensor, count: int) -> Directions:
    """The `count` directions of largest rate, ties by index; fewer where the rest is below the floor or has rate 0."""
    lowest = floor(spec.sigma, (w_oi.shape[0], w_oi.shape[1]))
    return take(spec, w_oi, rate_k, decide(rate_k.tolist(), spec.sigma.tolist(), lowest, count, "rate", ""))


def take(spec: Spectrum, w_oi: Tensor, rate_k: Tensor, chosen: list[int]) -> Directions:
    """The core directions with these indices, in this order."""
    with torch.autocast(w_oi.device.type, enabled=False), torch.no_grad():
        w, index = w_oi.detach().to(spec.side), torch.tensor(chosen, dtype=torch.long, device=spec.side.device)
        near = spec.side[:, index]
        far = w @ near if spec.tall else w.T @ near
        length = far.norm(dim=0)
        far = far / length
        up, down = (far, near.T) if spec.tall else (near, far.T)
        return Directions(index, length, rate_k[index], up, down.contiguous())


def principal_angles(one_ki: Tensor, other_ki: Tensor) -> Tensor:
    """Angles in radians between the row spaces of two matrices [k, in] and [l, in], ascending, fp64: as many as the smaller
    space has dimensions; none where a matrix is 0. Rows below 1e-10 of the largest singular value do not count."""
    with torch.no_grad():
        one, other = (_row_basis(m.detach().double()) for m in (one_ki, other_ki))
        return (
            torch.linalg.svdvals(one @ other.T).clamp(0.0, 1.0).acos() if len(one) and len(other) else one.new_zeros(0)
        )


def _row_basis(m: Tensor) -> Tensor:
    _, sigma, vt = torch.linalg.svd(m, full_matrices=False)
    return vt[sigma > 1e-10 * sigma.max()] if m.numel() and sigma.max() > 0 else vt[:0]
