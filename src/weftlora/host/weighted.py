"""Adapters added up into one: Σ w ΔW of every module, as a plain adapter of scale 1.

    cat    the slots of all adapters side by side, each column of B̃ diag(g) times its adapter's weight: exact, ranks add up
    svd    the best sum of rank svd_rank: Σ w ΔW decomposed, the rest of its spectrum left out, which is told

peft's other ways average A and B apart, or prune them, which is no sum of what the adapters compute; they are refused by name.

One adapter alone is weighed for the length of a block by `rescale_adapter_scale`, and nothing is made for it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLayer, WeftLinear
from weftlora.adapted.updates import update_of
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import AdapterError, ConfigError, MergeError, suggest
from weftlora.settings import is_number, is_whole

WAYS = ("cat", "svd")


@dataclass(frozen=True)
class Sum:
    """The new adapter of one module: ΔW = B A."""

    a: Tensor  # [R, in] fp64
    b: Tensor  # [out, R]
    lost: float = 0.0  # ‖ΔW − Σ w ΔW‖²
    whole: float = 0.0  # ‖Σ w ΔW‖²


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the updates of all weftlora adapters in `model` for the length of a block, as peft's helper of this name does for stock
    LoRA's: 0 is the base, 1 what was trained. Routers see what they saw.

    Raises:
        ConfigError: `multiplier` is no finite number.
        AdapterError: the model has no weftlora adapter, or one is merged.
    """
    sites = [(layer, name) for layer in model.modules() if isinstance(layer, WeftLayer) for name in layer.weft_site]
    if not sites:
        raise AdapterError(
            "the model has no weftlora adapter to rescale: peft.helpers.rescale_adapter_scale is for stock LoRA's."
        )
    if not is_number(multiplier):
        raise ConfigError(f"multiplier={multiplier!r} is not a number to multiply an update by: use a finite one.")
    before = [layer.site(name).strength for layer, name in sites]
    try:
        for layer, name in sites:
            layer.set_scale(name, layer.site(name).strength * multiplier)
        yield
    finally:
        for (layer, name), strength in zip(sites, before, strict=True):
            layer.site(name).strength = strength


def check(config: Mapping[str, WeftConfig], adapters: Sequence[str], weights: Sequence[float], way: str) -> str:
    """The way that is taken: one adapter alone is scaled exactly.

    Raises:
        AdapterError: no such adapter.
        ConfigError: not one weight per adapter, or a way that is not offered.
        MergeError: an adapter whose update is no ΔW, or that trains modules in full.
    """
    if isinstance(adapters, str) or not adapters or len(weights) != len(adapters):
        raise ConfigError(
            f"add_weighted_adapter(adapters={adapters!r}, weights={weights!r}) wants two lists of one length: a weight per adapter."
        )
    if wrong := [weight for weight in weights if not is_number(weight) or not math.isfinite(weight)]:
        raise ConfigError(f"weights={list(weights)!r}: {wrong[0]!r} is not a weight; use finite numbers.")
    for name in adapters:
        if name not in config:
            raise AdapterError(f"there is no adapter {name!r} to add: {suggest(name, config)}")
        structure = config[name].structure
        if structure.no_closed_form is not None:
            raise MergeError(
                f"adapter {name!r} is {structure.method}, and {structure.no_closed_form}, so it cannot be added to others: use "
                "adapter_names=[...] to infer with each."
            )
        if config[name].bias != "none":
            raise MergeError(
                f"adapter {name!r} trains biases of the base (bias={config[name].bias!r}), which do not add up: add adapters without "
                "them."
            )
        if config[name].trainable_token_indices is not None:
            raise MergeError(
                f"adapter {name!r} trains tokens beside its modules, which cannot be added up: add adapters without them."
            )
    if len(adapters) == 1 or way == "cat":
        return "cat"
    if way != "svd":
        raise ConfigError(
            f"combination_type={way!r} does not add up what the adapters compute, and is not offered: use 'cat', which is "
            "exact, or 'svd'."
        )
    return way


