"""What the routers did in a forward pass: load-balance term and usage figures, on request only.

    with weftlora.routing(model) as routing:
        loss = model(**batch).loss
    loss = loss + routing.balance_loss(batch["attention_mask"])

Outside such a block nothing is recorded and a forward has no side effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLinear
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
        if together and torch.is_grad_enabled() and world() > 1:
            terms = [weight * value for weight, value in _over_processes(counted)]
        else:
            terms = [weight * balance_loss(omega) for weight, omega in counted if len(omega)]
        if not counted:
            raise ConfigError(
                "no routed module with balance > 0 ran inside weftlora.routing(model): put the forward inside the block."
            )
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
        if not isinstance(layer, WeftLinear):
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
