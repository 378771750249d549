"""Hydra: one shared A, N heads B₁…B_N, mixed per token by a learned router.

    ω = softmax(x Wgᵀ)                        [T, N], in fp32, on the site's own raw input (no dropout)
    ΔW(x) = (α/r) (Σ_n ω_n B_n) A             A [r, in], B_n [out, r], Wg [N, in], no bias

    split=True         ΔW(x) = (α/r) Σ_n ω_n B_n A_n: each head has an A of its own (LoRA-Split)
    router="topk"      the softmax of the k largest logits of a token; the other heads have weight 0

Source: HydraLoRA, arXiv 2404.19245, equations 2-4. Equation 4 gives Wg the shape r×N but feeds it x; like the released
code we take N×in (`router_input="Ax"` is the other reading). Where we knowingly differ from the released code: one
dropout mask shared by the heads (there, one per head: `per_head_dropout=True`), plain tensors returned, any module can
be a target. The N heads lie side by side in one B [out, N·r], so no step of the computation is as large as
tokens × out × N.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weftlora.errors import ConfigError, suggest
from weftlora.kernel import Axis, Factors, Role, RouterInput
from weftlora.settings import is_number, is_whole
from weftlora.terms.events import Controller, Timeline
from weftlora.terms.structure import Draw, Place, Size, SlotFirst, Structure, StructureTerm, Unshared, sides_of


@dataclass(frozen=True)
class Hydra(Structure):
    """One shared A, several B heads, mixed per token by a learned router.

    Args:
        heads: N ≥ 2 (the paper: 3 for one domain, 10 for the ten task clusters of Flan-v2).
        router: "softmax", learned (the paper), or "uniform", its control "w/o gate": every head has weight 1/N and nothing is routed,
            so that it is LoRA of rank r with the mean of the heads as B, or "topk": every token uses the `k` heads of largest
            logit, with the softmax over these. With k = 1 its head has weight 1, as in the released multimodal code
            (`dense_moe=False`): the loss gives the router no gradient, only `balance` does.
        k: heads that a token uses, for "topk".
        split: an A per head: N LoRAs of rank r behind one router, the paper's control "w/o Hydra" (how it mixes them is not said;
            with router="uniform" they are one LoRA of rank N·r at the scale α / (N·r)).
        router_input: "x", the site's raw input (released code), or "Ax", its r-dimensional projection.
        per_head_dropout: a fresh dropout mask per head, as in the released code, instead of one shared mask.
        balance: weight of the load-balance term N Σ f_n p̄_n of Switch Transformers; 0, as in the paper, is none.
            A training forward with balance > 0 must run inside `weftlora.routing(model)`; `weftlora train` does that.
        router_init: "kaiming" (released code), or "zero". A zero router with one shared mask keeps all heads equal for
            ever (specs, symmetry), so "zero" is refused unless per_head_dropout breaks the symmetry.
        router_gain: factor on the router that is drawn: its logits start so many times as far apart. 1, the released code's start,
            has gates near 1/N, under which Adam moves all heads alike; at 8 most tokens start with one head of their own, so that
            heads learn from different tokens. Only the start differs, the equation does not (ours; no paper's).
    """

    method: ClassVar[str] = "HydraLoRA"
    headline: ClassVar[tuple[str, ...] | None] = ("heads",)
    saves: ClassVar[Mapping[str, str]] = {
        "A": "A [r, in], with split [N·r, in]",
        "B": "B [out, N·r]",
        "router": "Wg [N, in] or [N, r]",
    }
    refuses: ClassVar[Mapping[str, str]] = {"Directions": "all heads would start equal at B₀, which is unproven"}
    no_closed_form: ClassVar[str | None] = "the update depends on the token, so no single ΔW exists"
    figures_at: ClassVar[str] = "uniform gate"
    routed: ClassVar[bool] = True

    heads: int = 3
    router: str = "softmax"
    k: int | None = None
    split: bool = False
    router_input: RouterInput = "x"
    per_head_dropout: bool = False
    balance: float = 0.0
    router_init: str = field(default="kaiming")
    router_gain: float = 1.0
    objections: Mapping[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not is_whole(self.heads, 2):
            raise ConfigError(
                f"Hydra(heads={self.heads!r}) is not a number of heads: use a whole number from 2 up; one head is plain LoRA "
                "(recipe lora, PlainLoraConfig)."
            )
        if self.router not in (routers := ("softmax", "topk", "uniform")):
            raise ConfigError(f"Hydra(router={self.router!r}): {suggest(str(self.router), routers)}")
        if (self.router == "topk") != (self.k is not None):
            raise ConfigError(
                f"Hydra(router={self.router!r}, k={self.k!r}): k is how many heads a token uses with router='topk'; give both or none."
            )
        if self.k is not None and not (is_whole(self.k, 1) and self.k <= self.heads):
            raise ConfigError(
                f"Hydra(k={self.k!r}) heads of {self.heads} cannot be used: use a whole number from 1 to {self.heads}."
            )
        if self.k == 1 and self.balance == 0:
            raise ConfigError(
                "Hydra(router='topk', k=1) gives its one head the weight 1, so the loss moves no router: set balance above 0 (the "
                "released code has 0.05), or k=2."
            )
        if not is_number(self.router_gain) or not 0 < self.router_gain < math.inf:
            raise ConfigError(
                f"Hydra(router_gain={self.router_gain!r}) is not a factor on a router: use a number above 0, such as 8."
            )
        drawn = self.router != "uniform" and self.router_init == "kaiming"
        if self.router_gain != 1 and not drawn:
            raise ConfigError(
                f"Hydra(router_gain={self.router_gain:g}) scales a router that is drawn, and none is: leave it out."
            )
        if self.router == "uniform" and (self.balance or self.router_init != "kaiming"):
            raise ConfigError(
                "Hydra(router='uniform') has no router to start or to balance: leave router_init and balance out."
            )
        if self.router_input not in ("x", "Ax"):
            raise ConfigError(
                f"Hydra(router_input={self.router_input!r}): {suggest(str(self.router_input), ['x', 'Ax'])}"
            )
        for name in ("split", "per_head_dropout"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"Hydra({name}={value!r}) is neither true nor false: use one of the two.")
        if self.split and self.router_input == "Ax":
            raise ConfigError(
                "Hydra(split=True, router_input='Ax'): heads share no A that a router could read; use router_input='x'."
            )
        if not is_number(self.balance) or not 0 <= self.balance < math.inf:
            raise ConfigError(f"Hydra(balance={self.balance!r}) is not a weight: use 0 or a small number such as 0.01.")
        if self.router_init not in ("kaiming", "zero"):
            raise ConfigError(
                f"Hydra(router_init={self.router_init!r}): {suggest(str(self.router_init), ['kaiming', 'zero'])}"
            )
        if self.router_init == "zero" and self.router == "topk":
            raise ConfigError(
                "Hydra(router='topk', router_init='zero') would send every token to the first heads: use router_init='kaiming'."
            )
        if self.router_init == "zero" and not self.per_head_dropout:
            raise ConfigError(
                "Hydra(router_init='zero') with one shared dropout mask keeps all heads equal: "
                "use router_init='kaiming', or per_head_dropout=True with lora_dropout > 0."
            )
        if self.split:
            reason = "with split=True a rank slot would belong to one head alone"
            object.__setattr__(self, "objections", {"Reallocate": reason})

    def build(self, size: Size, room: int, owners: Mapping[str, StructureTerm], draw: Draw) -> HydraTerm:
        """A drawn, B zero; the router drawn or zero."""
        router = draw(self.heads, size.fan_in if self.router_input == "x" else size.r)
        router = router * self.router_gain if self.router_init == "kaiming" else torch.zeros_like(router)
        router = F.pad(router, (0, room if self.router_input == "Ax" else 0))
        rows = size.r * (self.heads if self.split else 1)
        return HydraTerm(self, F.pad(draw(rows, size.fan_in), (0, 0, 0, room)), size.out, router)

    def tensors(self) -> frozenset[str]:
        """A, B and the router, unless that is none."""
        return frozenset(self.saves) - (frozenset({"router"}) if self.router == "uniform" else frozenset())

    def shared_keys(self, place: Place) -> dict[str, Hashable]:
        """Nothing is shared."""
        return {}

    def sides(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        """Of A and B."""
        return sides_of(tensors.get("A"), tensors.get("B"))

    def check(self, dropout: float) -> None:
        """A zero router needs masks that differ by head."""
        if self.router_init == "zero" and not dropout:
            raise ConfigError("Hydra(router_init='zero') without dropout keeps all heads equal: set lora_dropout > 0.")

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """Nothing happens."""
        return []


class HydraTerm(Unshared):
    """Owns A [r, in], B [out, N·r] (head n in columns n·r … n·r+r−1) and the router [N, in] or [N, r] of one site.

    With split A is [N·r, in], head n's in rows n·r … n·r+r−1.
    """

    roles: ClassVar[Mapping[str, Role]] = {"A": "down", "B": "up", "router": "router"}
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]] = {
        "A": ("slots", "in"),
        "B": ("out", "slots"),
        "router": ("heads", "in"),
    }
    choice: Hydra

    def __init__(self, choice: Hydra, a: Tensor, out_features: int, router: Tensor):
        super().__init__()
        self.choice = choice
        self.A = nn.Parameter(a)
        self.top = choice.k
        self.B = nn.Parameter(a.new_zeros(out_features, a.shape[0] * (1 if choice.split else choice.heads)))
        if choice.router == "uniform":
            self.register_buffer("router", torch.zeros_like(router), persistent=False)  # softmax of zeros is 1/N
        else:
            self.router = nn.Parameter(router)

    def factors(self, scale: float) -> Factors:
        """A, B and the router. With split every head reads all rows of A, and its B is 0 for those of the others."""
        b: Tensor = self.B
        if self.choice.split:
            own = torch.eye(self.choice.heads, dtype=b.dtype, device=b.device)
            b = torch.einsum("onr,nm->onmr", b.unflatten(1, (self.choice.heads, -1)), own).flatten(1)
        return Factors(self.A, b, scale, router=self.router, router_input=self.choice.router_input, top=self.top)

    def by_slot(self) -> list[tuple[nn.Parameter, SlotFirst]]:
        """Rows of A, columns of every head of B and, where it reads A x, of the router; with split none."""
        if self.choice.split:
            return []
        slots = self.A.shape[0]
        found: list[tuple[nn.Parameter, SlotFirst]] = [
            (self.A, lambda t: t),
            (self.B, lambda t: t.unflatten(1, (-1, slots)).movedim(2, 0)),
        ]
        if self.choice.router_input == "Ax" and isinstance(self.router, nn.Parameter):
            found.append((self.router, lambda t: t.movedim(1, 0)))
        return found

    def linear(self) -> list[Tensor]:
        """B."""
        return [self.B]

    def fix(self, omega: Tensor) -> None:
        """With a router of zeros every head has weight 1/N, so head n times N ω_n has weight ω_n."""
        heads = self.B.detach().unflatten(1, (len(omega), -1))
        weighted = (heads * (len(omega) * omega.to(heads))[:, None]).flatten(1)
        self.B = nn.Parameter(weighted, requires_grad=False)
        self.router = nn.Parameter(torch.zeros_like(self.router), requires_grad=False)
        self.top = None


def balance_loss(omega_tn: Tensor) -> Tensor:
    """Load balance of one router: N Σ_n f_n p̄_n, 1 when uniform, N when one head takes every token.

    omega_tn [T, N] are the router's weights of the tokens to count (leave padding out); f_n is the share of tokens
    whose largest weight is head n's (ties go to the lowest index) and carries no gradient; p̄_n is the mean weight.

    Source: Switch Transformers, arXiv 2101.03961, equations 4-6; HydraLoRA itself uses none.
    """
    return balance_of(balance_sums(omega_tn), len(omega_tn))


def balance_sums(omega_tn: Tensor) -> Tensor:
    """[2, N]: over tokens, how often each head's weight is the largest, and the sum of its weights, which has the graph."""
    top = torch.zeros_like(omega_tn).scatter_(-1, omega_tn.argmax(-1, keepdim=True), 1.0)
    return torch.stack([top.sum(0), omega_tn.sum(0)])


def balance_of(sums_2n: Tensor, tokens: Tensor | int) -> Tensor:
    """`balance_loss` of the sums over so many tokens."""
    f_n, mean_n = sums_2n / tokens
    return sums_2n.shape[1] * (f_n * mean_n).sum()
