"""The one adapted layer: a base module, and a `Site` per adapter name.

    y = base(x);  for each active adapter:  y ← y + h B̃ᵀ      in a mixed batch, row by row its own adapter's

The base layer is called, never re-implemented, so any module with in and out features can carry adapters (quantised
ones too); merging needs a plain weight. A merge keeps the original W (as many bytes as W, for as long as it is merged)
and unmerging puts it back bit for bit; `merge_and_unload` keeps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weftlora.adapted.hooks import watched
from weftlora.adapted.input_groups import InputGroup
from weftlora.adapted.quantised import (
    can_be_requantised,
    dequantised,
    is_quantised,
    is_shared,
    matrix,
    requantised,
    stored,
)
from weftlora.adapted.reading import Reading, reading_of
from weftlora.adapted.sharing import refuse_reentrant_checkpointing
from weftlora.adapted.tensor_parallel import add as add_to_slice
from weftlora.adapted.tensor_parallel import slice_of
from weftlora.adapter.shards import is_shard, on_one
from weftlora.adapter.site import Site
from weftlora.errors import AdapterError, ConfigError, MergeError
from weftlora.kernel import Linear, Work, add_by_row, current, linears
from weftlora.kernel.switches import triton_runs
from weftlora.schedule.schedule import Member
from weftlora.settings import is_number
from weftlora.terms.axes import mergeable_structures

BASE = "__base__"
"""What peft calls a row of a mixed batch that no adapter is for."""


class WeftLayer(nn.Module, BaseTunerLayer):
    """Something of the base that carries adapters, one `Site` per adapter name.

    All state of an adapter lives in `weft_site[name]`, keyed by adapter name first, as peft's saving needs.
    """

    adapter_layer_names = ("weft_site",)
    other_param_names = ()
    if TYPE_CHECKING:  # the host's mixin is untyped; these are what is used of it
        active_adapters: list[str]
        set_adapter: Callable[..., None]
        get_base_layer: Callable[[], nn.Module]
        _move_adapter_to_device_of_base_layer: Callable[[str], None]
    reading: Reading | None = None
    """Of an embedding or a convolution, how it is a matrix."""
    within: str | None = None
    """Of a matrix of a module that is adapted as a whole, what the model calls that module."""

    def __init__(self, module_name: str, base_layer: nn.Module | None = None):
        super().__init__()
        if base_layer is not None:
            self.base_layer = base_layer
        self.module_name = module_name
        self.weft_site = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.keep_base = True
        self.shares_weight = False  # with another module, which a merge must leave as it is
        self.rows: Sequence[str] | None = None  # the adapter of every row of the batch, for the length of a forward
        self.merge_loss: tuple[float, float] | None = None
        """While merged into a quantised base, ‖what that kept of ΔW − ΔW‖ and ‖ΔW‖."""
        self._kept: Tensor | None = None
        self._kept_layer: tuple[nn.Module, ...] = ()  # of a merge into a quantised base: the base; no submodule
        self._disable_adapters = False
        self._active_adapter: list[str] | str = []

    def add_site(self, adapter_name: str, site: Site, *, active: bool, inference_mode: bool) -> None:
        """Put an adapter on this module, on the base weight's device and in its dtype (peft upcasts it afterwards)."""
        self.weft_site[adapter_name] = site
        site.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if active:
            self.set_adapter([*self.active_adapters, adapter_name], inference_mode=inference_mode)
        else:
            site.requires_grad_(False)

    def site(self, adapter_name: str) -> Site:
        """The adapter called `adapter_name`; KeyError if this module has none."""
        return cast(Site, self.weft_site[adapter_name])

    def members(self, adapter_name: str) -> list[Member]:
        """The sites of that adapter that stand for one matrix each, in their order; [] if this module has none."""
        raise NotImplementedError

    def _names(self) -> list[str]:
        sites = self.weft_site
        return [name for name in self.active_adapters if name in sites]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the update of `adapter` by `scale`, as stock LoRA's layers do; 1 is as it was trained."""
        if adapter in self.weft_site:
            self.site(adapter).strength = self._checked_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the updates of the active adapters by `scale`, on top of what they are multiplied by; diffusers calls it."""
        for name in self._names():
            self.set_scale(name, self.site(name).strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take back `scale` from the active adapters; without one, all that they are multiplied by."""
        for name in self._names():
            self.set_scale(name, 1.0 if scale is None else self.site(name).strength / scale)

    def _checked_scale(self, adapter: str, scale: float) -> float:
        if not is_number(scale) or not math.isfinite(scale):
            raise ConfigError(f"scale={scale!r} is not a number to multiply an update by: use a finite one.")
        if adapter in self.merged_adapters:
            raise AdapterError(
                f"adapter {adapter!r} is merged into {self.module_name}, so its scale is in W: call model.unmerge_adapter() first."
            )
        return float(scale)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether peft's convert_to_lora applies (it goes through an SVD per layer; weftlora's own export does not)."""
        return adapter_name in self.weft_site and self.site(adapter_name).mergeable

    # ------------------------------------------------------------------ merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W ← W + ΣΔW in fp32, rounded once to W's dtype, or quantised again as W is (`merge_loss`). All or nothing.

        Raises:
            MergeError: an adapter is routed, the base is not x Wᵀ with a W that can be changed, or `safe_merge` and the
                merged weight has a value that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.weft_site]
        if not names:
            return
        self.check_mergeable(names, finite=safe_merge)
        if self._requantised:
            self._merge_quantised(names)
            self.merged_adapters.extend(names)
            return
        merged, weight = self._merged_weight(names), self._plain_weight()
        if self.shares_weight:
            self._kept = weight if self._kept is None else self._kept
            self._put_weight(nn.Parameter(merged, requires_grad=weight.requires_grad))
        else:
            if self._kept is None and self.keep_base:
                self._kept = weight.detach().clone()
            weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original W back, bit for bit."""
        if not self.merged_adapters:
            return
        if self._kept_layer:
            self.put_base(self._kept_layer[0])
            self._kept_layer, self.merge_loss = (), None
            self.merged_adapters.clear()
            return
        if self._kept is None:
            raise MergeError(
                f"the original weight of {self.module_name} was not kept, so it cannot be unmerged: load the base model again."
            )
        if self.shares_weight:
            self._put_weight(cast(nn.Parameter, self._kept))
        else:
            weight = self._plain_weight()
            weight.data = self._kept.to(weight)  # the model may have been moved or cast while it was merged
        self._kept = None
        self.merged_adapters.clear()

    def check_mergeable(self, names: list[str], *, finite: bool = False) -> None:
        """Raise `MergeError` with the reason if one of these adapters has no weight-space form here.

        Args:
            finite: also refuse if a value of the merged weight would not be finite (computes it once more).
        """
        for name in names:
            if name in self.weft_site and not self.site(name).mergeable:
                structure = self.site(name).structure.choice
                raise MergeError(
                    f"adapter {name!r} cannot be merged into {self.module_name}: it is {structure.method}, and "
                    f"{structure.no_closed_form}; serve it unmerged, or train {' or '.join(mergeable_structures())} where a merge is "
                    "needed."
                )
        if not self._requantised:
            self._plain_weight()
        if finite and not torch.isfinite(self._merged_weight(names)).all():
            raise MergeError(
                f"merging {', '.join(names)} into {self.module_name} gives values that are not finite, so nothing was merged: "
                "the adapter has diverged, use an earlier checkpoint."
            )

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of one adapter in the layout of the base weight, fp32."""
        raise NotImplementedError

    def _plain_weight(self) -> nn.Parameter:
        """W as a floating-point parameter that ΔW can be added to. Raises `MergeError` where there is none."""
        raise NotImplementedError

    def _put_weight(self, weight: nn.Parameter) -> None:
        """Let the base compute with this W."""
        raise NotImplementedError

    @property
    def _requantised(self) -> bool:
        """Whether a merge quantises the sum again."""
        return False

    def _dequantised(self) -> Tensor:
        """The W [out, in] of a base that is quantised again."""
        raise NotImplementedError

    def put_base(self, layer: nn.Module) -> None:
        """Replace the base layer, which adapters of others may stand around."""
        holder: Any = self
        while isinstance(holder.base_layer, BaseTunerLayer):
            holder = holder.base_layer
        holder.base_layer = layer

    def _merge_quantised(self, names: list[str]) -> None:
        """A quantised layer of W + ΣΔW in place of the base, which is kept as it is to be put back."""
        raise NotImplementedError

    def _merged_weight(self, names: list[str]) -> Tensor:
        """W plus the updates of those adapters that are here and not merged yet, in W's dtype."""
        weight = self._dequantised() if self._requantised else self._plain_weight()
        new = [name for name in names if name in self.weft_site and name not in self.merged_adapters]
        delta = sum((self.get_delta_weight(name) for name in new), torch.zeros((), device=weight.device))
        return (weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) + delta).to(weight.dtype)

    # ------------------------------------------------------------------ adapters come and go

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; shared tensors it owns go to the next site of their group first."""
        if adapter_name in self.weft_site:
            self.site(adapter_name).structure.hand_over()
        super().delete_adapter(adapter_name)

    def __repr__(self) -> str:
        return "weftlora." + super().__repr__()


class WeftWhole(nn.Module):
    """What stands around a module of the host's that is adapted as a whole, whose matrices are no modules by themselves."""

    def __init__(self, base_layer: nn.Module, module_name: str):
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.rows: Sequence[str] | None = None
        """As of a `WeftLayer`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # how it is copied or pickled is its own
                raise
            return getattr(super().__getattr__("base_layer"), name)  # what the model asks its module for


V = TypeVar("V")


class _OfAdapters(Mapping[str, V]):
    """Something of every adapter on a layer as it is when it is looked at, so that an adapter that goes is gone from here too."""

    def __init__(self, layer: WeftLayer, of: Callable[[Site], V]):
        self._layer, self._of = layer, of

    def __getitem__(self, name: str) -> V:
        return self._of(self._layer.site(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.weft_site)

    def __len__(self) -> int:
        return len(self._layer.weft_site)

    def __repr__(self) -> str:
        return repr(dict(self))


class WeftLinear(WeftLayer):
    """A linear module, an embedding or a convolution, and the adapters on it. Of a linear module the input is [..., in] and the
    output [..., out] in the base's dtype; of the others what the base takes and gives.
    """

    def __init__(self, base_layer: nn.Module, module_name: str):
        super().__init__(module_name, base_layer)
        self.reading = reading_of(
            base_layer if not isinstance(base_layer, BaseTunerLayer) else base_layer.get_base_layer()
        )
        self.group: InputGroup | None = None  # of linears that read one input; see `weftlora.adapted.input_groups`
        self.quantiser: Any = None
        """transformers' quantiser of the model, which says how a merged weight is quantised again."""

    def members(self, adapter_name: str) -> list[Member]:
        """The one site."""
        if adapter_name not in self.weft_site:
            return []
        site = self.site(adapter_name)
        return [
            Member(
                self.module_name,
                site,
                self.base_matrix,
                self.base_source,
                is_split=self.is_split,
                weight_on=self.base_matrix_on,
            )
        ]

    @property
    def in_features(self) -> int:
        """What x's last dimension is, as models ask their linear modules; `weight` and `bias` are peft's views of the base's."""
        return self._sides()[0]

    @property
    def out_features(self) -> int:
        """What y's last dimension is."""
        return self._sides()[1]

    @property
    def r(self) -> Mapping[str, int]:
        """The rank of each adapter as its config has it, as stock LoRA's layers say it."""
        return _OfAdapters(self, lambda site: site.initial_rank)

    @property
    def scaling(self) -> Mapping[str, float]:
        """What multiplies B A of each adapter now; `set_scale` changes it."""
        return _OfAdapters(self, lambda site: site.scale * site.strength)

    def _sides(self) -> tuple[int, int]:
        base = self.get_base_layer()
        if self.reading is not None:
            return self.reading.sides
        if isinstance(base, Conv1D):
            fan_in, out = base.weight.shape
            return fan_in, out
        return cast(int, base.in_features), cast(int, base.out_features)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = kwargs.pop(
            "adapter_names", self.rows
        )  # a layer that is called by itself takes them too, as stock LoRA's
        if rows is not None and not self._disable_adapters:
            return self._by_rows(rows, x, *args, **kwargs)
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return cast(Tensor, self.base_layer(x, *args, **kwargs))
        names = self._names()
        spanned = bool(names) and not (args or kwargs)
        if self.group is not None and not torch.compiler.is_compiling():
            self.group.called(self)
            y = self.group.fetch(self, x) if spanned and current().groups else None
            if y is not None:
                return y
        read = self.cast_input(x)
        y = self._by_node(names, x, read) if spanned else None
        if y is None:
            y, rest = self.base_layer(read, *args, **kwargs), names
        else:
            rest = names[1:]
        for name in rest:
            self._check_distributed(name)
            y = self.weft_site[name](read, y, self._mask(name, x, read), self._add)
        return cast(Tensor, y)

    @property
    def _add(self) -> Callable[[Tensor, Tensor, Work], Tensor] | None:
        if self.reading is None:
            cut = slice_of(self.base_layer)
            return None if cut is None else partial(add_to_slice, cut=cut)
        return self.reading.add

    def _by_rows(self, rows: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output, and onto every row of x the update of the adapter that `rows` names for it; `BASE` has none.

        Raises:
            AdapterError: not as many names as rows, or an adapter is merged.
        """
        if len(rows) != len(x):
            raise AdapterError(
                f"adapter_names has {len(rows)} names and {self.module_name} reads {len(x)} rows: name one adapter per row of the "
                "batch (a module that reads the tokens of all rows as one list, as experts do, cannot tell them apart)."
            )
        if self.merged_adapters:
            raise AdapterError(
                f"adapter_names=[...] on a model in which {self.merged_adapters} is merged: call model.unmerge_adapter() first."
            )
        read = self.cast_input(x)
        y = cast(Tensor, self.base_layer(read, *args, **kwargs))
        names = [name for name in dict.fromkeys(rows) if name in self.weft_site]
        if (whole := self._by_table(names, rows, read, y)) is not None:
            return whole
        for name in names:
            where = torch.tensor([i for i, row in enumerate(rows) if row == name], device=y.device)
            y = y.index_copy(0, where, self.weft_site[name](read[where], y[where], None, self._add))
        return y

    def _by_table(self, names: list[str], rows: Sequence[str], read: Tensor, y: Tensor) -> Tensor | None:
        """The same in one launch per product for all of these adapters, where the Triton kernels can compute it."""
        if not triton_runs(read.device, read.dtype):  # before anything is looked at: as a rule they do not
            return None
        sites = [self.site(name) for name in names]
        if not sites or self._add is not None or any(site.outside or watched(site) for site in sites):
            return None
        numbers = {name: number for number, name in enumerate(names)}
        return add_by_row(y, read, (site.work() for site in sites), tuple(numbers.get(row, len(names)) for row in rows))

    def _by_node(self, names: list[str], x: Tensor, read: Tensor) -> Tensor | None:
        """The base's output with the first active adapter's update, if one node can compute both."""
        if self.group is not None and current().groups and not torch.compiler.is_compiling():
            y = self.group.output(self, x, read)
            if y is not None:
                return y
        job = self.job(names[0], x, read) if self.why_not() is None else None
        return None if job is None else linears(read, [job])[0]

    def cast_input(self, x: Tensor) -> Tensor:
        """x as the base will compute with it: under autocast cast once, for the base and every adapter."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32 and type(self.base_layer) is nn.Linear:
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def only_adapter(self) -> str | None:
        """The adapter that takes part in a forward, if exactly one does."""
        if self._disable_adapters or self.merged_adapters or self.rows is not None:
            return None
        names = self._names()
        return names[0] if len(names) == 1 else None

    def job(self, name: str, x: Tensor, read: Tensor) -> Linear | None:
        """What a node needs to compute this linear with the adapter `name`; None where it must be left to the modules.

        To be asked where `why_not` is None: that looks at the modules, this at the input. `read` is x as the base takes
        it (`cast_input`).
        """
        base, device = self.base_layer, read.device.type
        weight = base.weight if type(base) is nn.Linear else None  # of a base in 4 bits it is made below
        own = read if weight is None else weight
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own.dtype
        if own.device != read.device or read.dtype != computed:
            return None
        self._check_distributed(name)
        work = self.site(name).work()
        if work.plain or work.scored:
            return None
        weight = dequantised(base, read) if weight is None else weight
        if weight is None:
            return None
        mask = self._mask(name, x, read)
        return weight, cast("Tensor | None", base.bias), work if mask is None else replace(work, mask=mask)

    def why_not(self) -> str | None:
        """Why no node can own this linear: its base must be called and the update added to what it gives; None if one can."""
        if current().reference:
            return "WEFT_REFERENCE is set"
        base = self.base_layer
        if type(base) is not nn.Linear or type(weight := base.weight) not in (nn.Parameter, Tensor):
            if not is_shared(base) or self._add is not None:
                return f"{type(base).__name__} is not a plain Linear"
            weight = None
        if (weight is not None and weight.requires_grad) or ((bias := base.bias) is not None and bias.requires_grad):
            return "the base is trained too"
        if watched(base):
            return "hooks on the base"
        if names := self._names():
            site = self.site(names[0])
            if site.outside:
                return f"{site.structure.choice.title} is outside the equation"
            if watched(site):
                return "hooks on the adapter"
        return None

    def _mask(self, adapter_name: str, x: Tensor, read: Tensor) -> Tensor | None:
        """The dropout mask that this linear shares with those that read x too; None where it draws its own."""
        site = self.site(adapter_name)
        if (
            not (site.one_mask and site.training and site.dropout)
            or self.group is None
            or torch.compiler.is_compiling()
        ):
            return None
        return self.group.mask(x, read, adapter_name, site.dropout)

    def _check_distributed(self, adapter_name: str) -> None:
        if not (self.training and dist.is_available() and dist.is_initialized()) or torch.compiler.is_compiling():
            return
        if (term := self.site(adapter_name).structure).trains_shared:
            refuse_reentrant_checkpointing(term.choice.method)

    # ------------------------------------------------------------------ merging

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW of one adapter in the layout of the base weight (transposed for Conv1D), fp32."""
        delta = self.site(adapter_name).delta_weight()
        if self.reading is not None:
            return self.reading.stored(delta)
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def base_matrix(self) -> Tensor:
        """W [out, in] as it is in memory: transposed from Conv1D's layout, dequantised where the base is quantised.

        Raises:
            ConfigError: the base keeps no weight that can be read, or none that is what it computes with, or this process has but a
                part of it.
        """
        if self.is_split():
            raise ConfigError(
                f"the weight of {self.module_name} is split among processes, so this one cannot read it: save the adapter "
                "(save_pretrained), and load its folder in one process for this."
            )
        if self.reading is None and is_quantised(base := self.get_base_layer()):
            return matrix(base, self.module_name)
        return self._as_matrix(self._weight())

    def is_split(self) -> bool:
        """Whether every process holds a part of the base's weight."""
        return is_shard(getattr(self.get_base_layer(), "weight", None))

    def base_matrix_on(self, process: int) -> Tensor | None:
        """W [out, in], split among processes, whole on one of them, and None on the others; all must call it."""
        weight = on_one(self._weight(), process)
        return None if weight is None else self._as_matrix(weight)

    def _weight(self) -> Tensor:
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is None:
            raise ConfigError(
                f"{self.module_name} is a {type(base).__name__} without a readable weight: do not target it."
            )
        return cast(Tensor, weight)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        base = self.get_base_layer()
        if self.reading is not None:
            here = stored(base) if is_quantised(base) else weight
            return self.reading.matrix((weight if here is None else here).detach())
        return weight.detach().T if isinstance(base, Conv1D) else weight.detach()

    @property
    def base_source(self) -> str:
        """What `base_matrix` reads: "in memory" (the weight itself), or "dequantised" where the base keeps fewer bits."""
        return "dequantised" if is_quantised(self.get_base_layer()) else "in memory"

    @property
    def _requantised(self) -> bool:
        base = self.get_base_layer()
        return self.reading is None and is_quantised(base) and can_be_requantised(base, self.quantiser)

    def _dequantised(self) -> Tensor:
        return self.base_matrix()

    def _merge_quantised(self, names: list[str]) -> None:
        base, before = self.get_base_layer(), self.base_matrix().float()
        new = [name for name in names if name not in self.merged_adapters]
        delta = sum((self.get_delta_weight(name).float() for name in new), torch.zeros_like(before))
        layer = requantised(base, before + delta, self.quantiser)
        off = (matrix(layer, self.module_name).float() - before - delta).norm()
        far, whole = self.merge_loss or (0.0, 0.0)
        self.merge_loss = (far**2 + float(off) ** 2) ** 0.5, (whole**2 + float(delta.norm()) ** 2) ** 0.5
        if not self._kept_layer and self.keep_base:
            self._kept_layer = (base,)
        self.put_base(layer)

    def _plain_weight(self) -> nn.Parameter:
        base = self.get_base_layer()
        weight = getattr(base, "weight", None)
        if (
            (self.reading is not None or type(base).forward in (nn.Linear.forward, Conv1D.forward))
            and isinstance(weight, nn.Parameter)
            and type(weight.detach()) is Tensor
            and weight.is_floating_point()
        ):
            return weight
        raise MergeError(
            f"{self.module_name} is a {type(base).__name__}, which is not x Wᵀ with a plain matrix W, so ΔW cannot be added: "
            "load the base model unquantised and unsharded to merge, or serve the adapter unmerged."
        )

    def _put_weight(self, weight: nn.Parameter) -> None:
        setattr(self.get_base_layer(), "weight", weight)  # noqa: B010
