"""The ΔW of every site of a live adapter, taken apart into factors: weftlora adapters, and stock peft LoRA for comparison.

ΔW = B A + Ū diag(g) V̄ᵀ          A [r, in], B [out, r] with all scales in it; the second part only after a launch of Dash
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weftlora.adapted.experts import WeftExpertWeight
from weftlora.adapted.hooks import in_mode
from weftlora.adapted.layer import WeftLayer, WeftLinear
from weftlora.adapter.site import Site
from weftlora.errors import AdapterError
from weftlora.schedule.direction_ranking import MeanGate, factor_pair


@dataclass(frozen=True)
class Update:
    """ΔW of one site in fp64 factors.

    `phase`: "plain" (neither Dash nor LoRA-Init); "before the launch" or "launched" (Dash); "before the switch" or "switched"
    (LoRA-Init without Dash).
    """

    a: Tensor  # [R, in]
    b: Tensor  # [out, R]
    phase: str = "plain"
    up: Tensor | None = None  # [out, s]: Ū of the launched slots
    gain: Tensor | None = None  # [s]
    down: Tensor | None = None  # [s, in]: V̄ᵀ
    index: tuple[int, ...] = ()  # which core directions were launched, or started from, best first
    sigma: Tensor | None = None  # [s], as found then

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.b.shape[0], self.a.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """All of ΔW as one pair: A [R, in] and B [out, R]."""
        if self.up is None or self.gain is None or self.down is None:
            return self.a, self.b
        return torch.cat([self.a, self.down]), torch.cat([self.b, self.up * self.gain], 1)


def read_updates(
    model: nn.Module, adapter: str, inputs: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Update]:
    """The update of every site of adapter `adapter`, by the site's module name; nothing in the model changes.

    Args:
        inputs: batches (keyword arguments of a forward) over which the mean gate of HydraLoRA sites is measured.

    Raises:
        AdapterError: no such adapter, a merged one, one of another method than weftlora's and plain LoRA, or a routed one
            without `inputs`.
    """
    layers = {n: m for n, m in base_of(model).named_modules() if isinstance(m, BaseTunerLayer)}
    mine = {name: layer for name, layer in layers.items() if adapter in _names(layer)}
    if not mine:
        raise AdapterError(
            f"the model has no adapter {adapter!r} with a ΔW of A and B: it has {', '.join(adapter_names(model)[0]) or 'none'}; "
            "give a weftlora or plain LoRA adapter."
        )
    if merged := next((name for name, layer in mine.items() if layer.merged), None):
        raise AdapterError(
            f"{merged} has its adapter merged, so the original W is not available: call model.unmerge_adapter() first."
        )
    for name, layer in mine.items():
        if isinstance(layer, WeftLayer) and layer.site(adapter).outside:
            structure = layer.site(adapter).structure.choice
            raise AdapterError(
                f"{name} has {structure.method}, and {structure.no_closed_form}: directions are for an update of A and B."
            )
    gates = _mean_gates(model, mine, adapter, inputs)
    found: dict[str, Update] = {}
    for name, layer in mine.items():
        if isinstance(layer, WeftLayer):
            found |= {m.name: _weft_update(m.site, gates.get(m.name)) for m in layer.members(adapter)}
        else:
            found[name] = _lora_update(name, cast(LoraLayer, layer), adapter)
    return found


def adapter_names(model: nn.Module) -> tuple[list[str], list[str]]:
    """The adapters in `model` whose ΔW can be read, and those of them that are active, in the order they were added."""
    layers = [m for m in base_of(model).modules() if isinstance(m, BaseTunerLayer)]
    names = list(dict.fromkeys(name for layer in layers for name in _names(layer)))
    active = {name for layer in layers for name in layer.active_adapters}
    return names, [name for name in names if name in active]


def base_of(model: nn.Module) -> nn.Module:
    """The model that the host wraps, whose module names are those of the checkpoint."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_matrix(model: nn.Module, name: str) -> tuple[Tensor, str]:
    """W [out, in] of the module `name` as it is in memory, and its source as a `Member` has it."""
    module = module_of(model, name)
    if isinstance(module, WeftExpertWeight):
        return module.base_matrix(int(name.rpartition(".")[2])), module.base_source
    reader = module if isinstance(module, WeftLinear) else WeftLinear(_bare(module), name)
    return reader.base_matrix(), reader.base_source


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module that the site called `name` stands on; of an expert the one that carries the adapters of all experts."""
    base, (above, _, number) = base_of(model), name.rpartition(".")
    if number.isdigit() and isinstance(layer := base.get_submodule(above), WeftExpertWeight):
        return layer
    return base.get_submodule(name)


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether the module `name` keeps its weight as [in, out]."""
    module = module_of(model, name)
    if isinstance(module, WeftExpertWeight):
        return module.layout.transposed
    return isinstance(_bare(module), Conv1D)