def sums(
    layers: Sequence[WeftLayer], adapters: Sequence[str], weights: Sequence[float], way: str, rank: int | None
) -> dict[str, Sum]:
    """Module → its sum; a module that none of the adapters is on has none."""
    if rank is not None and not is_whole(rank, 1):
        raise ConfigError(f"svd_rank={rank!r} is not a rank: use a whole number from 1 up.")
    found = {}
    for layer in layers:
        if not isinstance(layer, WeftLinear):
            raise MergeError(
                f"{layer.module_name} holds experts, and adapters of experts are not added up: use them one by one."
            )
        here = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.weft_site]
        if not here:
            continue
        pairs = [(update_of(layer, name), weight) for name, weight in here]
        one = Sum(torch.cat([a for (a, _), _ in pairs]), torch.cat([b * weight for (_, b), weight in pairs], 1))
        kept = rank or max(layer.site(name).initial_rank for name, _ in here)
        found[layer.module_name] = one if way == "cat" else truncated(one, kept)
    return found


def truncated(one: Sum, rank: int) -> Sum:
    """The best sum of at most this rank, decomposed through the slots: nothing of size out × in is decomposed."""
    left, r_b = torch.linalg.qr(one.b)
    right, r_a = torch.linalg.qr(one.a.T)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T)
    k = min(rank, len(sigma))
    root = sigma[:k].sqrt()
    a, b = root[:, None] * (vt[:k] @ right.T), (left @ u[:, :k]) * root
    return Sum(a, b, float(sigma[k:].square().sum()), float(sigma.square().sum()))


def trained_in_full(model: nn.Module, adapters: Sequence[str]) -> list[tuple[ModulesToSaveWrapper, str]]:
    """The modules that one of the adapters trains in full, which its sum with others takes over, and whose they are.

    Raises:
        MergeError: two of the adapters train the same module.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            mine = [adapter for adapter in adapters if adapter in module.modules_to_save]
            if len(mine) > 1:
                raise MergeError(
                    f"adapters {mine[0]!r} and {mine[1]!r} each train {name} in full, and two of one module do not add up: "
                    "add adapters of which one at most trains it."
                )
            found += [(module, adapter) for adapter in mine]
    return found


def config_of(
    found: Mapping[str, Sum], targets: set[str], first: WeftConfig, saved: list[str] | None = None
) -> WeftConfig:
    """A plain adapter of scale 1 on exactly these modules, each of its rank, with the modules `saved` trained in full.

    Args:
        targets: the modules, of matrices of one that is adapted as a whole that one.
    """
    ranks = {name: len(one.a) for name, one in found.items()}
    r = max(ranks.values())
    own = {re.escape(name): rank for name, rank in ranks.items() if rank != r}
    return WeftConfig(
        r=r,
        lora_alpha=r,
        target_modules=targets,
        modules_to_save=saved,
        rank_pattern=own,
        alpha_pattern={**own},
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        inference_mode=first.inference_mode,
    )


def fill(layers: Sequence[WeftLayer], adapter_name: str, found: Mapping[str, Sum]) -> None:
    """Put the sums into the sites of the new adapter, and tell what a truncation has left out."""
    with torch.no_grad():
        for layer in layers:
            if adapter_name in layer.weft_site:
                factors = layer.site(adapter_name).structure.factors(1.0)
                factors.A.copy_(found[layer.module_name].a)
                factors.B.copy_(found[layer.module_name].b)
    lost, whole = (sum(getattr(one, part) for one in found.values()) for part in ("lost", "whole"))
    if lost > 1e-12 * whole:
        warnings.warn(
            f"adapter {adapter_name!r} leaves out {math.sqrt(lost / whole):.1%} of the sum (Frobenius norm, all modules): "
            "combination_type='cat' leaves out nothing, a larger svd_rank less.",
            stacklevel=4,
        )
