"""Experts of a mixture whose matrices are fused parameters [E, out, in]: which there are, their layouts, and what adapts them.

    W [E, out, in]      as most models keep them          W [E, in, out]      transposed (gpt-oss)
    gate_up_proj        gate over up, or each in turn (interleaved): rows of W, so ΔW has them in W's own order
    b [E, out]          biases, which stay as they are

An adapter of such a parameter is a batch of sites, one per expert (`weftlora.adapter.site`). Two ways compute it:

    by tokens     transformers lets experts be computed by a function that is registered by name. Ours is the host's grouped one, with
                  y += s · h B̃_eᵀ after each of its two products: any structure, with dropout, and nothing as large as W is made.
    by weights    where the host has no such door, or the weights are quantised: the base is called with W + ΔW in W's place, as stock
                  LoRA does. ΔW is as large as W, so unrouted structures without dropout only.

`WeftExperts` takes the place of the host's module, which it calls; in it each adapted parameter has a `WeftExpertWeight` under the
parameter's own name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from weftlora.adapted.layer import WeftLayer, WeftWhole
from weftlora.adapter.site import Site
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import AdapterError, MergeError, TargetError
from weftlora.kernel import Grouping, Order, Work, add_grouped, delta_weights, grouped_linear
from weftlora.schedule.schedule import Member

IMPLEMENTATION = "weftlora"
"""What our experts function is called among the host's."""
UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
"""What the host's interface calls the two parameters."""


@dataclass(frozen=True)
class Layout:
    """How one parameter of an experts module lies."""

    experts: int
    fan_in: int
    out: int
    transposed: bool

    def matrix(self, w: Tensor) -> Tensor:
        """W, or one expert's, as [..., out, in]: a view."""
        return w.transpose(-2, -1) if self.transposed else w


def layout_of(module: nn.Module, name: str, path: str = "") -> Layout:
    """The layout of the parameter `name` of an experts module; `path` is what the model calls that.

    Raises:
        TargetError: nothing about the module tells [out, in] from [in, out], or what it says of itself disagrees.
    """
    experts, first, second = cubes(module)[name]
    found = set(_told(module, name))
    if len(found) != 1:
        called, kind = f"{path}.{name}" if path else name, type(module).__name__
        why = (
            f"what {kind} says of itself disagrees about whether they are [out, in] or [in, out]"
            if found
            else f"neither {kind} nor the sides of its parameters tell whether they are [out, in] or [in, out]"
        )
        raise TargetError(
            f"{called} holds matrices {[first, second]} of {experts} experts, and {why}: leave it out (target_parameters=[]), or set "
            "is_transposed on the module, True for [in, out]."
        )
    (transposed,) = found
    return Layout(experts, *((first, second) if transposed else (second, first)), transposed)


def _told(module: nn.Module, name: str) -> Iterator[bool]:
    """What there is to say whether the matrices of `name` are [in, out]: what the module states, the sides of its two parameters, of
    which one's output is the other's input twice (gate and up), and where both are silent its own forward.

    Of a module of the host's door the flag is what the host computes by, so a forward is not asked.
    """
    silent = True
    if isinstance(flag := vars(module).get("is_transposed"), bool):
        silent = False
        yield flag
    _, first, second = cubes(module)[name]
    for fan_in, out in (("input_size", "output_size"), ("in_features", "out_features")):
        stated = vars(module).get(fan_in), vars(module).get(out)
        if stated[0] != stated[1] and set(stated) == {first, second}:
            silent = False
            yield stated == (first, second)
    sides = [side[1:] for side in cubes(module).values()]
    for one, other in (sides, sides[::-1]) if len(sides) == 2 else ():
        if (one[1], one[0]) == (other[0], 2 * other[1]):
            silent = False
            yield False
        if one == (other[1], 2 * other[0]):
            silent = False
            yield True
    if silent and first != second:
        yield from _taken(module, first, second)


@torch.no_grad()
def _taken(module: nn.Module, first: int, second: int) -> Iterator[bool]:
    """Which of the two widths a forward of one input takes on the meta device, where it takes one of them only."""
    needed = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if len(needed) != 1 or any(type(value) not in (Tensor, nn.Parameter) for value in state.values()):
        return
    meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    one, took = next(iter(meta.values())), []
    for width in (first, second):
        x = one.new_empty(len(one), width)
        try:
            functional_call(module, meta, (x,))
        except Exception:  # foreign code, which fails in any way
            took.append(False)
        else:
            took.append(True)
    if took[0] != took[1]:
        yield took[0]


