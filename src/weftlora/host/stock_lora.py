"""Stock peft LoRA as what leaves the project: its config, with every name in it resolved again by peft's own rules.

peft reads names in ways that go wrong on their own:

    target_modules, a list    a name also matches what ends with ".name": `layers.0.q` hits `inner.layers.0.q`
    rank_pattern's keys       regexes, `(.*\\.)?(key)$`; the first match wins, and the file sorts them
    what neither names        takes r and lora_alpha of the whole config, and the scale is lora_alpha / rank

So keys are escaped full names, those that another site's name ends with are anchored, and what peft makes of the result is
compared with what was meant before anything is written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from weftlora.adapted.attention import WeftAttention
from weftlora.adapted.experts import WeftExperts
from weftlora.adapted.layer import WeftLayer, WeftLinear
from weftlora.adapted.targets import pattern_key
from weftlora.errors import AdapterError

HOST = "base_model.model."
"""What peft puts in front of the names of a model that it wraps."""


def stock_config(
    modules: Collection[str], ranks: Mapping[str, int], parameters: Mapping[str, str] | None = None, **fields: Any
) -> LoraConfig:
    """The LoraConfig under which exactly the sites in `ranks` have a LoRA, each of its rank and of scale 1.

    r and lora_alpha are the largest rank: a reader that knows no patterns and divides one by the other finds scale 1, and one that
    reserves room for r has enough. One that divides lora_alpha by the rank of each tensor (llama.cpp) is right only if all ranks
    are equal.

    Args:
        modules: the names of all modules of the base model.
        ranks: {full name of a site: its rank}, all ≥ 1.
        parameters: {full name of a site: the parameter that stock peft has to be told instead of a module}.
        fields: further fields of LoraConfig.

    Raises:
        AdapterError: peft would adapt other modules, or read another rank or scale.
    """
    told = dict(parameters or {})
    named = {told.get(name, name): r for name, r in ranks.items()}
    largest = max(ranks.values())
    pattern = {pattern_key(name, named): r for name, r in named.items() if r != largest}
    sites = set(ranks) - told.keys()
    targets: Any = sites or None
    if any(name.endswith(f".{site}") for name in modules if name not in sites for site in sites):
        targets = "|".join(re.escape(name) for name in sorted(sites))  # a regex must match the whole name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base model's name is not known
        config = LoraConfig(
            r=largest,
            lora_alpha=largest,
            rank_pattern=dict(sorted(pattern.items())),
            alpha_pattern=dict(sorted(pattern.items())),
            target_modules=targets,
            **({"target_parameters": sorted(told.values())} if told else {}),
            use_rslora=False,
            lora_dropout=0.0,
            bias="none",
            inference_mode=True,
            **fields,
        )
    check_resolution(config, modules, named, set(told.values()))
    return config


def renamed_targets(model: nn.Module) -> frozenset[str]:
    """The last names in target_modules that stock peft takes for something else on a model of this type: what its experts' matrices
    were called before transformers fused them, which dense and shared modules may still be called. Empty for most types."""
    try:
        from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
    except ImportError:
        return frozenset()
    kind = _MODEL_TO_CONVERSION_PATTERN.get(getattr(getattr(model, "config", None), "model_type", None))
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(kind, ()))


def as_parameters(model: nn.Module, sites: Collection[str]) -> dict[str, str]:
    """{site: its weight's name} of the linear modules that stock peft would rename in target_modules, and leaves as parameters."""
    renamed = renamed_targets(model)
    return {name: f"{name}.weight" for name in sites if name.rpartition(".")[2] in renamed}


def names_in_file(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """{name: what a LoRA file has to call the module `name` so that stock peft finds it}: its own name nearly always.

    Where transformers renames old checkpoints of a type on load, stock peft renames the tensors of a LoRA file in the same way, also
    those whose name is of today and has an old one in it (`shared_experts` of `shared_expert.`, whose dot is any character). For these
    the name of before is written, which becomes that of today. A warning names what no name becomes.
    """
    found = {name: name for name in names}
    if (renamed := _renaming(model)) is None:
        return found
    for name in names:
        if not _finds(renamed(name), name):
            olds = (name.replace(new, old) for old, new in renamed.table if new in name)
            if (old := next((old for old in olds if renamed(old) == name), None)) is None:
                warnings.warn(
                    f"stock peft renames {name} to {renamed(name)} when it loads a LoRA for a {type(model).__name__}, and would leave "
                    "it out: look at its warnings, or merge the adapter instead (weftlora merge).",
                    stacklevel=4,
                )
                continue
            found[name] = old
    return found


def _finds(renamed: str, name: str) -> bool:
    """Whether stock peft ends at `name`: it takes a renaming back that only took a beginning away."""
    return f"{HOST}{name}".endswith(renamed)


@dataclass(frozen=True)
class _Renaming:
    """What stock peft makes of a module's name in a LoRA file; `table`: (old, new) parts of names, as text."""

    entries: tuple[list[Any], list[Any]]
    table: tuple[tuple[str, str], ...]

    def __call__(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        key, _ = rename_source_key(f"{HOST}{name}.lora_A.weight", *self.entries)
        return cast(str, key).removesuffix(".lora_A.default.weight")


def _renaming(model: nn.Module) -> _Renaming | None:
    """Stock peft's for this model; None where it renames nothing, or is of a version that does not."""
    try:
        from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return None
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None or get_checkpoint_conversion_mapping(kind) is None:
        return None
    own = get_model_conversion_mapping(model)
    every = build_peft_weight_mapping(own, adapter_name="default", peft_config=LoraConfig())
    entries = [e for e in every if isinstance(e, WeightRenaming)], [e for e in every if isinstance(e, WeightConverter)]
    table = [(o, n) for e in own if isinstance(e, WeightRenaming) for o in e.source_patterns for n in e.target_patterns]
    return _Renaming(entries, tuple((o.lstrip("^").replace("\\", ""), n) for o, n in table))


def check_resolution(
    config: LoraConfig, modules: Collection[str], ranks: Mapping[str, int], parameters: Collection[str] = ()
) -> None:
    """Refuse a config that peft resolves to other sites, ranks or scales than `ranks` and 1.

    Args:
        parameters: those in `ranks` that are told as parameters.

    Raises:
        AdapterError: the first site that comes out wrong.
    """
    found = {name for name in modules if name and check_target_module_exists(config, name)} | set(parameters)
    if wrong := sorted(found ^ ranks.keys()):
        verb = "would adapt" if wrong[0] in found else "would not adapt"
        raise AdapterError(
            f"stock peft {verb} {wrong[0]} with this config, so the export would be another adapter: report this name to weftlora."
        )
    for name, rank in ranks.items():
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), name), config.lora_alpha)
        if (r, alpha) != (rank, rank):
            raise AdapterError(
                f"stock peft would read r={r} and alpha={alpha} for {name}, which has rank {rank}: report this name to weftlora, and "
                "export with uniform=True, which needs no patterns."
            )


