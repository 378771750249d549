"""The one tuner: turns a `WeftConfig` and a model into sites. With `layer`, the only place that touches peft internals.

What peft does to third parties and what follows from it is written down, fact by fact, in tests/host/test_contract.py.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from weftlora.adapted.attention import PARTS, WeftAttention
from weftlora.adapted.experts import WeftExperts, WeftExpertWeight, check_experts, expert_parameters
from weftlora.adapted.fusion import forget, fuse, unfuse
from weftlora.adapted.layer import BASE, WeftLayer, WeftLinear, WeftWhole
from weftlora.adapted.quantised import check_gradients, keep_differentiable
from weftlora.adapted.sharing import shared_keys
from weftlora.adapted.targets import (
    Blocks,
    all_experts,
    all_linear,
    by_last_names,
    check_adaptable,
    check_reading,
    check_saved_modules,
    check_tokens,
    default_targets,
    inside_adapter,
    is_all_linear,
    language_part,
    named_experts,
    no_match,
    rank_and_alpha,
    trained_in_full,
    warn_of_unmatched,
)
from weftlora.adapter.site import Owners, Site, build_batch, build_site
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import AdapterError, ConfigError, MergeError, NoMatchError, TargetError, suggest
from weftlora.host import weighted
from weftlora.host.attach import await_copy, make_schedule, say_ranks, warn_of_missing
from weftlora.host.loading import OtherShape, count_on_first_site, passing_over_sizes, tensor_mismatch
from weftlora.host.optimizer import watch
from weftlora.host.versions import saves_biases, ties_weights
from weftlora.terms.axes import builtin
from weftlora.terms.structure import StructureTerm

PREFIX = "weft_"
# Parts of our tensors' names. peft tells adapters apart by searching these names for ".NAME.", so an adapter called so
# would silently take tensors out of the other adapters' files.
RESERVED = frozenset({"weft_site", "structure", "start", "boost", "steps"}).union(
    *(kind.saves.keys() | kind.counts.keys() for kind in builtin())
)

logger = logging.getLogger(__name__)


class WeftTuner(BaseTuner):
    """Adapts the targeted linear modules of a model; built by `peft.get_peft_model(model, WeftConfig(...))`."""

    prefix = PREFIX
    tuner_layer_cls = WeftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    uses_shared_state = False  # the owner site of a tied group holds the pair, so every loading path of the host works

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, PeftModel):  # before peft puts this config among those of the model within
            raise ConfigError(
                f"the model is a {type(model).__name__} already, and one around it would save and load nothing right: add an adapter "
                f"to it with model.add_adapter({adapter_name!r}, config), or take its own off first with model.unload()."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    # ------------------------------------------------------------------ config and targets

    def _prepare_adapter_config(self, peft_config: WeftConfig, model_config: dict[str, Any]) -> WeftConfig:
        by_default = peft_config.target_modules is None
        if by_default and peft_config.target_parameters:
            return peft_config  # these alone, as in peft
        if not by_default and not is_all_linear(peft_config):
            return peft_config
        found = (default_targets if by_default else all_linear)(peft_config, self.model)
        if peft_config.target_parameters is None and not (
            by_default and peft_config.structure.targets == "attention inputs"
        ):
            experts = all_experts(peft_config, self.model)
            if by_default and (part := language_part(self.model)) is not None:
                experts = {name for name in experts if name.startswith(f"{part}.")} or experts
            peft_config.target_parameters = experts or None
        if peft_config.layers_to_transform is not None and found:
            found = self._of_blocks(peft_config, found)
        if by_default and peft_config.structure.targets == "attention inputs":
            found = by_last_names(self.model, found)
        peft_config.target_modules = found
        return peft_config

    def _of_blocks(self, config: WeftConfig, names: set[str]) -> set[str]:
        """Those within layers_to_transform: peft matches full names without looking at the block number."""
        one = copy.copy(config)
        one.target_parameters = None
        found = set()
        for name in names:
            one.target_modules = {name.rpartition(".")[2]}
            if self._check_target_module_exists(one, name):
                found.add(name)
        if not found:
            raise NoMatchError(
                f"layers_to_transform={config.layers_to_transform!r} names no block of {type(self.model).__name__} with linear "
                "modules: count blocks from 0, or leave it out."
            )
        return found

    def _check_target_module_exists(self, peft_config: WeftConfig, key: str) -> Any:
        """peft's own match of names, but what is trained in full, and the axis `layers` on top of it."""
        if trained_in_full(peft_config, key):
            return False
        found = super()._check_target_module_exists(peft_config, key)
        if not found:  # an object of peft's that says why, and is false
            return found
        if self._within_whole(key):
            return False
        return found if peft_config.layers.adapts(self._blocks, key) else False

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self.model)

    def _within_whole(self, key: str) -> bool:
        """Whether `key` names a part of a module that is adapted as a whole, which is no target."""
        module: nn.Module | None = self.model
        for part in key.split(".")[:-1]:
            module = None if module is None else module._modules.get(part)
            if isinstance(module, WeftAttention):
                return True
        return False

    def _prepare_model(self, peft_config: WeftConfig, model: nn.Module) -> None:
        """Refuse up front what cannot work, while the model is still untouched."""
        matched = [
            name
            for name, _ in model.named_modules()
            if name and not inside_adapter(model, name) and self._check_target_module_exists(peft_config, name)
        ]
        wholes = {n for n in matched if isinstance(model.get_submodule(n), (nn.MultiheadAttention, WeftAttention))}
        matched = [name for name in matched if name.rpartition(".")[0] not in wholes]  # their parts come with them
        self._check_layers(peft_config, model)
        if peft_config.ensure_weight_tying and not ties_weights():
            raise ConfigError(
                "ensure_weight_tying=True needs a newer peft, which trains tied weights as one: leave it out."
            )
        if peft_config.bias != "none" and not saves_biases():
            raise ConfigError(
                f"bias={peft_config.bias!r} needs peft 0.21 or newer, which saves what is trained: leave it out."
            )
        experts = self._experts(peft_config)
        if not matched and not experts:
            raise NoMatchError(no_match(peft_config, model))
        for name in experts:
            check_experts(peft_config, name, model.get_submodule(name.rpartition(".")[0]))
        self._check_expert_patterns(peft_config, experts)
        for name in matched:
            module = model.get_submodule(name)
            check_adaptable(name, module, model.get_submodule(name.rpartition(".")[0]))
            check_reading(peft_config, name, module)
        if not peft_config.inference_mode:
            bases = {name: model.get_submodule(name) for name in matched}
            check_gradients({n: m.get_base_layer() if isinstance(m, WeftLinear) else m for n, m in bases.items()})
        check_saved_modules(peft_config, model)
        check_tokens(peft_config, model)
        warn_of_unmatched(peft_config, model)

    def _check_layers(self, config: WeftConfig, model: nn.Module) -> None:
        """Refuse block numbers and names that adapt nothing, and a search with nothing to choose between."""
        names = [name for name, _ in model.named_modules() if name and not inside_adapter(model, name)]
        experts = named_experts(config, model)
        targeted = [name for name in names if super(WeftTuner, self)._check_target_module_exists(config, name)]
        if targeted or experts:
            config.layers.check(self._blocks, [*targeted, *experts])

    def _experts(self, config: WeftConfig) -> list[str]:
        """The full names of the fused parameters of experts that the config adapts, in the order of the model."""
        wanted = named_experts(config, self.model)
        if config.layers_to_transform is not None and wanted:
            wanted = self._of_blocks(config, wanted)
        return [n for n in expert_parameters(self.model) if n in wanted and config.layers.adapts(self._blocks, n)]

    def _check_expert_patterns(self, config: WeftConfig, experts: list[str]) -> None:
        """Refuse a pattern for an expert that a parameter does not have, which peft would pass over with a warning, and ranks that
        differ where they cannot."""
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, field):
                head, _, number = key.rpartition(".")
                for name in experts if number.isdigit() else ():
                    count = len(self._expert_weight(name))
                    if int(number) >= count and re.fullmatch(rf"(.*\.)?({head.removesuffix(chr(92))})", name):
                        raise ConfigError(
                            f"{field} names expert {number} of {name}, which has {count}: count experts from 0 to {count - 1}."
                        )
        for name in experts:
            ranks_of, scales = self._expert_ranks(config, name)
            shares = shared_keys(config.structure, name, (max(ranks_of), 1, 1), expert=True)
            if shares and len(set(ranks_of)) > 1:
                raise ConfigError(
                    f"rank_pattern gives experts of {name} different ranks, and {config.structure.title} lets them share matrices "
                    "of one rank: give all of them the same."
                )
            if len(set(scales)) > 1 and config.start.build(1, 1, 1) is not None:
                raise ConfigError(
                    f"experts of {name} have different scales, and {config.start.title} freezes slots at one: give alpha_pattern the "
                    "ratio of rank_pattern, or all of them one rank."
                )

    def _expert_ranks(self, config: WeftConfig, name: str) -> tuple[list[int], list[float]]:
        """Rank and scale of every expert of the parameter `name`, as a pattern says of the expert or of the parameter."""
        each = [rank_and_alpha(config, f"{name}.{e}", name) for e in range(len(self._expert_weight(name)))]
        return [r for r, _ in each], [config.scale(r, alpha) for r, alpha in each]

    def _expert_weight(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        module = self.model.get_submodule(path)
        return cast(Tensor, getattr(module.base_layer if isinstance(module, WeftExperts) else module, last))

    def _inject_parameters(
        self, peft_config: WeftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool = False
    ) -> list[str]:
        """peft asks for this where the config has target_parameters: experts, each parameter a batch of sites."""
        names = self._experts(peft_config)
        for name in names:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._adapt_experts(peft_config, adapter_name, name)
        noted = self.targeted_parameter_names  # where peft before 0.21 looks, which takes no answer
        noted += [name for name in names if name not in noted]
        return names

    def _adapt_experts(self, config: WeftConfig, adapter_name: str, name: str) -> None:
        path, _, last = name.rpartition(".")
        module = self.model.get_submodule(path)
        experts = module if isinstance(module, WeftExperts) else WeftExperts(module, path)
        layer = experts.layer(last)
        fan_in, out = layer.layout.fan_in, layer.layout.out
        ranks_of, scales = self._expert_ranks(config, name)
        keys = shared_keys(config.structure, name, (max(ranks_of), fan_in, out), expert=True)
        site = build_batch(
            config.structure,
            ranks_of,
            (fan_in, out),
            scales=scales,
            dropout=config.lora_dropout,
            owners=self._owners_of(keys),
            shares=list(keys),
            boost=config.boost,
            start=config.start,
            ranks=config.ranks,
            layers=config.layers,
        )
        self._add_site(layer, adapter_name, config, site, keys)
        if experts is not module:
            experts.train(module.training)
            parent, _, child = path.rpartition(".")
            setattr(self.model.get_submodule(parent), child, experts)

    def _owners_of(self, keys: Mapping[str, Hashable]) -> Owners:
        """Who owns the shared parts of a site already; a part that nobody does becomes the site's own."""
        return {part: self._owners[part, key] for part, key in keys.items() if (part, key) in self._owners}

    def _add_site(
        self, layer: WeftLayer, adapter_name: str, config: WeftConfig, site: Site, keys: Mapping[str, Hashable]
    ) -> None:
        """Put a fresh site on its layer, and remember what it owns for the sites that share that."""
        if not config.init_lora_weights:
            site.fill_zero_factor()
        for part, key in keys.items():
            self._owners.setdefault((part, key), site.structure)
        layer.add_site(
            adapter_name, site, active=adapter_name in self.active_adapters, inference_mode=config.inference_mode
        )

    def _create_and_replace(
        self,
        peft_config: WeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        check_adaptable(current_key, target, parent)
        if isinstance(target, (nn.MultiheadAttention, WeftAttention)):
            attention = target if isinstance(target, WeftAttention) else WeftAttention(target, current_key)
            for part in dict(attention.layers()).values():
                self._adapt(peft_config, adapter_name, part)
            setattr(parent, target_name, attention)
            return
        layer = target if isinstance(target, WeftLinear) else WeftLinear(target, current_key)
        layer.quantiser = getattr(self.model, "hf_quantizer", None)
        self._adapt(peft_config, adapter_name, layer)
        if layer is not target:
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)

    def _adapt(self, peft_config: WeftConfig, adapter_name: str, layer: WeftLinear) -> None:
        """Put a fresh site of this config on one matrix of the base."""
        name, structure = layer.module_name, peft_config.structure
        r, alpha = rank_and_alpha(peft_config, name, layer.within)
        size = (r, layer.in_features, layer.out_features)
        keys = shared_keys(structure, name, size)
        site = build_site(
            structure,
            size,
            scale=peft_config.scale(r, alpha),
            dropout=peft_config.lora_dropout,
            owners=self._owners_of(keys),
            boost=peft_config.boost,
            start=peft_config.start,
            ranks=peft_config.ranks,
            layers=peft_config.layers,
        )
        site.one_mask = peft_config.dropout_mask == "input"
        self._add_site(layer, adapter_name, peft_config, site, keys)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter on every target, then say once what a user should know about the sites that came out.

        With low_cpu_mem_usage, peft leaves the parameters on meta, for a file to fill; the buffers are left there too.
        """
        _check_adapter_name(adapter_name, self.peft_config[adapter_name])
        self._owners: dict[
            tuple[str, Hashable], StructureTerm
        ] = {}  # who owns a shared part, only while sites are made
        try:
            with warnings.catch_warnings():
                if self.peft_config[adapter_name].target_parameters is not None or expert_parameters(model):
                    # peft compares patterns with modules alone; those of experts are checked in `_check_expert_patterns`
                    warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
                if any(isinstance(m, (nn.MultiheadAttention, WeftAttention)) for m in model.modules()):
                    parts = "|".join(PARTS)  # nor does it know the matrices of an attention
                    message = rf"The following (rank|alpha)_pattern keys did not match .*\.({parts})"
                    warnings.filterwarnings("ignore", message=message)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            layers = [layer for _, layer in _sites(model) if adapter_name in layer.weft_site]
            _report_sites({layer.module_name: layer.site(adapter_name) for layer in layers})
            _report_experts(layers, adapter_name)
            make_schedule(layers, adapter_name, self.peft_config[adapter_name])
            watch(adapter_name, layers)
            keep_differentiable(model)
            fuse(model)
            for layer in layers:
                _buffers_follow(layer.site(adapter_name))
            same = (name for name, config in self.peft_config.items() if config is self.peft_config[adapter_name])
            if source := next((name for name in same if name != adapter_name), None):
                await_copy(model, adapter_name, source)
        finally:
            self._owners = {}

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *_: Any, adapter_names: Sequence[str] | None = None, num_beams: int | None = None, **__: Any
    ) -> Iterator[None]:
        """Called by PeftModel around a forward or a generation: for its length, `adapter_names` names an adapter per row."""
        with nullcontext() if adapter_names is None else self._mixed(adapter_names, num_beams or 1):
            try:
                yield
            except BaseException:
                forget(
                    self.model
                )  # what waits there holds the graph of all layers before, which a retry may need the room of
                raise

    @contextmanager
    def _mixed(self, adapter_names: Sequence[str], beams: int) -> Iterator[None]:
        """Let every adapted layer, and every module trained in full, take these adapters row by row.

        Beams repeat the rows, but not for an encoder, which runs once per row.

        Raises:
            AdapterError: the model trains, or an adapter that is named does not exist.
        """
        if self.training:
            raise AdapterError(
                "adapter_names=[...] mixes adapters in one batch to infer with: call model.eval() first."
            )
        known = {name for layer in self._layers() for name in layer.weft_site}
        if isinstance(adapter_names, str) or (unknown := [n for n in adapter_names if n not in known and n != BASE]):
            given = adapter_names if isinstance(adapter_names, str) else unknown[0]
            raise AdapterError(
                f"adapter_names names {given!r} and is a list of an adapter per row ({BASE!r} for none): {suggest(given, known)}"
            )
        repeated = [name for name in adapter_names for _ in range(beams)]
        encoder = getattr(self.model, "get_encoder", lambda: None)() if beams > 1 else None
        once = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles, layers = [], []
        try:
            for module in self.model.modules():
                rows = list(adapter_names) if module in once else repeated
                if isinstance(module, (WeftLinear, WeftWhole)):
                    module.rows = rows
                    layers.append(module)
                elif isinstance(module, AuxiliaryTrainingWrapper):
                    handles.append(module.register_forward_pre_hook(_with_rows(rows), with_kwargs=True))
            yield
        finally:
            for layer in layers:
                layer.rows = None
            for handle in handles:
                handle.remove()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As peft does for parameters, upcast an adapter's 16-bit buffers (frozen factors) to fp32 too."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            for layer in self._layers():
                if adapter_name in layer.weft_site:
                    for module in layer.weft_site[adapter_name].modules():
                        for name, buffer in list(module.named_buffers(recurse=False)):
                            if buffer.dtype in (torch.float16, torch.bfloat16):
                                setattr(module, name, buffer.float())

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As peft does; but a module that is put back has its own weight, and peft takes that of what stood around it, which may be
        a tensor (trained tokens) or have none (a head of several modules)."""
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _add_modules_to_save_to_tie(self, peft_config: WeftConfig, tied_weight_keys: list[str]) -> None:
        """peft asks for this where ensure_weight_tying is set and a tied embedding is trained in full: the embedding is, and what is
        tied to it takes its values; the attribute is where peft looks for their names."""
        embedding = next(
            name for name, module in self.model.named_modules() if module is self.model.get_input_embeddings()
        )
        saved = [
            name
            for name in peft_config.modules_to_save or []
            if not any(re.match(rf"(^|.*\.){name}($|\..*)", key) for key in tied_weight_keys)
        ]
        peft_config.modules_to_save = saved if embedding in saved else [*saved, embedding]
        peft_config.__dict__["modules_to_tie"] = set(tied_weight_keys)

    def _add_targets_to_tie(self, peft_config: WeftConfig, tied_weight_keys: list[str]) -> None:
        """peft asks for this where ensure_weight_tying is set and an embedding is a target."""
        raise TargetError(
            f"ensure_weight_tying=True would tie adapters of {', '.join(tied_weight_keys)} to that of the embedding, which works in "
            "stock LoRA only: leave the embedding out of target_modules, or ensure_weight_tying out."
        )

    # ------------------------------------------------------------------ adapters added up

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **others: Any,
    ) -> None:
        """Make an adapter whose update is the weighted sum of others', as peft's LoRA does; see `weftlora.host.weighted`.

        Args:
            combination_type: "cat" (exact; ranks add up) or "svd" (of rank `svd_rank`; a warning says what it leaves out).
            svd_rank: without it, the largest rank of the adapters on a module.
            others: of peft's method, for ways that are not offered; ignored at None.

        Raises:
            AdapterError, ConfigError, MergeError: see `weftlora.host.weighted.check`.
        """
        if adapter_name in self.peft_config:
            return
        way = weighted.check(self.peft_config, adapters, weights, combination_type)
        _check_adapter_name(adapter_name, self.peft_config[adapters[0]])
        trained = weighted.trained_in_full(self.model, adapters)
        found = weighted.sums(self._layers(), adapters, weights, way, svd_rank)
        saved = {name: None for each in adapters for name in self.peft_config[each].modules_to_save or ()}
        targets = {layer.within or layer.module_name for layer in self._layers() if layer.module_name in found}
        first = self.peft_config[adapters[0]]
        self.peft_config[adapter_name] = weighted.config_of(found, targets, first, list(saved) or None)
        self.inject_adapter(self.model, adapter_name)
        weighted.fill(self._layers(), adapter_name, found)
        for wrapper, source in trained:
            if adapter_name in wrapper.modules_to_save:
                wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[source].state_dict())

    # ------------------------------------------------------------------ merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge everywhere or nowhere; see `WeftLinear.merge`. What a quantised base loses of the update is a warning."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        _warn_of_loss(self._layers())

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if not merge:
            for layer in self._layers():
                layer.unmerge()
            unfuse(self.model)
            return cast(nn.Module, super()._unload_and_optionally_merge(merge=False, progressbar=progressbar))
        self._check_mergeable(adapter_names, safe_merge)
        layers = self._layers()
        for layer in layers:
            layer.keep_base = False  # the model is handed out merged for good: keep no second copy of W
        unfuse(self.model)
        try:
            plain = super()._unload_and_optionally_merge(
                merge=True, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
            _warn_of_loss(layers)
            return cast(nn.Module, plain)
        finally:
            for layer in layers:
                layer.keep_base = True

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        if unknown := [name for name in names if name not in self.peft_config]:
            raise MergeError(f"there is no adapter {unknown[0]!r} to merge: {suggest(unknown[0], self.peft_config)}")
        for layer in self._layers():
            layer.check_mergeable(names, finite=safe_merge)
        self._untie()

    def _untie(self) -> None:
        """Let the adapted layers whose weight another module has too (tied embeddings) merge into a weight of their own."""
        holders: dict[int, int] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
        for layer in (layer for layer in self._layers() if not layer.merged_adapters):
            layer.shares_weight = holders.get(id(getattr(layer.get_base_layer(), "weight", None)), 0) > 1

    def _layers(self) -> list[WeftLayer]:
        return [layer for _, layer in _sites(self.model)]

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: WeftConfig, adapter_name: str, **options: Any
    ) -> dict[str, Tensor]:
        """What peft saves, with a warning if the adapter is still without something that its config asks for. The config, which peft
        saves next, then says the ranks that there are."""
        warn_of_missing(model, adapter_name)
        say_ranks(model, config, adapter_name)
        return cast("dict[str, Tensor]", super()._get_adapter_state_dict(model, config, adapter_name, **options))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`…q_proj.weft_site.NAME.structure.A` → `…q_proj.weft_site.structure.A`; other keys as peft does."""
        marked = f".{PREFIX}site.{adapter_name}."
        if marked in key:
            return key.replace(marked, f".{PREFIX}site.")
        return cast(str, super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: WeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Add the adapter name to the keys, after checking that file and model agree name by name and shape by shape."""
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marked = f".{PREFIX}site.{adapter_name}."
        expected = {key: tensor.shape for key, tensor in model.state_dict().items() if marked in key}
        mapped = count_on_first_site(mapped, expected.keys(), f"{marked}steps")
        given = {key: tensor.shape for key, tensor in mapped.items() if f".{PREFIX}site." in key}
        wrong = [OtherShape(k, tuple(given[k]), tuple(s)) for k, s in expected.items() if k in given and given[k] != s]
        wrong = [] if passing_over_sizes.get() else wrong
        extra, missing = sorted(given.keys() - expected.keys()), sorted(expected.keys() - given.keys())
        if extra or missing or wrong:
            raise tensor_mismatch(extra, missing, wrong)
        return mapped


