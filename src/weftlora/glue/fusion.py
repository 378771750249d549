"""Which adapted linears one node spans under an unmodified model: groups of one input, gated MLPs.

Both step aside, per forward, for whatever they cannot do: another base than a plain frozen Linear, hooks on a module
inside, several active adapters, gates per part of the batch, `torch.compile` (which fuses by itself, and in which tensors have no
identity), `WEFT_REFERENCE=1`, `WEFT_GROUPS=0`, `WEFT_MLP=0`. Values do not depend on it.
"""

from __future__ import annotations

from torch import nn

from weftlora.glue.gated import Gated, gated_class, is_gated_mlp, mlp_layers
from weftlora.glue.groups import MISSES, input_groups, only_adapters
from weftlora.glue.layer import WeftLinear
from weftlora.glue.modes import all_watched
from weftlora.kernel import current


def fuse(model: nn.Module) -> None:
    """Find the groups and gated MLPs among the adapted linears of `model`, anew after every change of adapters."""
    for name, parent in model.named_modules():
        children = {last: child for last, child in parent.named_children() if isinstance(child, WeftLinear)}
        for child in children.values():
            child.group = None
        for group in input_groups(name, children):
            for member in group.members:
                member.group = group
        if "forward" not in vars(parent) and is_gated_mlp(parent) and not isinstance(parent, Gated):
            setattr(parent, "__class__", gated_class(type(parent)))  # noqa: B010 (a type checker takes an assignment for a new type)


def unfuse(model: nn.Module) -> None:
    """Give gated MLPs their own class back."""
    for module in model.modules():
        if isinstance(module, Gated):
            setattr(module, "__class__", module.own_class)  # noqa: B010


def forget(model: nn.Module) -> None:
    """Drop what groups of `model` keep for members that will not be called, after a forward that broke off."""
    for module in model.modules():
        if isinstance(module, WeftLinear) and module.group is not None:
            module.group.forget()


def nodes(model: nn.Module) -> dict[str, str]:
    """For every adapted linear of `model`, by its name, what computes it in the next forward outside of torch.compile.

    "mlp", "group" or "linear": a node that spans its gated MLP, the linears that read its input, or itself. Otherwise
    "module: " and the reason why its base module is called and the update added to what it gives.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WeftLinear)}
    whole: set[WeftLinear] = set()
    for parent in model.modules():
        if isinstance(parent, Gated) and (spanned := mlp_layers(parent)) is not None:
            whole.update(spanned[1])
    return {name: "mlp" if layer in whole else _node_of(layer) for name, layer in layers.items()}


def _node_of(layer: WeftLinear) -> str:
    group, reason = layer.group, layer.why_not()
    if reason is not None:
        return f"module: {reason}"
    together = current().groups and not all_watched() and group is not None and group.misses < MISSES
    return "group" if together and group is not None and only_adapters(group.members) else "linear"