def trained_modules(model: nn.Module, adapters: Sequence[str]) -> dict[str, Tensor]:
    """{name in the base model: value} of what the adapters trained in full (modules_to_save).

    Raises:
        AdapterError: two of the adapters trained one module, of which only one value can be used.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        mine = [adapter for adapter in adapters if adapter in module.modules_to_save]
        if len(mine) > 1:
            raise AdapterError(
                f"adapters {' and '.join(mine)} each trained {name} in full, and an export has room for one: export them one by "
                "one."
            )
        for adapter in mine:
            values = module.modules_to_save[adapter].state_dict()
            found |= {f"{name}.{key}": value for key, value in values.items()}
    return found


def foreign_layers(model: nn.Module) -> list[str]:
    """The names of the layers that carry an adapter of another method than weftlora's."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    return [name for name, layer in layers if not isinstance(layer, WeftLayer)]


def without_adapters(model: nn.Module, *, trained: bool) -> nn.Module:
    """The base model itself, its adapters taken out in place.

    Args:
        trained: put in the modules that the active adapter trained in full, instead of the base's own.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            kept = module.modules_to_save[module.active_adapter] if trained and module.active_adapters else None
            replace_module(model, name, module.original_module if kept is None else kept)
        elif isinstance(module, WeftExperts):
            replace_module(model, name, module.bare())
        elif isinstance(module, WeftAttention):
            replace_module(model, name, module.base_layer)
        elif isinstance(module, WeftLinear) and module.within is None:
            replace_module(model, name, module.get_base_layer())
    if getattr(model, "_hf_peft_config_loaded", False):
        # transformers' own load_adapter: it would now save the adapters instead of the model, under the adapter's prefix
        host = cast(Any, model)
        host._hf_peft_config_loaded, host._weight_conversions = False, None
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `model`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