def _sites(model: nn.Module) -> list[tuple[str, WeftLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, WeftLayer)]


def _report_experts(layers: Sequence[WeftLayer], adapter_name: str) -> None:
    """Say what an adapter on every expert takes: there are many of them."""
    experts = [layer for layer in layers if isinstance(layer, WeftExpertWeight)]
    if experts:
        trained = sum(p.numel() for layer in experts for p in layer.site(adapter_name).parameters())
        logger.info(
            "%d fused parameters of experts such as %s are adapted, %d matrices in all: %.4g million trainable parameters, %.4g MB "
            "with AdamW's two moments in fp32.",
            len(experts),
            experts[0].module_name,
            sum(layer.layout.experts for layer in experts),
            trained / 1e6,
            trained * 12 / 1e6,
        )
    routed = next((layer for layer in experts if layer.site(adapter_name).routed), None)
    if routed is not None:
        choice = routed.site(adapter_name).structure.choice
        warnings.warn(
            f"{choice.method} on experts such as {routed.module_name} cannot be exported later, at its mean gate neither: "
            f"{choice.no_closed_form}. Leave experts out (target_parameters=[]), or take an unrouted structure, where you need that.",
            stacklevel=4,
        )


def _buffers_follow(site: Site) -> None:
    """To meta, where the parameters are; but the counts of the adapter as a whole, a number each, which are read before a file is."""
    for module in site.modules() if any(p.is_meta for p in site.parameters()) else ():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not (module is site and name in site.counters):
                setattr(module, name, buffer.to("meta"))


