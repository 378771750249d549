"""Search: one scalar per block, trained on held-out data while the adapter trains on the rest.

    α̂ = N · softmax(α)                          N groups; Σα̂ = N; α = 0 is α̂ = 1 everywhere, which is plain LoRA
    y = x Wᵀ + b + α̂_l · (h B̃ᵀ)                 applied exactly once, as the layer gate of the site
    ∂R/∂α_i = h_i − (α̂_i / N) Σ_j h_j           with h_i = α̂_i ∂R/∂α̂_i; so Σ_i ∂R/∂α_i = 0 for any R

h needs no graph of α: the update of a site is linear in B, so h_l = Σ_m ⟨∇_{B_m} R, B_m⟩ over the modules m of block l.

Rules that turn α into a set:

    above_mean       α_i > mean(α)        the same for α + c, which is all that α̂ determines of α
    raw_zero         α_i > 0              means the same only while Σα = 0, which Adam does not keep
    alpha_hat_gt_1   α̂_i > 1              stricter: α̂_i ≥ 1 implies α_i ≥ mean(α) (AM ≥ GM), not the reverse
    top_k            the k largest

Ties go to the lower index.

Source: Flexora, arXiv 2408.10774; the body of the paper could not be read, so the released code (head 4449be8) is the
evidence. Where we knowingly differ from it: α̂ acts once (there, on the inputs of dropout, A and B: α̂³), the inner
optimiser keeps its state (there it is wiped every step, which makes it sign-SGD), the threshold is the mean of α (there,
0: meaningless once Adam has moved Σα), validation losses are averaged over tokens (there, summed).
`preset="released"` brings all four back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from weftlora.errors import ConfigError, RunError, suggest
from weftlora.settings import is_number, is_whole
from weftlora.terms.layers import Chosen, SearchedLayers, Weighed

Rule = Literal["above_mean", "raw_zero", "top_k", "alpha_hat_gt_1"]
Fewer = Literal["fill", "error"]

_CHOICES: dict[str, Sequence[str]] = {
    "granularity": ("block", "module"),
    "hypergrad": ("direct", "unrolled_fd", "unrolled_exact"),
    "alpha_optimizer": ("adam", "sgd"),
    "select": ("above_mean", "raw_zero", "top_k", "alpha_hat_gt_1"),
    "when_fewer": ("fill", "error"),
    "finetune": ("restart", "continue"),
    "preset": ("ours", "released"),
}
_COUNTS = ("inner_steps", "outer_batches", "max_search_samples", "val_size", "min_layers")
_COUNTS_OR_NONE = ("unroll_steps", "steps", "top_k")


@dataclass(frozen=True)
class Search(SearchedLayers):
    """Search which blocks to adapt; `weftlora.search_layers` runs it, and training without it is refused.

    Args:
        granularity: one scalar per "block" (released code) or per "module".
        hypergrad: "direct": the partial derivative of the validation loss at the trained θ (released code; free);
            "unrolled_fd": also through the last inner steps, by finite differences of gradients; "unrolled_exact": the
            same by double backward, for small models.
        fd_step: norm of the perturbation of θ in finite differences (DARTS: 1e-2; up to 1e-1 where forwards are in bf16).
        inner_steps: K optimiser steps on θ before every step on α.
        inner_lr: rate of θ during the search; None takes the training's. A lower one (ours) keeps θ learning for as long as α
            does: at a rate at which θ fits in a few steps, the sign of h is that of θ's overshoot, not of a block's use.
        unroll_steps: how many of the K are differentiated by the unrolled kinds; None is all.
        alpha_lr, alpha_optimizer: of α; no decay, no schedule (released code: Adam, 0.01).
        alpha_hat_max: the gate of a block is α̂ cut off there, which may be all of N otherwise; None (released code) is not.
        outer_batches: validation micro-batches per step on α (released code: 8, of one sample each).
        search_epochs: passes over the search's training rows; `steps`, if given, is the number of steps on α instead.
        max_share: of the training that follows, in the same run, what a search without `steps` may cost at most, counted in rows
            (ours); None is no bound.
        max_search_samples: rows used at most, validation included; val_size: rows held out where none are given.
        select: "above_mean": α_i > mean(α), the same for α + c; "raw_zero": α_i > 0 (released code); "top_k": the
            `top_k` largest; "alpha_hat_gt_1": α̂_i > 1, which implies α_i > mean(α) but not the reverse.
        min_layers: what is selected at least. Where the rule selects fewer, `when_fewer` says whether the largest α are added
            ("fill") or the search ends in a RunError ("error"): with no block or too few above the threshold, those added
            are blocks that the search did not find worth an adapter.
        finetune: what a recipe does with the selection: "restart" a fresh adapter on the selected blocks, or "continue" the
            searched one with α̂ folded in.
        preset: "released" repeats the released code, for replication studies only: α̂³, sign-SGD inside, raw_zero,
            summed validation losses.
    """

    saves: ClassVar[Mapping[str, str]] = {"layer_gate": "α̂ of the module's block"}
    earlier: ClassVar[Mapping[int, Mapping[str, Any]]] = {1: {"max_share": None}}

    granularity: Literal["block", "module"] = "block"
    hypergrad: Literal["direct", "unrolled_fd", "unrolled_exact"] = "direct"
    fd_step: float = 1e-2
    inner_steps: int = 1
    inner_lr: float | None = None
    unroll_steps: int | None = None
    alpha_lr: float = 0.01
    alpha_optimizer: Literal["adam", "sgd"] = "adam"
    alpha_hat_max: float | None = None
    outer_batches: int = 8
    search_epochs: float = 1.0
    steps: int | None = None
    max_share: float | None = 0.1
    max_search_samples: int = 5000
    val_size: int = 200
    select: Rule | None = None
    top_k: int | None = None
    min_layers: int = 1
    when_fewer: Fewer = "fill"
    finetune: Literal["restart", "continue"] = "restart"
    preset: Literal["ours", "released"] = "ours"

    def __post_init__(self) -> None:
        for name in _COUNTS:
            self._check(name, is_whole(getattr(self, name), 1), "a whole number from 1 up")
        for name in _COUNTS_OR_NONE:
            value = getattr(self, name)
            self._check(name, value is None or is_whole(value, 1), "a whole number from 1 up, or leave it out")
        for name in ("alpha_lr", "search_epochs", "fd_step"):
            self._check(name, _is_positive(getattr(self, name)), "a positive number")
        self._check(
            "inner_lr", self.inner_lr is None or _is_positive(self.inner_lr), "a positive number, or leave it out"
        )
        self._check("max_share", self.max_share is None or _is_positive(self.max_share), "a positive number, or none")
        most = self.alpha_hat_max
        self._check(
            "alpha_hat_max", most is None or (is_number(most) and 1 < most < math.inf), "a number above 1, or none"
        )
        if self.select is None:
            object.__setattr__(self, "select", "raw_zero" if self.preset == "released" else "above_mean")
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in valid:
                raise ConfigError(f"Search({name}={getattr(self, name)!r}): {suggest(str(getattr(self, name)), valid)}")
        self._check_together()
        if self.preset == "released":
            object.__setattr__(self, "inner_optimizer", "sign_sgd")
            object.__setattr__(self, "summed", True)

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ConfigError(f"Search({name}={getattr(self, name)!r}): use {wanted}.")

    def _check_together(self) -> None:
        if (self.select == "top_k") != (self.top_k is not None):
            raise ConfigError(
                f"Search(select={self.select!r}, top_k={self.top_k!r}): give select='top_k' and top_k=k together."
            )
        if self.when_fewer == "error" and self.top_k is not None and self.top_k < self.min_layers:
            raise ConfigError(
                f"Search(when_fewer='error', top_k={self.top_k}, min_layers={self.min_layers}) can only fail: use a top_k of "
                "min_layers or more."
            )
        if self.unroll_steps is not None and (self.hypergrad == "direct" or self.unroll_steps > self.inner_steps):
            raise ConfigError(
                f"Search(unroll_steps={self.unroll_steps}) with hypergrad={self.hypergrad!r} and inner_steps={self.inner_steps}: "
                "it bounds an unrolled hypergradient, to at most inner_steps."
            )
        if self.preset == "released" and self.hypergrad != "direct":
            raise ConfigError(
                f"Search(preset='released', hypergrad={self.hypergrad!r}): the sign-SGD of the released code has no derivative to "
                "unroll; use hypergrad='direct'."
            )
        if self.preset == "released" and self.finetune == "continue":
            raise ConfigError(
                "Search(preset='released', finetune='continue'): the released code restarts; use one of the two."
            )

    @property
    def power(self) -> int:
        """The gate of a site is α̂ to this power: 1; 3 in the released code."""
        return 3 if self.preset == "released" else 1

    def gates(self, alpha_n: Tensor) -> Tensor:
        """What the updates of the N groups are multiplied with, [N] → [N] fp64: α̂, or min(α̂, alpha_hat_max), to the power."""
        alpha_hat_n = weights(alpha_n)
        if self.alpha_hat_max is not None:
            alpha_hat_n = alpha_hat_n.clamp(max=self.alpha_hat_max)
        return alpha_hat_n**self.power

    def gradient(self, h_n: Tensor, alpha_n: Tensor) -> Tensor:
        """∂R/∂α [N] fp64 from h_i = gate_i · ∂R/∂gate_i; a gate that is cut off is a constant, so its h is left out."""
        alpha_hat_n = weights(alpha_n.detach())
        if self.alpha_hat_max is not None:
            h_n = h_n.where(alpha_hat_n <= self.alpha_hat_max, 0.0)
        return alpha_gradient(h_n, alpha_hat_n, self.power)

    def alpha_hat(self, alpha_n: Tensor) -> Tensor:
        """α̂."""
        return weights(alpha_n)

    def optimizer(self, alpha_n: Tensor) -> Optimizer:
        """No decay: it would pull to uniform."""
        kind = torch.optim.Adam if self.alpha_optimizer == "adam" else torch.optim.SGD
        return kind([alpha_n], lr=self.alpha_lr)

    def check_groups(self, n: int) -> None:
        """No more are asked for than there are."""
        for name, count in (("top_k", self.top_k or 0), ("min_layers", self.min_layers)):
            if count > n:
                raise ConfigError(f"{name}={count} of {n} groups cannot be selected: use at most {n}.")

    def choose(self, found: Weighed) -> Chosen:
        """The groups over the rule's threshold, and at least `min_layers`."""
        self.check_groups(len(found.alpha))
        return apply_rule(self, found)

    @property
    def selects(self) -> int | None:
        """`top_k`."""
        return self.top_k

    def selecting(self, count: int) -> Self:
        """The `count` largest α."""
        if self.top_k is None and self.select != "above_mean":
            raise ConfigError(
                f"Search(select={self.select!r}) knows only after the search how many blocks it selects: leave select out, or give "
                "top_k."
            )
        return replace(self, select="top_k", top_k=count)


