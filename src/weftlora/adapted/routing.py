"""What the routers did in a forward pass: load-balance term and usage figures, on request only.

    with weftlora.routing(model) as routing:
        loss = model(**batch).loss
    loss = loss + routing.balance_loss(batch["attention_mask"])

Outside such a block nothing is recorded and a forward has no side effect.

What is counted of ω, over the tokens of a router:

    entropy        mean of −Σ_n ω_n ln ω_n / ln N                     1: every token mixes all heads evenly
    balance        −Σ_n m_n ln m_n / ln N, m the mean of ω             1: all heads are used equally
    information    Σ_d p_d Σ_n m_dn ln (m_dn / m_n) / ln N             0: every domain uses the heads alike; p_d its share of tokens

The last is the mutual information of a token's head, drawn with ω, and its domain; no more than balance less entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLayer
from weftlora.adapter.site import Site
from weftlora.errors import ConfigError
from weftlora.schedule.processes import world
from weftlora.terms.structure.hydra import balance_loss, balance_of, balance_sums


@dataclass
class Routing:
    """The router weights ω of one forward, [..., N] fp32 with their graph, by module name; one entry per call of a site.

    They are the whole softmax, also where a token uses only some of the heads: `used(name, omega)` are the weights of those.
    """

    omega: dict[str, list[Tensor]] = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict, repr=False)

    def balance_loss(self, attention_mask: Tensor | None = None, *, together: bool = True) -> Tensor:
        """Mean over sites of balance × N Σ f_n p̄_n, a scalar to add to the task loss.

        Args:
            attention_mask: [batch, tokens], 0 on padding, which is left out where a site saw this shape of tokens. An
                encoder-decoder whose two sides are padded to one length shares it: pass None there, or pad to two lengths.
            together: with several processes, whether f and p̄ are those of the tokens of all, as gradients are averaged over all; every
                process must call it then. Without gradients it is this process's own.

        Raises:
            ConfigError: no trained router ran, or reentrant checkpointing hid the graph of one.
        """
        counted = [
            (self.weight[name], _tokens(omega, attention_mask))
            for name, calls in self.omega.items()
            for omega in calls
            if self.weight[name]
        ]
        if not counted:
            raise ConfigError(
                "no routed module with balance > 0 ran inside weftlora.routing(model): put the forward inside the block."
            )
        if together and torch.is_grad_enabled() and world() > 1:
            terms = [weight * value for weight, value in _over_processes(counted)]
        else:
            terms = [weight * balance_loss(omega) for weight, omega in counted if len(omega)]
        if torch.is_grad_enabled() and not all(term.requires_grad for term in terms):
            raise ConfigError(
                "routers were recorded without a graph, as reentrant gradient checkpointing does: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or set balance=0."
            )
        return torch.stack(terms).mean() if terms else torch.zeros(())

    def mean_gate(self) -> dict[str, Tensor]:
        """Mean weight [N] that every site's heads are used with, over all tokens recorded."""
        return {
            name: torch.cat([self.used(name, o).detach().flatten(0, -2) for o in calls]).mean(0)
            for name, calls in self.omega.items()
        }

    def used(self, name: str, omega: Tensor) -> Tensor:
        """Of weights [..., N] of that site those that its heads are mixed with."""
        return self.sites[name].used(omega)


@contextmanager
def routing(model: nn.Module) -> Iterator[Routing]:
    """Record the routers of all active HydraLoRA sites of `model` for the length of the block."""
    record = Routing()
    before: list[tuple[Site, Callable[[Tensor], None] | None]] = []
    for module_name, layer in model.named_modules():
        if not isinstance(layer, WeftLayer):
            continue
        for adapter_name in layer.active_adapters:
            site = layer.site(adapter_name) if adapter_name in layer.weft_site else None
            if site is not None and site.routed:
                name = module_name if len(layer.active_adapters) == 1 else f"{module_name}[{adapter_name}]"
                router = site.structure.factors(site.scale).router
                record.sites[name] = site
                record.weight[name] = site.balance if router is not None and router.requires_grad else 0.0
                before.append((site, site.recorder))
                site.recorder = partial(_append, record.omega.setdefault(name, []), site.recorder)
    try:
        yield record
    finally:
        for site, recorder in before:
            site.recorder = recorder


def _append(calls: list[Tensor], outer: Callable[[Tensor], None] | None, omega: Tensor) -> None:
    calls.append(omega)
    if outer is not None:
        outer(omega)