def _warn_of_loss(layers: Sequence[WeftLayer]) -> None:
    """Say what merging into quantised modules has lost of the update, if there are such."""
    lost = {layer.module_name: layer.merge_loss for layer in layers if layer.merge_loss is not None}
    if not lost:
        return
    far, whole = (sum(each[part] ** 2 for each in lost.values()) ** 0.5 for part in (0, 1))
    warnings.warn(
        f"merging into {len(lost)} quantised modules such as {next(iter(lost))} has lost {far / (whole or 1.0):.0%} of ‖ΔW‖, since "
        "the sums are quantised again: weftlora.merge(..., dtype='bfloat16') keeps it in dequantised weights, and "
        "weftlora.export_lora exactly.",
        stacklevel=4,
    )


def _with_rows(rows: list[str]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "adapter_names": rows}

    return before


def _check_adapter_name(name: str, config: WeftConfig) -> None:
    if not name or "." in name:  # torch would refuse it too, once half of the model is adapted
        raise ConfigError(
            f"adapter_name={name!r} cannot name a module, which is what every adapter becomes in torch: choose a name without dots"
            f"{', such as ' + repr(name.replace('.', '_')) if name.strip('.') else ' and with at least one letter'}."
        )
    own = RESERVED.union(*(choice.saves.keys() | choice.counts.keys() for choice in config.choices().values()))
    if name in own:
        raise ConfigError(
            f"adapter_name={name!r} is also a part of weftlora's tensor names, so other adapters could not be saved beside it: "
            f"choose another name, such as 'adapter_{name}'."
        )


def _report_sites(sites: dict[str, Site]) -> None:
    """Warn of ranks above a module's size; log tied groups of one, which are plain LoRA with two vectors."""
    factors = {name: site.factors() for name, site in sites.items()}
    wide = [name for name, f in factors.items() if f.A.shape[-2] > min(f.A.shape[-1], f.B.shape[-2])]
    if wide:
        warnings.warn(
            f"the rank is larger than a side of {len(wide)} modules such as {wide[0]}: the extra rank adds parameters, not "
            "directions; use a smaller r, or rank_pattern.",
            stacklevel=4,
        )
    alone = [name for name, site in sites.items() if site.structure.is_alone]
    if alone and len(alone) < len(sites):
        logger.info(
            "%d tied groups have a single member, such as %s: that is plain LoRA with vectors.", len(alone), alone[0]
        )