def fused(module: nn.Module) -> list[str]:
    """The names of the parameters in which a module keeps the matrices of a mixture's experts, in their order.

    By kind: three axes of which the first counts the experts, as the module itself says, or of a module that is called so.
    """
    if isinstance(module, (nn.modules.conv._ConvNd, WeftExperts, BaseTunerLayer)):
        return []
    counts = {value for key, value in vars(module).items() if "expert" in key and isinstance(value, int)}
    named = "expert" in type(module).__name__.lower()
    return [name for name, (count, *_) in cubes(module).items() if (named or count in counts) and count > 1]


def cubes(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The parameters of a module with three axes, and their shapes; also those that torch's parametrisation computes (bitsandbytes
    keeps experts in 4 bits so)."""
    found = {name: p.shape for name, p in module.named_parameters(recurse=False)}
    for name, held in getattr(module, "parametrizations", {}).items():
        if (shape := held.__dict__.get("_weft_shape")) is None:  # it is computed at every look
            shape = held.__dict__["_weft_shape"] = cast(Tensor, getattr(module, name)).shape
        found[name] = shape
    return {name: cast("tuple[int, int, int]", tuple(shape)) for name, shape in found.items() if len(shape) == 3}


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether torch's parametrisation computes the parameter `name` of a module."""
    return name in getattr(module, "parametrizations", {})


def in_fewer_bits(w: Tensor) -> bool:
    """Whether a parameter is kept in fewer bits than it is computed with: as a tensor of a quantiser's own, or as its bytes."""
    own = type(w).dequantize is not Tensor.dequantize
    return own or not w.is_floating_point() or w.dtype.itemsize == 1