def _bare(module: nn.Module) -> nn.Module:
    return cast(nn.Module, module.get_base_layer()) if isinstance(module, BaseTunerLayer) else module


def _names(layer: BaseTunerLayer) -> list[str]:
    if isinstance(layer, WeftLayer):
        return list(layer.weft_site)
    return list(layer.lora_A) if isinstance(layer, LoraLayer) else []


def _weft_update(site: Site, gate: MeanGate | None) -> Update:
    a, b, scale = factor_pair(site, gate)
    found = Update(a, scale * b, site.phase)
    extra = site.boost or site.start
    if extra is None or not extra.happened:
        return found
    chosen = [(each.index, each.sigma) for each in extra.chosen() if each.index is not None and each.sigma is not None]
    sigma = torch.tensor([value for _, value in chosen], dtype=a.dtype, device=a.device)
    found = replace(found, index=tuple(index for index, _ in chosen), sigma=sigma)
    if site.boost is None:
        return found
    s, slots = len(chosen), site.boost.slots(1.0, None, site.layer_gate)
    return replace(
        found,
        up=slots.up[:, :s].detach().double(),
        gain=slots.gate[:s].detach().double(),
        down=slots.down[:s].detach().double(),
    )


def update_of(layer: WeftLinear, adapter: str) -> tuple[Tensor, Tensor]:
    """(A [R, in], B [out, R]) of one unrouted adapter on one layer, fp64, with B A = ΔW: all of its slots, those of Dash last."""
    return _weft_update(layer.site(adapter), None).factors()


def _lora_update(name: str, layer: LoraLayer, adapter: str) -> Update:
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    if adapter in getattr(layer, "lora_variant", {}) or not (isinstance(a, nn.Linear) and isinstance(b, nn.Linear)):
        raise AdapterError(
            f"{name} has an adapter whose update is not B A alone (DoRA or another variant, or no linear module): "
            "directions are for weftlora adapters and plain LoRA."
        )
    return Update(a.weight.detach().double(), layer.scaling[adapter] * b.weight.detach().double())


class _Watched(MeanGate):
    """A mean gate over evaluation passes, which the launch's leaves out."""

    def __call__(self, omega: Tensor) -> None:
        self.add(omega)


def _mean_gates(
    model: nn.Module, layers: Mapping[str, BaseTunerLayer], adapter: str, inputs: Iterable[Mapping[str, Any]] | None
) -> dict[str, MeanGate]:
    """The mean gate of every routed site over `inputs`, in evaluation mode."""
    members = [m for layer in layers.values() if isinstance(layer, WeftLayer) for m in layer.members(adapter)]
    routed = {member.name: member for member in members if member.held.routed}
    gates: dict[str, MeanGate] = {name: _Watched(member.held) for name, member in routed.items()}
    if not gates:
        return {}
    if inputs is None:
        raise AdapterError(
            f"adapter {adapter!r} is routed, so its ΔW depends on the token: give weftlora.directions(..., inputs=[batch, ...]) to "
            "measure it at the mean gate."
        )
    meters = {name: routed[name].meter for name in gates}
    with in_mode(model, training=False), torch.no_grad():
        try:
            for name, gate in gates.items():
                routed[name].listen(gate)
            for batch in inputs:
                model(**batch)
        finally:
            for name, meter in meters.items():
                routed[name].listen(meter)
    return gates
