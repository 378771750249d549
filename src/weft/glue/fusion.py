"""Which adapted linears one node can span under an unmodified model, and the hand-over between their forwards.

InputGroup    q, k, v of one attention, gate and up of one MLP: the first of them that is called computes all of them, and the
              others find their result when they are called with the very same tensor. Nothing is kept after the last.
GatedBlock    an MLP whose forward is, word for word, down(act(gate(x)) * up(x)): one node computes it.

Both step aside, per forward, for whatever they cannot do: another base than a plain frozen Linear, hooks on a module
inside, several active adapters, gates per part of the batch, `torch.compile` (which fuses by itself, and in which tensors have no
identity), `WEFT_REFERENCE=1`, `WEFT_GROUPS=0`, `WEFT_MLP=0`. Values do not depend on it.
"""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from weft.glue.modes import all_watched, watched
from weft.glue.sharing import QKV_FAMILIES, same_input
from weft.kernel import Linear, current, draw, gated_mlp, linears

if TYPE_CHECKING:
    from weft.glue.layer import WeftLinear

GATE_UP: tuple[tuple[str, str], ...] = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
MISSES = 2  # results nobody came for, after which a group is given up

logger = logging.getLogger(__name__)


class InputGroup:
    """Adapted linears of one parent that read one input. Belongs to no module tree; its members hold it."""

    def __init__(self, members: Sequence[WeftLinear]):
        self.members = list(members)
        self.misses = 0
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members, "misses": self.misses}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def forget(self) -> None:
        """Drop what was computed for members that have not been called, and with it the graph that it holds."""
        self._waiting = Waiting(None, {})
        self._masks: dict[tuple[str, float], tuple[Seen, Tensor]] = {}
        self._called: set[WeftLinear] = set()

    @property
    def waits(self) -> bool:
        """Whether results are kept for members that have not been called yet."""
        return bool(self._waiting.results)

    def called(self, layer: WeftLinear) -> None:
        """Note a forward of `layer`; its second one begins another pass, with masks of its own, also where x is the same."""
        if layer in self._called:
            self._masks, self._called = {}, set()
        self._called.add(layer)

    def fetch(self, layer: WeftLinear, x: Tensor) -> Tensor | None:
        """The output of `layer` on x if another member has computed it, and nothing that it depends on has changed since."""
        waiting = self._waiting  # read once: another thread may put its own there at any time
        found = waiting.results.pop(layer, None) if _is(x, waiting.seen) else None
        return found.output if found is not None and found.stamp == _stamp(layer, found.factors) else None

    def output(self, layer: WeftLinear, x: Tensor, read: Tensor) -> Tensor | None:
        """The output of `layer` on x if the group can compute it, else None. `read` is x as the bases take it."""
        if layer not in self.members:  # a copy that nn.DataParallel made; its group is still that of the original
            return None
        self._note_miss()
        if self.misses >= MISSES or all_watched():
            return None
        jobs: list[Linear] = []
        for member in self.members:
            job = member.only_job(x, read)
            if job is None or (jobs and job[2].dropout != jobs[0][2].dropout):
                return None
            jobs.append(job)
        results = {
            member: Result(
                y, (job[2].factors.A, job[2].factors.B), _stamp(member, (job[2].factors.A, job[2].factors.B))
            )
            for member, job, y in zip(self.members, jobs, linears(read, jobs), strict=True)
        }
        own = results.pop(layer).output
        self._waiting = Waiting(_seen(x), results)
        return own

    def mask(self, x: Tensor, read: Tensor, adapter_name: str, p: float) -> Tensor:
        """The one mask that this adapter's sites on all members read x through."""
        seen, bits = self._masks.get((adapter_name, p), (None, None))
        if bits is None or not _is(x, seen):
            bits = draw(read, p)
            self._masks[adapter_name, p] = _seen(x), bits
        return bits

    def _note_miss(self) -> None:
        """Drop what was not fetched; a model that does so again and again does not read one input here."""
        if self.waits and torch._C._current_graph_task_id() == -1:
            self.misses += 1
            if self.misses == MISSES:
                names = ", ".join(member.module_name for member in self.members)
                logger.info("%s do not read one input, so each is computed by itself.", names)
        self._waiting = Waiting(None, {})


Seen = tuple["weakref.ref[Tensor]", int, bool] | None


class Result(NamedTuple):
    """What one member would give, computed from these factors, and what it depends on beside the input; see `_stamp`."""

    output: Tensor
    factors: tuple[Tensor, ...]
    stamp: tuple[object, ...]


class Waiting(NamedTuple):
    """Results for the members that have not been called yet, of the one input that was seen."""

    seen: Seen
    results: dict[WeftLinear, Result]