def weights(alpha_n: Tensor) -> Tensor:
    """α̂ = N · softmax(α) in fp64, [N] → [N].

    Exactly 1 everywhere for equal α, whatever N is: N multiplies before the sum divides.
    """
    e_n = torch.exp(alpha_n.double() - alpha_n.detach().double().max())
    return e_n * len(e_n) / e_n.sum()


def apply_rule(search: Search, found: Weighed) -> Chosen:
    """What the rule of `search` selects from α."""
    alpha, n, least = found.alpha, len(found.alpha), search.min_layers
    ranked = sorted(range(n), key=lambda i: (-alpha[i], i))
    threshold = _threshold(search, alpha, ranked)
    if search.select == "top_k":
        chosen = set(ranked[: search.top_k])
    else:
        rounding = 8 * 2.0**-52 * max(abs(a) for a in alpha)
        chosen = {i for i in range(n) if alpha[i] - threshold > rounding}
    if len(chosen) < least and search.when_fewer == "error":
        raise RunError(
            f"select={search.select!r} selects {len(chosen)} of {n} groups, fewer than min_layers={least}: no other group of "
            "modules has a weight α that says an adapter helps there; search longer, lower min_layers, or also take the groups of the "
            "largest α (when_fewer='fill')."
        )
    filled = tuple(sorted(i for i in ranked[:least] if i not in chosen)) if len(chosen) < least else ()
    distance = tuple(a - threshold for a in alpha)
    near = tuple(i for i in range(n) if abs(distance[i]) < found.step)
    return Chosen(tuple(sorted(chosen | set(filled))), distance, filled, near)


def _threshold(search: Search, alpha: Sequence[float], ranked: list[int]) -> float:
    n, k = len(alpha), search.top_k
    if search.select == "raw_zero":
        return 0.0
    if k is None and search.select == "above_mean":
        return math.fsum(alpha) / n
    if k is None:  # α̂_i > 1  ⇔  α_i > log mean exp α
        top = max(alpha)
        return top + math.log(math.fsum(math.exp(a - top) for a in alpha) / n)
    ordered = [alpha[i] for i in ranked]
    return ordered[-1] if k == n else (ordered[k - 1] + ordered[k]) / 2


def alpha_gradient(h_n: Tensor, alpha_hat_n: Tensor, power: int = 1) -> Tensor:
    """∂R/∂α in fp64 from h_i = gate_i · ∂R/∂gate_i, where gate = α̂ ** power.

    Holds where α̂ underflows to 0 too, because nothing is divided by it.
    """
    h_n, alpha_hat_n = h_n.double() * power, alpha_hat_n.double()
    return h_n - alpha_hat_n / len(h_n) * h_n.sum()


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf
