"""What an optimiser is told of an adapter: groups by the role of each tensor, and a word where somebody grouped by name.

    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-4, weight_decay=0.1, lora_plus_ratio=16))

peft's own helpers (`peft.optimizers`) look for tensors called `lora_A` and `lora_B` and for vectors. weftlora's are called otherwise,
on disk too: a server that goes by these names would compute something else from them without a word. So such a helper
misses A and B, takes u, v and gains for what it trains fast, and says nothing; the first step of its optimiser warns instead. So it
does of modules that had no gradient by then: what a model does not call trains nothing, silently.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from weftlora.adapted.layer import WeftLayer
from weftlora.adapted.sharing import shared_tensors
from weftlora.adapter.site import Site
from weftlora.errors import ConfigError
from weftlora.kernel import Role
from weftlora.schedule import schedule
from weftlora.settings import is_number

SHOWN = 8
"""Modules that a warning names."""
_UNDECAYED: frozenset[Role] = frozenset({"gain", "router"})


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    router_lr: float | None = None,
    vector_lr: float | None = None,
    gain_lr: float | None = None,
    tied_lr_multiplier: float = 1.0,
    lora_plus_ratio: float | None = None,
    freeze_down: bool = False,
) -> list[dict[str, Any]]:
    """Optimiser groups by what each tensor does: no decay on u, v, gains and routers, own rates where wanted.

    Args:
        model: an adapted model; what it trains beside the adapter (a head) goes with the factors, biases without decay.
        lr: rate of A and B and of everything whose own rate is None.
        weight_decay: for the matrices A, B and modules_to_save.
        router_lr, vector_lr, gain_lr: rates of the routers, of u and v, of the Dash gains.
        tied_lr_multiplier: factor on the rate of a shared A or B (first author's code may have had the number of layers).
        lora_plus_ratio: factor on the rate of every B (LoRA+, arXiv 2402.12354: 16), the shared one of Tied and all heads of
            Hydra too; None and 1 are none.
        freeze_down: freeze every A first (LoRA-FA), the shared one of Tied for its whole group; see `freeze`.

    Returns:
        Non-empty groups for any torch optimiser; each parameter once, tied ones too.

    Raises:
        ConfigError: nothing in the model is trained, a rate or the ratio is no number that works, or there is no B for the ratio.
    """
    if lora_plus_ratio is not None and not (is_number(lora_plus_ratio) and 0 < lora_plus_ratio < math.inf):
        raise ConfigError(
            f"lora_plus_ratio={lora_plus_ratio!r} is not a ratio of rates: use a positive number (16 is usual), or leave it out."
        )
    if not isinstance(freeze_down, bool):
        raise ConfigError(f"freeze_down={freeze_down!r} is neither true nor false: use one of the two.")
    for key, value in {
        "lr": lr,
        "weight_decay": weight_decay,
        "router_lr": 0.0 if router_lr is None else router_lr,
        "vector_lr": 0.0 if vector_lr is None else vector_lr,
        "gain_lr": 0.0 if gain_lr is None else gain_lr,
        "tied_lr_multiplier": tied_lr_multiplier,
    }.items():
        if not (is_number(value) and 0 <= value < math.inf):
            raise ConfigError(f"{key}={value!r} does not work in an optimiser: use a number from 0 up, such as 1e-4.")
    roles = {id(p): (site, name, role) for _, site in _sites(model) for name, p, role in site.roles()}
    if lora_plus_ratio not in (None, 1) and not any(
        p.requires_grad and roles.get(id(p), (None, "", None))[2] == "up" for p in model.parameters()
    ):
        raise ConfigError(
            f"lora_plus_ratio={lora_plus_ratio} is for the B of weftlora's adapters, and none is trained here: leave it out."
        )
    if freeze_down:
        freeze(model)
    rates = {"router": router_lr, "u": vector_lr, "v": vector_lr, "gain": gain_lr}
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    shared = {id(p) for p in shared_tensors(model)}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        site, name, role = roles.get(id(parameter), (None, "", None))
        own = role in _UNDECAYED
        rate = rates.get(name) if own else None
        if rate is None:
            rate = lr * (tied_lr_multiplier if id(parameter) in shared else 1.0)
            if role == "up" and lora_plus_ratio is not None:
                rate *= lora_plus_ratio
        decay = 0.0 if own or (role is None and parameter.dim() < 2) else weight_decay
        groups.setdefault((name if own else "factors", rate, decay), []).append(parameter)
        if site is not None:
            site.rates[name] = rate, decay
    if not groups:
        raise ConfigError("the model has no trainable parameters: make an adapter with get_peft_model first.")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (_, rate, decay), params in groups.items()]


def freeze(model: nn.Module) -> None:
    """Freeze every A of the model's adapters, as LoRA-FA does; a second time changes nothing, nor does it what is saved.

    Nothing else of an adapter needs the gradient of A: Dash and LoRA-Init rank directions on the values of B A, and LoRA-Init
    puts new ones into a frozen A as into a trained one; the scores of ALoRA are losses or gradients of gates, and a new slot
    has a fresh A in any case.

    Raises:
        ConfigError: no adapter has an A that could be trained, or one starts at zero and would stay so; then nothing is frozen.
    """
    found = [(site, name, p) for _, site in _sites(model) for name, p, role in site.roles() if role == "down"]
    for site, name, parameter in found:
        if parameter.requires_grad and site.structure.zero == name:
            raise ConfigError(
                f"freeze_down freezes {name}, which {site.structure.choice.label()} starts at zero, so the update would stay zero: "
                "train another factor as well (of Tied B, u or v: train='tl6'), or leave freeze_down out."
            )
    if not found:
        raise ConfigError("freeze_down freezes the A of weftlora's adapters, and none is trained here: leave it out.")
    for _, _, parameter in found:
        parameter.requires_grad_(False)
        parameter.grad = None


@dataclass(eq=False)
class Watch:
    """Looks, at the first step of an optimiser, at the groups that one adapter's tensors stand in, and at which of them have
    gradients; hangs on its first site."""

    adapter_name: str
    names: list[str]
    sites: list[Site]

    def __post_init__(self) -> None:
        schedule.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        schedule.watch(self)  # a copy of the model is looked after by itself

    def first_step(self, optimizer: Optimizer) -> None:
        """Warn once where groups were made by somebody who went by names, and of modules that the model does not call."""
        if idle := self._without_gradient(optimizer):
            warnings.warn(
                f"{len(idle)} of the {len(self.sites)} modules of adapter {self.adapter_name!r} had no gradient in the first step: "
                f"{', '.join(idle[:SHOWN])}{f' and {len(idle) - SHOWN} more' if len(idle) > SHOWN else ''}. The model did not call "
                "them, or reads their weight instead, so their adapter stays as it is: leave them out with exclude_modules (experts "
                "that no token reached may come later).",
                stacklevel=2,
            )
        if (problem := self._problem(optimizer)) is not None:
            warnings.warn(
                f"adapter {self.adapter_name!r} is trained by an optimiser that {problem}: make its groups with "
                "weftlora.param_groups(model, lr=..., lora_plus_ratio=..., freeze_down=...), see docs/hosts.md, "
                '"peft\'s own optimisers".',
                stacklevel=2,
            )

    def _without_gradient(self, optimizer: Optimizer) -> list[str]:
        """The modules none of whose trained tensors has a gradient; [] where no module's has, as these are kept elsewhere then."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        reached = {}
        for name, site in zip(self.names, self.sites, strict=True):
            own = [p for _, p, _ in site.roles() if p.requires_grad and id(p) in held]
            if own:
                reached[name] = any(p.grad is not None for p in own)
        return [name for name, was in reached.items() if not was] if any(reached.values()) else []

    def _problem(self, optimizer: Optimizer) -> str | None:
        of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        held = [
            (role, _rate(of[id(p)]), float(of[id(p)].get("weight_decay", 0.0)), site.rates.get(name))
            for site in self.sites
            for name, p, role in site.roles()
            if id(p) in of and p.requires_grad
        ]
        if not held:
            return None
        if any(kind.__module__.startswith("peft.optimizers.") for kind in type(optimizer).__mro__):
            return "looks for the names lora_A and lora_B, which weftlora's tensors do not have, so it treats all alike"
        if _is_ours(held):
            return None
        ups, gains = ([(rate, decay) for r, rate, decay, _ in held if r == role] for role in ("up", "gain"))
        if ups and gains and {rate for rate, _ in ups} != {rate for rate, _ in gains}:
            return (
                f"gives its up factors (B) the rate {_few(ups, 0)} and its gains (u, v, those of Dash) {_few(gains, 0)}, in "
                "groups that weftlora did not make"
            )
        if ups and gains and min(decay for _, decay in ups) < max(decay for _, decay in gains):
            return (
                f"decays its gains (u, v, those of Dash) by {_few(gains, 1)} and its up factors (B) by {_few(ups, 1)}, in groups that "
                "weftlora did not make"
            )
        fastest = max(rate for _, rate, _, _ in held)
        idle = max((_rate(group) for group in optimizer.param_groups if not group["params"]), default=0.0)
        if idle > fastest:
            return (
                f"has an empty group of rate {idle:g} and trains all of the adapter at {fastest:g} or less, as helpers do that "
                "look for tensors called lora_B"
            )
        return None


def watch(adapter_name: str, layers: Sequence[WeftLayer]) -> None:
    """Look after the first optimiser steps on an adapter that has just been put on these layers."""
    sites = [layer.site(adapter_name) for layer in layers]
    if sites:
        sites[0].watch = Watch(adapter_name, [layer.module_name for layer in layers], sites)


def _sites(model: nn.Module) -> Iterator[tuple[str, Site]]:
    for layer in model.modules():
        if isinstance(layer, WeftLayer):
            for name in layer.weft_site:
                yield name, layer.site(name)


def _rate(group: dict[str, Any]) -> float:
    """The rate of a group before a scheduler or a warm-up touched it."""
    return float(group.get("initial_lr", group["lr"]))


def _is_ours(held: Sequence[tuple[Role | None, float, float, tuple[float, float] | None]]) -> bool:
    """Whether the groups are those that `param_groups` made last, at these rates or all at one multiple of them."""
    if any(made is None for *_, made in held):
        return False
    pairs = {(rate, made[0]) for _, rate, _, made in held if made is not None}
    same = all(math.isclose(a * d, b * c, rel_tol=1e-6) for a, c in pairs for b, d in pairs)
    return same and all(decay == made[1] for _, _, decay, made in held if made is not None)


def _few(values: Sequence[tuple[float, float]], part: int) -> str:
    return " and ".join(f"{value:g}" for value in sorted({pair[part] for pair in values}))
