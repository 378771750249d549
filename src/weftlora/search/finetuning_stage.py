"""The stage after the search: a fresh adapter on the selected blocks, or the searched one with α̂ folded into it.

    restart    y = x Wᵀ + b + h B̃ᵀ                 on the selected blocks, from the adapter's own start; no α̂ anywhere
    continue   w ← α̂_l w                           w: B of Plain and Hydra, v (else u) of Tied: the same function without gates

Where Tied has neither v nor a u that no other group uses, α̂ stays as a fixed gate of every site (`Only(gated=True)`).
Unselected blocks have no adapter in either: what the searched adapter learned there is dropped.

Source: the released code restarts; continuing is ours.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLayer
from weftlora.adapted.updates import base_of
from weftlora.adapter.site import Site
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import ConfigError
from weftlora.host.stock_lora import replace_module
from weftlora.search.groups import own_factors, shared_between
from weftlora.search.selection import Selection


def second_stage(
    model: PeftModel,
    selection: Selection,
    finetune: Literal["restart", "continue"] | None = None,
    adapter: str = "default",
) -> PeftModel:
    """The model to train after a search, in place of the searched one, which is used up.

    Args:
        model: the searched model.
        finetune: "restart" or "continue"; None takes what the search says.

    Returns:
        "restart": the base with a fresh adapter; its start is drawn from torch's global generator. "continue": the same model
        with sites on the selected blocks only and no search left.

    Raises:
        ConfigError: the adapter is not one that was searched, or a restart would drop other adapters of the model.
    """
    config = model.peft_config.get(adapter)
    search = config.layers.search if isinstance(config, WeftConfig) else None
    if not isinstance(config, WeftConfig) or search is None:
        raise ConfigError(f"adapter {adapter!r} was not searched: give the model that weftlora.search_layers trained.")
    finetune = finetune or search.finetune
    if finetune == "continue":
        _continue(model, selection, adapter)
        return model
    if finetune != "restart":
        raise ConfigError(f"finetune={finetune!r}: use 'restart' or 'continue'.")
    if others := sorted(set(model.peft_config) - {adapter}):
        raise ConfigError(
            f"finetune='restart' takes all adapters off the base, {', '.join(others)} too: save and delete them first "
            "(model.delete_adapter), or use finetune='continue'."
        )
    fresh = copy.deepcopy(config)
    fresh.layers = selection.layers
    return cast(PeftModel, get_peft_model(unload(model), fresh, adapter_name=adapter))


def unload(model: PeftModel) -> nn.Module:
    """The base as it was before it was adapted: peft would leave the searched copy of a head that is trained in full."""
    wrapped = [(name, m) for name, m in base_of(model).named_modules() if isinstance(m, ModulesToSaveWrapper)]
    originals = {name: m.original_module for name, m in wrapped}
    base: nn.Module = model.unload()
    for name, module in originals.items():
        replace_module(base, name, module)
    return base


def _continue(model: PeftModel, selection: Selection, adapter: str) -> None:
    kept = {name: c for c in selection.chosen for name in c.modules}
    base = base_of(model)
    layers = {m.module_name: m for m in base.modules() if isinstance(m, WeftLayer) and adapter in m.weft_site}
    if missing := sorted(set(kept) - set(layers)):
        raise ConfigError(
            f"the selection names {missing[0]}, where the model has no adapted module: use the selection of this search."
        )
    for name, layer in layers.items():
        if name not in kept:
            active = layer._active_adapter
            layer._active_adapter = []  # or peft would switch another adapter on here, and train it
            layer.delete_adapter(adapter)
            layer._active_adapter = active
            if not layer.weft_site:
                replace_module(base, name, layer.get_base_layer())
    groups = [[layers[name].site(adapter) for name in c.modules] for c in selection.chosen]
    folds = _fold(groups)
    for site in (site for group in groups for site in group):
        site.awaits_search = False
    config = cast(WeftConfig, model.peft_config[adapter])
    config.layers = replace(selection.layers, gated=not folds)
    tuner = model.base_model
    tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name in kept]


def _fold(groups: list[list[Site]]) -> bool:
    """Multiply every gate into a factor that its group has to itself; False where a site has none: all keep their gates then."""
    shared = shared_between(groups)
    gates: dict[int, Tensor] = {}
    factors: dict[int, Tensor] = {}
    sites = [site for group in groups for site in group]
    for site in sites:
        factor = next(iter(own_factors(site, shared)), None)
        if factor is None:
            return False
        if site.layer_gate is not None:
            factors[id(factor)], gates[id(factor)] = factor, site.layer_gate  # once, where sites of a group share it
    with torch.no_grad():
        for key, factor in factors.items():
            factor.copy_(factor.double() * gates[key].double())
    for site in sites:
        site.register_buffer("layer_gate", None)
    return True