def _stamp(layer: WeftLinear, factors: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What a member's output on a given input depends on: values of its factors, its adapter, its mode, autocast."""
    versions = (0 if t.is_inference() else t._version for t in factors)
    device = factors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (layer.has_one_adapter, *layer.active_adapters, layer.training, autocast, *versions)


def _seen(x: Tensor) -> Seen:
    return weakref.ref(x), 0 if x.is_inference() else x._version, torch.is_grad_enabled()


def _is(x: Tensor, seen: Seen) -> bool:
    """Whether x is the very tensor that was seen, unchanged since, and gradients are wanted now as then."""
    if seen is None or seen[0]() is not x or seen[2] != torch.is_grad_enabled():
        return False
    return x.is_inference() or x._version == seen[1]


def fuse(model: nn.Module) -> None:
    """Find the groups and gated MLPs among the adapted linears of `model`, anew after every change of adapters."""
    from weft.glue.layer import WeftLinear

    for name, parent in model.named_modules():
        children = {last: child for last, child in parent.named_children() if isinstance(child, WeftLinear)}
        for child in children.values():
            child.group = None
        for names in _groups(name, list(children)):
            for members in _of_one_width([children[last] for last in names]):
                group = InputGroup(members)
                for member in members:
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
        group = getattr(module, "group", None)
        if isinstance(group, InputGroup):
            group.forget()


def _of_one_width(layers: Sequence[WeftLinear]) -> list[list[WeftLinear]]:
    """The layers by their numbers of input features, two or more each: what differs in it reads another tensor."""
    widths = [getattr(layer.get_base_layer(), "in_features", None) for layer in layers]
    found = [[layer for layer, w in zip(layers, widths, strict=True) if w == width] for width in dict.fromkeys(widths)]
    return [members for members in found if len(members) > 1]


def _groups(parent: str, lasts: list[str]) -> list[list[str]]:
    """Names of children of `parent` that read one input, in the order of the families, two or more each."""
    found = []
    for family in QKV_FAMILIES:
        for roles in {same_input(parent, last) for last in family if last in lasts}:
            found.append([last for last in family if last in lasts and last in (roles or ())])
    found += [[last for last in pair if last in lasts] for pair in GATE_UP]
    return [names for names in found if len(names) > 1]


# ---------------------------------------------------------------------- gated MLPs

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
    if hasattr(forward, "__wrapped__") or not source.startswith(
        "def "
    ):  # decorated: this is the source of what is inside
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
    found = _mlp_layers(mlp)
    if found is None:
        return None
    activation, layers = found
    for layer in layers:
        if layer.group is not None:
            layer.group.called(layer)
    read = layers[0].cast_input(x)
    jobs = [job for layer in layers if (job := layer.only_job(x, read)) is not None]
    if len(jobs) < len(NAMES) or jobs[0][2].dropout != jobs[1][2].dropout:
        return None
    return gated_mlp(read, activation, *jobs)


def _mlp_layers(mlp: Any) -> tuple[str, list[WeftLinear]] | None:
    """The activation's name and gate, up and down, if one node may stand for this MLP as things are."""
    from weft.glue.layer import WeftLinear

    activation = activation_of(mlp.act_fn)
    if activation is None or not current().mlp or all_watched() or watched(mlp.act_fn):
        return None
    if type(mlp).own_forward is not mlp.own_class.forward:  # someone has put another one there since
        return None
    layers = [layer for name in NAMES if isinstance(layer := getattr(mlp, name), WeftLinear) and not watched(layer)]
    return (activation, layers) if len(layers) == len(NAMES) and _all_single(layers) else None


def _all_single(layers: Sequence[WeftLinear]) -> bool:
    return all(layer.has_one_adapter and layer.why_not() is None for layer in layers)


# ---------------------------------------------------------------------- which node computes what


def nodes(model: nn.Module) -> dict[str, str]:
    """For every adapted linear of `model`, by its name, what computes it in the next forward outside of torch.compile.

    "mlp", "group" or "linear": a node that spans its gated MLP, the linears that read its input, or itself. Otherwise
    "module: " and the reason why its base module is called and the update added to what it gives.
    """
    from weft.glue.layer import WeftLinear

    layers = {name: module for name, module in model.named_modules() if isinstance(module, WeftLinear)}
    whole: set[WeftLinear] = set()
    for parent in model.modules():
        if isinstance(parent, Gated) and (spanned := _mlp_layers(parent)) is not None:
            whole.update(spanned[1])
    return {name: "mlp" if layer in whole else _node_of(layer) for name, layer in layers.items()}


def _node_of(layer: WeftLinear) -> str:
    group, reason = layer.group, layer.why_not()
    if reason is not None:
        return f"module: {reason}"
    together = current().groups and not all_watched() and group is not None and group.misses < MISSES
    return "group" if together and group is not None and _all_single(group.members) else "linear"