def is_quantised(module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` of a module is kept in fewer bits, or computed from such."""
    return is_computed(module, name) or in_fewer_bits(cast(Tensor, module._parameters[name]))


def values(module: nn.Module, name: str) -> Tensor:
    """The parameter `name` of an experts module in the numbers that it computes with.

    Raises:
        TargetError: nobody says how its bytes are read.
    """
    w = cast(Tensor, getattr(module, name))
    if not in_fewer_bits(w):
        return w
    if type(w).dequantize is Tensor.dequantize:
        raise TargetError(
            f"{name} of {type(module).__name__} is kept as {str(w.dtype).removeprefix('torch.')}, which only the kernels of its "
            "quantiser read: load the base in another form, or leave experts out (target_parameters=[])."
        )
    return cast(Tensor, cast(Any, w).dequantize())


def experts_in_fewer_bits(model: nn.Module) -> list[nn.Module]:
    """The modules of experts that keep a matrix in fewer bits than they compute with."""
    found = ((module, fused(module)) for module in model.modules())
    return [m for m, names in found if any(is_quantised(m, n) for n in names)]


def make_experts_plain(model: nn.Module) -> None:
    """Give experts that are kept in fewer bits the numbers that they compute with, fp32, as plain parameters; others stay."""
    for module in experts_in_fewer_bits(model):
        table = getattr(module, "parametrizations", {})
        plain = {name: values(module, name).detach().float() for name in dict.fromkeys([*fused(module), *table])}
        if table:  # the class that the parametrisation made is also that of the module's copies, so it is left alone
            module.__class__ = type(module).__bases__[0]
            del module._modules["parametrizations"]
        for name, w in plain.items():
            module.register_parameter(name, nn.Parameter(w, requires_grad=False))


def expert_parameters(model: nn.Module) -> list[str]:
    """The full names of the parameters in which a mixture of experts holds its matrices, adapted ones included."""
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, WeftExperts):
            found += [f"{path}.{name}" for name in fused(module.base_layer)]
        elif not path.endswith(".base_layer"):
            found += [f"{path}.{name}" if path else name for name in fused(module)]
    return found


def why_by_weights(module: nn.Module) -> str | None:
    """Why the tokens of these experts cannot be computed by a function of ours, as a clause; None where they can."""
    kind = type(module).__name__
    told = ("is_transposed", "has_bias", "has_gate")
    if not all(isinstance(vars(module).get(name), bool) for name in told) or _interface() is None:
        return f"{kind} has no door for an experts function of another package"
    there = cubes(module)
    if DOWN not in there or not any(name in there for name in UP):
        return f"the weights of this {kind} are not two parameters"
    if any(in_fewer_bits(p) for p in module.parameters(recurse=False) if p.dim() == 3):
        return f"the weights of this {kind} are quantised"
    return None


def _interface() -> Any:
    """The host's table of experts functions, ours in it; None where this transformers has none."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return None
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    return ALL_EXPERTS_FUNCTIONS


class WeftExpertWeight(WeftLayer):
    """The adapters of one fused parameter; it computes nothing by itself, `WeftExperts` does."""

    def __init__(self, module_name: str, experts: nn.Module, name: str):
        super().__init__(module_name)
        self.name = name
        self.layout = layout_of(experts, name)
        self._experts = (experts,)  # a tuple: it is the wrapper's submodule, not this one's

    def get_base_layer(self) -> nn.Module:
        """The host's module that holds the parameter."""
        return self._experts[0]

    @property
    def weight(self) -> Tensor:
        """The parameter, [E, out, in] or transposed, as it is computed with."""
        return values(self._experts[0], self.name)

    @property
    def base_source(self) -> str:
        """What `base_matrix` reads: "in memory" (the parameter itself), or "dequantised" where the base keeps fewer bits."""
        return "dequantised" if is_quantised(self._experts[0], self.name) else "in memory"

    @property
    def bias(self) -> None:
        """Of the adapter's own: none."""
        return

    @property
    def in_features(self) -> int:
        """Of every expert."""
        return self.layout.fan_in

    @property
    def out_features(self) -> int:
        """Of every expert."""
        return self.layout.out

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        site, weight = self.site(adapter_name), self.weight
        if not any(p.is_meta for p in site.parameters()):
            dtype = weight.dtype if weight.is_floating_point() else None
            self.weft_site[adapter_name] = site.to(device or weight.device, dtype)

    def members(self, adapter_name: str) -> list[Member]:
        """A site per expert, called by its number behind the parameter's name."""
        if adapter_name not in self.weft_site:
            return []
        site = self.site(adapter_name)
        return [
            Member(f"{self.module_name}.{e}", site, _Matrix(self, e), self.base_source, e)
            for e in range(self.layout.experts)
        ]

    def base_matrix(self, e: int) -> Tensor:
        """W [out, in] of one expert as it is computed with."""
        return self.layout.matrix(self.weight.detach()[e])

    def work(self, adapter_name: str, grouping: Grouping) -> Work:
        """What the batch asks of one forward by tokens."""
        site = self.site(adapter_name)
        found = site.work()
        if not site.expert_meters:
            return found
        tokens, told = grouping.slices(), found.on_mix

        def tell(omega: Tensor) -> None:
            site.heard(omega, tokens)
            if told is not None:
                told(omega)

        return replace(found, on_mix=tell)

    # ------------------------------------------------------------------ merging

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of one adapter in the layout of the parameter, fp32."""
        return self.layout.matrix(self.site(adapter_name).delta_weight())

    def _plain_weight(self) -> nn.Parameter:
        weight = self._experts[0]._parameters.get(self.name)
        if isinstance(weight, nn.Parameter) and type(weight.detach()) is Tensor and weight.is_floating_point():
            return weight
        raise MergeError(
            f"{self.module_name} is not a plain parameter of numbers, so ΔW cannot be added: load the base model unquantised and "
            "unsharded to merge, or serve the adapter unmerged."
        )

    def _put_weight(self, weight: nn.Parameter) -> None:
        setattr(self._experts[0], self.name, weight)

    def put(self, w: Tensor) -> None:
        """Let the base compute with W [E, out, in]."""
        self._put_weight(nn.Parameter(self.layout.matrix(w).contiguous(), requires_grad=False))

    @property
    def at_work(self) -> list[str]:
        """The adapters that take part in a forward."""
        return [] if self._disable_adapters or self.merged_adapters else self._names()


@dataclass(frozen=True)
class _Matrix:
    """Reads W [out, in] of one expert; a copy of the model reads its own."""

    layer: WeftExpertWeight
    e: int

    def __call__(self) -> Tensor:
        return self.layer.base_matrix(self.e)


class WeftExperts(WeftWhole):
    """The host's experts module with adapters on its fused parameters; takes and gives what that does."""

    def __init__(self, base_layer: nn.Module, module_name: str):
        super().__init__(base_layer, module_name)
        self.by_weights = why_by_weights(base_layer)
        self._configs = self._own_configs()

    def layer(self, name: str) -> WeftExpertWeight:
        """The adapters of the parameter `name`, made if there are none yet."""
        if name not in self._modules:
            layer = WeftExpertWeight(f"{self.module_name}.{name}", self.base_layer, name)
            setattr(self, name, layer.train(self.training))
        return cast(WeftExpertWeight, self._modules[name])

    def layers(self) -> Iterator[WeftExpertWeight]:
        """Those that there are."""
        return (child for child in self.children() if isinstance(child, WeftExpertWeight))

    def _own_configs(self) -> tuple[Any, Any]:
        """The base's config, and one of its own that names our function: the model's, which others share, stays as it is."""
        config = getattr(self.base_layer, "config", None)
        if self.by_weights is not None or config is None:
            return config, config
        ours = copy.copy(config)
        ours._experts_implementation_internal = IMPLEMENTATION
        return config, ours

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="the tokens of an expert are counted in every forward, so experts run outside of compiled graphs"
    )
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = list(self.layers())
        for layer in layers:
            if layer._disable_adapters and layer.merged_adapters:
                layer.unmerge()
        active = [layer for layer in layers if layer.at_work]
        if self.rows is not None and active:
            raise AdapterError(
                f"adapter_names=[...] names an adapter per row, and {self.module_name} reads the tokens of all rows as one list: "
                "infer with one adapter at a time."
            )
        theirs, ours = self._configs
        if self.by_weights is None:
            wanted = ours if active else theirs
            if self.base_layer.config is not wanted:
                self.base_layer.config = wanted
            self.base_layer.__dict__["_weft_layers"] = {layer.name: layer for layer in active}
            return self.base_layer(*args, **kwargs)
        if not active:
            return self.base_layer(*args, **kwargs)
        return called_with(self.base_layer, {layer.name: _whole(layer) for layer in active}, args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The host's module by itself, as peft asks for it."""
        if merge:
            for layer in self.layers():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.bare()

    def bare(self) -> nn.Module:
        """The host's module as it was before."""
        if self.by_weights is None:
            self.base_layer.config = self._configs[0]
            self.base_layer.__dict__.pop("_weft_layers", None)
        return self.base_layer


class _Given(nn.Module):
    """Stands for a parametrisation whose value is given."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.__dict__["value"] = value

    def forward(self) -> Tensor:
        return cast(Tensor, self.__dict__["value"])


def called_with(module: nn.Module, given: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """What a module gives with other values of some of its parameters, those that a parametrisation computes among them.

    For the length of a forward FSDP1 shows views of its own beside the parameters, in front of which nothing that torch puts is seen:
    where there are such, they are changed.
    """
    computed = {name: w for name, w in given.items() if is_computed(module, name)}
    rest = {name: w for name, w in given.items() if name not in computed}
    table = cast(nn.ModuleDict, module.parametrizations)._modules if computed else {}
    owners = {name: (vars(module.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2]) for name in rest}
    shown = {name: (at, last, at[last]) for name, (at, last) in owners.items() if last in at}
    before = {name: table[name] for name in computed}
    table.update({name: _Given(w) for name, w in computed.items()})
    for name, (at, last, _) in shown.items():
        at[last] = rest[name]
    try:
        return functional_call(module, {n: w for n, w in rest.items() if n not in shown}, args, kwargs)
    finally:
        table.update(before)
        for at, last, view in shown.values():
            at[last] = view


def _whole(layer: WeftExpertWeight) -> Tensor:
    """W + ΣΔW of the active adapters, in W's dtype and layout, with autograd's derivatives."""
    w = layer.weight
    for name in layer.at_work:
        site = layer.site(name)
        w = w + layer.layout.matrix(delta_weights(site.work().factors, layer.layout.experts)).to(w.dtype)
    return w


def check_experts(config: WeftConfig, name: str, module: nn.Module) -> None:
    """Refuse the parameter called `name` of the experts `module` where the config asks for what no adapter on it can have.

    Raises:
        TargetError: says why, and what to do.
    """
    experts = module.base_layer if isinstance(module, WeftExperts) else module
    last = name.rpartition(".")[2]
    structure = config.structure
    if last not in fused(experts):
        raise TargetError(
            f"{name} is not a parameter [experts, out, in] of a mixture of experts: leave it out of target_parameters."
        )
    if getattr(experts, "_is_expert_parallel", False):
        raise TargetError(
            f"{name} is split among processes (expert parallelism): load the model without that, or leave {name} out."
        )
    layout_of(experts, last, name.rpartition(".")[0])
    values(experts, last)
    if structure.outside or (structure.per_head_dropout and config.lora_dropout):
        what = f"{structure.title} is outside the equation" if structure.outside else "a dropout mask per head is drawn"
        raise TargetError(f"{name} holds experts, and {what}, which linear modules alone can have: leave it out.")
    if structure.balance:
        raise TargetError(
            f"{name} holds experts, and {structure.title}(balance={structure.balance:g}) counts tokens of modules that read all of "
            "them: set balance=0, or leave experts out (target_parameters=[])."
        )
    if (why := why_by_weights(experts)) is None:
        if last not in (*UP, DOWN):
            raise TargetError(f"{name} is not a matrix that the host's experts functions compute with: leave it out.")
        return
    dropout = f"lora_dropout={config.lora_dropout:g} drops elements of x"
    wanted = f"{structure.method} has a router per token" if structure.routed else dropout
    if structure.routed or config.lora_dropout:
        raise TargetError(
            f"{name} can be adapted by its weights only ({why}), where {wanted}: use an unrouted structure without dropout, or leave "
            "experts out (target_parameters=[])."
        )


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **_: Any
) -> Tensor:
    """The experts function that is registered with the host as "weftlora": its grouped one, with the updates of the active adapters.

    Args:
        hidden_states: [T, hidden].
        top_k_index: [T, k], the experts of every token.
        top_k_weights: [T, k], what their outputs are weighed with.

    Returns:
        [T, hidden].

    Source: `transformers.integrations.moe` says what the function has to do; the order of its steps is that of the host's own.
    """
    layers: dict[str, WeftExpertWeight] = self.__dict__["_weft_layers"]
    tokens, k, experts = len(hidden_states), top_k_index.shape[-1], cast(int, self.num_experts)
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(expert, minlength=experts)
    if len(counts) > experts:
        raise AdapterError(
            "experts that are split among processes (expert parallelism) cannot carry adapters: train without it."
        )
    source = order // k
    scored = next((site.keep for layer in layers.values() for site in _sites(layer) if site.keep is not None), None)
    part = None if scored is None else source // (tokens // scored.shape[1])
    grouping = Grouping(counts.cumsum(0).to(torch.int32), expert, part)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    pairs = Order(grouping, source, order, back.view(tokens, k))

    def project(name: str, x: Tensor) -> Tensor:
        weight = cast(Tensor, getattr(self, name))
        biased = getattr(self, f"{name}_bias", None) if getattr(self, "has_bias", False) else None
        matrix = weight.transpose(-2, -1) if self.is_transposed else weight
        x = x.to(weight.dtype)
        layer = layers.get(name)
        works = [] if layer is None else [layer.work(adapter, grouping) for adapter in layer.at_work]
        y = grouped_linear(x, matrix, grouping, biased, works[0] if works else None)
        for work in works[1:]:
            y = add_grouped(y, x, work, grouping)
        return y

    x = pairs.apart(hidden_states)
    up = UP[0] if getattr(self, "has_gate", True) else UP[1]
    inner = project(up, x)
    inner = cast(Any, self)._apply_gate(inner) if up == UP[0] else cast(Any, self).act_fn(inner)
    y = project(DOWN, inner)
    if getattr(self, "has_post_expert_norm", False):
        y = cast(Any, self).post_expert_norm(y)
    return pairs.together(y, top_k_weights).to(hidden_states.dtype)


def _sites(layer: WeftExpertWeight) -> Iterator[Site]:
    return (layer.site(name) for name in layer.at_work)
