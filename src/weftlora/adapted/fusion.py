"""Which adapted modules of an unmodified model are computed as one node: groups that read one input, and gated MLPs.

    q, k, v of an attention; gate and up of an MLP      one input        `weftlora.adapted.input_groups`
    down(act(gate(x)) * up(x))                          a gated MLP      where a forward is, word for word, this

Both step aside, per forward, for whatever they cannot do: another base than a plain frozen Linear, hooks on a module
inside, several active adapters, gates per part of the batch, `torch.compile` (which fuses by itself, and in which tensors have no
identity), `WEFT_REFERENCE=1`, `WEFT_GROUPS=0`, `WEFT_MLP=0`. Values do not depend on it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from weftlora.adapted.hooks import all_watched, watched
from weftlora.adapted.input_groups import MISSES, input_groups, only_adapters
from weftlora.adapted.layer import WeftLinear
from weftlora.kernel import current, gated_mlp

CANONICAL = re.compile(
    r"(?:(?P<name>\w+)=)?self\.down_proj\(self\.act_fn\(self\.gate_proj\((?P<x>\w+)\)\)\*self\.up_proj\((?P=x)\)\)"
)
NAMES = ("gate_proj", "up_proj", "down_proj")


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether the forward of this module's class is down_proj(act_fn(gate_proj(x)) * up_proj(x)), and nothing else."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in (*NAMES, "act_fn")):
        return False
    forward = (module.own_class if isinstance(module, Gated) else type(module)).forward
    try:
        source = inspect.getsource(forward).lstrip()
    except (OSError, TypeError):
        return False
    decorated = hasattr(forward, "__wrapped__") or not source.startswith("def ")
    if decorated:  # this is the source of what is inside
        return False
    head, _, body = source.partition(":\n")
    lines = [re.sub(r"\s|#.*", "", line) for line in body.splitlines()]
    whole = ";".join(line for line in lines if line)
    given = re.search(r"self,\s*(\w+)", head)
    match = CANONICAL.match(whole.removeprefix("return"))
    if match is None or given is None or match["x"] != given[1]:
        return False
    rest = (whole.removeprefix("return"))[match.end() :]
    return rest == (f";return{match['name']}" if match["name"] else "")


def activation_of(act: nn.Module) -> str | None:
    """The kernel's name of an activation module; None if it has none."""
    if type(act) in (nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU)):
        return "silu"
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    inner = getattr(act, "act", None)  # transformers' two hold the function they call, in C or, on request, in Python
    if type(act) is activations.GELUTanh and getattr(inner, "func", None) is F.gelu:
        return "gelu_tanh"
    return "gelu" if type(act) is activations.GELUActivation and inner is F.gelu else None


class Gated:
    """Put before the class of a gated MLP: its forward is one node where that can be, else the class's own.

    The class of the instance is changed, and not its attribute `forward`: a bound method would take the copies that
    nn.DataParallel makes back to the module they were made from.
    """

    own_class: type[nn.Module]
    own_forward: Callable[..., Tensor]  # as it was when its source was read

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not (kwargs or torch.compiler.is_compiling()):
            y = _gated_output(self, args[0])
            if y is not None:
                return y
        return cast(Tensor, super().forward(*args, **kwargs))  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (_, *rest), *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_made_again, (self.own_class, *rest), *state)


_gated: dict[type, type[nn.Module]] = {}


def gated_class(own: type[nn.Module]) -> type[nn.Module]:
    """`own` with `Gated` before it, under its own name; one class for each."""
    if own not in _gated:
        names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
        _gated[own] = type(own.__name__, (Gated, own), {**names, "own_class": own, "own_forward": own.forward})
    return _gated[own]


def _made_again(own: type[nn.Module], *args: Any) -> nn.Module:
    made = gated_class(own)
    return made.__new__(made, *args)


def _gated_output(mlp: Any, x: Tensor) -> Tensor | None:
    found = mlp_layers(mlp)
    if found is None:
        return None
    activation, layers, adapters = found
    for layer in layers:
        if layer.group is not None:
            layer.group.called(layer)
    read = layers[0].cast_input(x)
    jobs = [layer.job(adapter, x, read) for layer, adapter in zip(layers, adapters, strict=True)]
    gate, up, down = jobs
    if gate is None or up is None or down is None or gate[2].dropout != up[2].dropout:
        return None
    return gated_mlp(read, activation, gate, up, down)


def mlp_layers(mlp: Any) -> tuple[str, list[WeftLinear], list[str]] | None:
    """The activation's name, gate, up and down and the adapter of each, if one node may stand for this MLP as things are."""
    activation = activation_of(mlp.act_fn)
    if activation is None or not current().mlp or all_watched() or watched(mlp.act_fn):
        return None
    if type(mlp).own_forward is not mlp.own_class.forward:  # someone has put another one there since
        return None
    layers = [layer for name in NAMES if isinstance(layer := getattr(mlp, name), WeftLinear) and not watched(layer)]
    adapters = only_adapters(layers) if len(layers) == len(NAMES) else None
    return None if adapters is None else (activation, layers, adapters)


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
