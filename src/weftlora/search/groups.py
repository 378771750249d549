"""The groups of sites that a search weighs, their gates, and what one backward says about them.

    h_l = gate_l ∂R/∂gate_l = Σ_m ⟨∇_{w_m} R, w_m⟩       over the modules m of group l

for any factor w that the update of a site is linear in and that no other group has: B of Plain and Hydra; of Tied v, else
u (its B is shared by all blocks and would give only the sum over them). Where a group has no such factor, its gate becomes
an explicit leaf of the graph, which costs one gradient per site. Both hold under gradient checkpointing of either kind,
accumulation and quantised bases, because all they read is `.grad`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLayer
from weftlora.adapted.targets import Blocks
from weftlora.adapted.updates import base_of
from weftlora.adapter.shards import number
from weftlora.adapter.site import Site
from weftlora.errors import ConfigError


@dataclass(frozen=True)
class Group:
    """What one scalar weighs: the sites of a block, or one site. `block` is None for a module outside of all blocks."""

    name: str
    block: int | None
    sites: dict[str, Site]


def groups_of(model: nn.Module, adapter: str, granularity: str) -> list[Group]:
    """The groups of an adapter that own a site, in the order of the model. Raises ConfigError if it has no layer gates."""
    base = base_of(model)
    blocks = Blocks(base)
    found: dict[str, Group] = {}
    for layer in base.modules():
        if not isinstance(layer, WeftLayer) or adapter not in layer.weft_site:
            continue
        site, block = layer.site(adapter), blocks.of(layer.module_name)
        if site.layer_gate is None:
            raise ConfigError(
                f"adapter {adapter!r} has no layer gates to search with: give its config layers=weftlora.Search()."
            )
        name = layer.module_name if granularity == "module" or block is None else block
        number = None if block is None else blocks.number[block]
        found.setdefault(name, Group(name, number, {})).sites[layer.module_name] = site
    if not found:
        raise ConfigError(f"the model has no weftlora adapter {adapter!r} to search with.")
    return list(found.values())


class Gates:
    """The layer gates of all groups, [N] fp64, written into every site's buffer.

    `factors[l]` are the parameters that h_l is read from; None where explicit leaves are needed.
    """

    def __init__(self, groups: Sequence[Group]):
        self.groups = list(groups)
        shared = shared_between([group.sites.values() for group in self.groups])
        factors = [_linear_factors(group, shared) for group in self.groups]
        separable = all(found is not None for found in factors)
        self.factors = cast("list[list[nn.Parameter]]", factors) if separable else None
        self._own = _own(self.groups)
        self._leaves: list[Tensor] = []
        for site in self.sites:  # a host may have cast the buffer to 16 bits with the rest of the adapter
            site.layer_gate = torch.ones((), dtype=torch.float64, device=_device(site))
        self.write(torch.ones(len(self.groups), dtype=torch.float64))

    @property
    def sites(self) -> list[Site]:
        """All sites, group by group."""
        return [site for group in self.groups for site in group.sites.values()]

    def write(self, gate_n: Tensor) -> None:
        """Put the gates [N] into the buffers, in place."""
        self.gate_n = gate_n.detach().clone()
        for gate, group in zip(gate_n.detach(), self.groups, strict=True):
            for site in group.sites.values():
                assert site.layer_gate is not None
                site.layer_gate.copy_(gate)

    @contextmanager
    def graphed(self, gate_n: Sequence[Tensor]) -> Iterator[None]:
        """For the length of the block the sites' gates are these scalars, with whatever graph they have."""
        before = [(site, site.layer_gate) for site in self.sites]
        try:
            for gate, group in zip(gate_n, self.groups, strict=True):
                for site in group.sites.values():
                    site.layer_gate = gate.to(_device(site))
            yield
        finally:
            for site, buffer in before:
                site.layer_gate = buffer

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around backwards after which `read` is called: makes the gates leaves of the graph where that is needed."""
        if self.factors is not None:
            yield
            return
        device = _device(self.sites[0])
        self._leaves = [gate.to(device).requires_grad_() for gate in self.gate_n.clone()]
        with self.graphed(self._leaves):
            yield

    def read(self) -> Tensor:
        """h [N] fp64 from the gradients of the backwards since `.grad` was empty; a group without a gradient has 0."""
        parts: Sequence[Sequence[Tensor]] = self.factors or [[leaf] for leaf in self._leaves]
        h = [sum((_inner(p) for p in found), torch.zeros((), dtype=torch.float64)) for found in parts]
        return torch.stack([value.to(h[0].device) for value in h]).cpu()

    def gradient_norms(self, gradients: dict[int, Tensor]) -> Tensor:
        """‖∇‖ [N] fp64 over the parameters that a group has to itself; `gradients` by the parameter's id."""
        squares = [
            sum(number(gradients[i].double().square().sum()) for i in own if i in gradients) for own in self._own
        ]
        return torch.tensor(squares, dtype=torch.float64).sqrt()


def _device(site: Site) -> torch.device:
    return next(itertools.chain(site.parameters(), site.buffers())).device


def _own(groups: Sequence[Group]) -> list[list[int]]:
    """By id, the parameters that each group has to itself; in order, so that sums over them repeat."""
    shared = shared_between([group.sites.values() for group in groups])
    held = [dict.fromkeys(id(p) for site in group.sites.values() for p in site.parameters()) for group in groups]
    return [[i for i in own if i not in shared] for own in held]


def _inner(p: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros((), dtype=torch.float64)
    return torch.tensor(number((p.grad.double() * p.detach().double()).sum()), dtype=torch.float64)


def shared_between(groups: Sequence[Collection[Site]]) -> set[int]:
    """By id, the tensors that more than one of these groups of sites uses: A and B of tied sites, and where q, k and v count as
    one module their u, too."""
    used = [{id(value) for site in sites for value in site.structure.shared().values()} for sites in groups]
    counts = Counter(i for each in used for i in each)
    return {i for i, count in counts.items() if count > 1}


def own_factors(site: Site, shared: Collection[int]) -> list[Tensor]:
    """The factors that the site's update is linear in and that no other group has, trained or not: B; of Tied v and u.

    `shared` are those that another group has, as `shared_between` gives them.
    """
    return [value for value in site.structure.linear() if id(value) not in shared]


def _linear_factors(group: Group, shared: Collection[int]) -> list[nn.Parameter] | None:
    """One trained parameter per site that its update is linear in, shared ones once; None if a site has none."""
    found: dict[int, nn.Parameter] = {}
    for site in group.sites.values():
        trained = [p for p in own_factors(site, shared) if isinstance(p, nn.Parameter) and p.requires_grad]
        if not trained or site.boost is not None or site.start is not None:
            return None
        found[id(trained[0])] = trained[0]
    return list(found.values())
