"""torch's MultiheadAttention with adapters, taken whole as stock LoRA takes it: it reads its matrices itself and calls none of them.

    in_proj    W [3E, E], q, k and v in one        out_proj    W [E, E]

So the base is called with W + ΔW in their places, and ΔW = B̃ diag(g) A is as large as W: unrouted structures, and no dropout, since
nothing here sees x. `WeftAttention` stands around the host's module; in it each matrix is a `WeftLinear` of its own, which merges,
saves and is measured as any other, and is never called.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from weftlora.adapted.experts import called_with
from weftlora.adapted.layer import WeftLinear, WeftWhole
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import AdapterError, TargetError
from weftlora.kernel import delta_weights

PARTS = {"in_proj": "in_proj_weight", "out_proj": "out_proj.weight"}
"""What the adapted matrices are called, and the parameters of the host's module that they are."""


class _InProjection(nn.Linear):
    """The matrix of q, k and v as the linear module that it is; the parameters stay where they are and are asked for there."""

    def __init__(self, attention: nn.MultiheadAttention):
        nn.Module.__init__(self)
        self.__dict__["attention"] = attention  # no submodule: it holds this one's matrix, not the other way round
        self.in_features, self.out_features = attention.embed_dim, 3 * attention.embed_dim

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        return cast(nn.Parameter, self.__dict__["attention"].in_proj_weight)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return cast("nn.Parameter | None", self.__dict__["attention"].in_proj_bias)


class WeftAttentionMatrix(WeftLinear):
    """The adapters of one of the two matrices. Its base is a part of the host's module and no submodule of this one."""

    def __init__(self, attention: nn.MultiheadAttention, part: str, module_name: str):
        base = _InProjection(attention) if part == "in_proj" else attention.out_proj
        super().__init__(base, module_name)
        del self._modules["base_layer"]
        self.__dict__["base_layer"] = base
        self.within = module_name.rpartition(".")[0]

    def why_not(self) -> str | None:
        """It is never called."""
        return "the attention reads its weight"

    @property
    def at_work(self) -> list[str]:
        """The adapters that take part in a forward."""
        return [] if self._disable_adapters or self.merged_adapters else self._names()

    def whole(self) -> Tensor:
        """W + ΣΔW of the active adapters, in W's dtype, with autograd's derivatives."""
        w: Tensor = cast(Tensor, self.get_base_layer().weight)
        for name in self.at_work:
            w = w + delta_weights(self.site(name).work().factors, 1)[0].to(w.dtype)
        return w


class WeftAttention(WeftWhole):
    """The host's attention with adapters on its two matrices; takes and gives what that does."""

    def __init__(self, base_layer: nn.MultiheadAttention, module_name: str):
        super().__init__(base_layer, module_name)
        for part in PARTS:
            setattr(self, part, WeftAttentionMatrix(base_layer, part, f"{module_name}.{part}"))
        self.train(base_layer.training)

    def layers(self) -> Iterator[tuple[str, WeftAttentionMatrix]]:
        """The name of each matrix and its adapters."""
        return ((part, cast(WeftAttentionMatrix, self._modules[part])) for part in PARTS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for _, layer in self.layers():
            if layer._disable_adapters and layer.merged_adapters:
                layer.unmerge()
        given = {PARTS[part]: layer.whole() for part, layer in self.layers() if layer.at_work}
        if self.rows is not None and given:
            raise AdapterError(
                f"adapter_names=[...] names an adapter per row, and {self.module_name} reads its weights for all rows at once: infer "
                "with one adapter at a time."
            )
        return called_with(self.base_layer, given, args, kwargs) if given else self.base_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The host's module by itself, as peft asks for it."""
        if merge:
            for _, layer in self.layers():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def check_attention(config: WeftConfig, name: str, module: nn.Module) -> None:
    """Refuse a MultiheadAttention called `name` where the config asks for what no adapter on it can have.

    Raises:
        TargetError: says why, and what to do.
    """
    attention = module.base_layer if isinstance(module, WeftAttention) else module
    if not isinstance(attention, nn.MultiheadAttention):
        return
    if not attention._qkv_same_embed_dim:
        raise TargetError(
            f"{name} is a MultiheadAttention whose keys or values have another size than its queries, so its weights are three: "
            "leave it out, or train it in full (modules_to_save)."
        )
    structure = config.structure
    if structure.no_closed_form is not None or structure.outside:
        raise TargetError(
            f"{name} is a torch MultiheadAttention, which reads its weights itself, so an adapter on it has to be a ΔW, and "
            f"{structure.method} is none: use an unrouted structure, or leave it out."
        )
    if config.ranks.equation_only is not None:
        raise TargetError(
            f"{name} is a torch MultiheadAttention, which reads its weights itself, so its rank slots cannot be scored one by one: "
            "use ranks=Uniform(), or leave it out."
        )
    if config.bias not in ("none", "all"):
        raise TargetError(
            f"{name} is a torch MultiheadAttention, whose biases peft would train and not save with bias={config.bias!r}: leave bias "
            "out, or leave the attention out."
        )
    if config.lora_dropout:
        warnings.warn(
            f"lora_dropout={config.lora_dropout:g} drops nothing in {name}, a torch MultiheadAttention, which reads its weights "
            "itself (stock LoRA drops nothing there, either).",
            stacklevel=6,
        )