def _over_processes(counted: list[tuple[float, Tensor]]) -> list[tuple[float, Tensor]]:
    """Each balance term over the tokens of all processes, with the gradient that is right once gradients are averaged over them."""
    own = [balance_sums(omega) for _, omega in counted]
    sizes = [sums.numel() for sums in own]
    tokens = torch.tensor([float(len(omega)) for _, omega in counted], device=own[0].device, dtype=own[0].dtype)
    flat = torch.cat([*(sums.reshape(-1) for sums in own), tokens])
    summed = flat.detach().clone()
    dist.all_reduce(summed)
    summed = summed + world() * (flat - flat.detach())
    *parts, counts = summed.split([*sizes, len(counted)])
    return [
        (weight, balance_of(part.view(2, -1), count))
        for (weight, _), part, count in zip(counted, parts, counts, strict=True)
        if float(count)
    ]


def _tokens(omega: Tensor, mask: Tensor | None) -> Tensor:
    return omega.flatten(0, -2) if mask is None or mask.shape != omega.shape[:-1] else omega[mask.bool()]


class Seen:
    """Running sums over the tokens of one router, fp64."""

    def __init__(self, heads: int):
        self.tokens = 0
        self.entropy = 0.0
        self.total = torch.zeros(heads, dtype=torch.float64)
        self.top = torch.zeros(heads, dtype=torch.float64)

    def add(self, omega_tn: Tensor) -> None:
        """Take in the weights [T, N] of T tokens."""
        omega = omega_tn.detach().double().cpu()
        self.tokens += len(omega)
        self.entropy += float(torch.special.entr(omega).sum())
        self.total += omega.sum(0)
        self.top += torch.bincount(omega.argmax(-1), minlength=omega.shape[-1])

    @classmethod
    def pooled(cls, parts: Iterable[Seen]) -> Seen:
        """The sums over disjoint parts of the tokens; there must be one."""
        each = list(parts)
        whole = cls(len(each[0].total))
        for part in each:
            whole.tokens += part.tokens
            whole.entropy += part.entropy
            whole.total += part.total
            whole.top += part.top
        return whole

    @property
    def mean(self) -> Tensor:
        """[N], the share that every head has; at least one token must have been seen."""
        return self.total / self.tokens

    @property
    def sharpness(self) -> float:
        """The mean entropy of a token's weights, of ln N."""
        return self.entropy / self.tokens / math.log(len(self.total))

    @property
    def balance(self) -> float:
        """The entropy of the mean weights, of ln N."""
        return float(torch.special.entr(self.mean).sum()) / math.log(len(self.total))


def information(domains: Iterable[Seen]) -> float:
    """The mutual information of head and domain, of ln N, from what was seen of every domain; each must have a token."""
    parts = list(domains)
    whole = Seen.pooled(parts)
    within = sum(part.tokens / whole.tokens * part.balance for part in parts)
    return max(0.0, whole.balance - within)


def counted(omega: Tensor, masks: list[Tensor]) -> Tensor:
    """The weights [T, N] of the tokens that are no padding."""
    flat = omega.flatten(0, -2)
    for mask in masks:
        if mask.shape == omega.shape[:-1] or (omega.dim() == 2 and mask.dim() == 2 and mask.numel() == len(flat)):
            return flat[mask.flatten().bool()]
    return flat


def head_factors(site: Site) -> Tensor:
    """B [out, N, live] of a site's heads. Where they share no A, only what is a head's own: the rest of B̃'s columns are zeros."""
    f = site.structure.factors(site.scale)
    b = [*site.structure.linear(), f.B][0] if site.routed else f.B
    b_onr = b.detach().unflatten(1, (f.heads, -1))
    return b_onr if site.mask is None else b_onr[:, :, site.live()]


def cosines(rows_nd: Tensor) -> list[list[float | None]]:
    """Pairwise cosines of rows, [N][N]; None beside a row of zeros."""
    lengths = rows_nd.norm(dim=1)
    table = (rows_nd @ rows_nd.T) / (lengths[:, None] * lengths).clamp_min(1e-300)
    zero = (lengths == 0).tolist()
    return [
        [None if zero[i] or zero[j] else max(-1.0, min(1.0, value)) for j, value in enumerate(row)]
        for i, row in enumerate(table.tolist())
    ]


def likeness(site: Site) -> float | None:
    """The mean cosine between the Bs of a routed site's heads; None while fewer than two of them are not 0."""
    table = cosines(head_factors(site).double().transpose(0, 1).flatten(1))
    pairs = [value for i, row in enumerate(table) for value in row[i + 1 :] if value is not None]
    return sum(pairs) / len(pairs) if pairs else None
