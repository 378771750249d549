"""A weftlora adapter as a stock LoRA folder, and how large it would be without writing it.

read ─ closed forms ─ layout ─ config resolved again ─┬─ written beside ─ proved by stock peft ─ card ─ renamed
                    └─ the live adapter's logits ─────┘

bytes = Σ over sites of 4 · R (in + out) + 4 · the parameters that leave in full + the header of the file
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoConfig

from weftlora.adapted.experts import WeftExpertWeight, experts_in_fewer_bits
from weftlora.adapted.quantised import format_of
from weftlora.adapted.updates import base_of
from weftlora.errors import AdapterError, ConfigError, MergeError
from weftlora.export import folder, live, record
from weftlora.export.factors import Pair, Stack, closed_form, combined, common_rank
from weftlora.export.folder import config_of, name_of, save, stock_keys
from weftlora.export.live import Gates, mean_gates
from weftlora.export.proof import Prover
from weftlora.export.record import LoraExport, Rounding
from weftlora.export.source import Inputs, Source, check_linear, drawn_parts, in_full, inputs_of
from weftlora.host.stock_lora import HOST, trained_modules
from weftlora.host.versions import asks_how_experts_lie
from weftlora.runs.identity import folder_of

MEAN_GATE = "mean-gate"


@dataclass(frozen=True)
class Choices:
    """How to write the folder; see `weftlora.export.export_lora`."""

    uniform: bool
    server_ranks: bool
    verify: bool
    dtype: torch.dtype
    base_name: str | None

    @property
    def layout(self) -> str:
        """In words, as the record has it."""
        return "server ranks" if self.server_ranks else "uniform" if self.uniform else "pattern"


def export(source: Source, out: Path, choices: Choices, inputs: Inputs | None, gates: Inputs | None) -> LoraExport:
    """Write the folder; see `weftlora.export.export_lora`.

    Args:
        gates: what mean gates are measured on; None for an exact export.
    """
    check_routed(source, gates is not None)
    done: list[LoraExport] = []
    with live.shell(source.model, source.adapters) as own:
        measured = {} if gates is None else mean_gates(own, source.adapters, gates.batches)
        found = pairs(source, measured)
        drawn = drawn_parts(source)
        heads = trained_modules(base_of(source.model), source.adapters) | in_full(drawn, found)
        sites = laid_out(as_stock_reads(source, found), choices)
        config = config_of(source, {name: pair.rank for name, pair in sites.items()}, list(drawn), choices.base_name)
        bare = LoraExport(
            folder=out,
            adapters=source.adapters,
            layout=choices.layout,
            dtype=name_of(choices.dtype),
            ranks={name: pair.rank for name, pair in sites.items()},
            left_out=sorted(found.keys() - sites.keys()),
            parameters=sum(pair.a.numel() + pair.b.numel() for pair in sites.values()),
            whole_modules=sorted({name.rpartition(".")[0] for name in heads}),
        )
        prover = None
        if choices.verify:
            prover = Prover.of(own, plainly(own, source), inputs or inputs_of(source, None), measured)

        def fill(place: Path) -> None:
            done.append(write(place, bare, config, sites, heads, choices.dtype, prover, stock_keys(source, sites)))
            if prover is not None and gates is not None:
                done.append(replace(done[-1], approximation=prover.approximation(gates, measured)))
            source.say_prompts(place)
            (place / "README.md").write_text(record.lora(done[-1], source, config), encoding="utf-8")

        folder.write(out, fill)
    return done[-1]


def plainly(own: nn.Module, source: Source) -> Source:
    """The source with a shell whose weights are plain: what is written does not depend on the base, and the proof is in float32.

    A quantised base is dequantised for it, and stands in a folder of its own for the length of the proof.
    """
    if format_of(base_of(own)) is None and not experts_in_fewer_bits(own):
        return source
    live.dequantise(own)
    return replace(source, base=None)


def check_routed(source: Source, approximate: bool) -> None:
    """Refuse an adapter without a closed form, but for `approximate` of a routed one, and `approximate` without one.

    Raises:
        MergeError: exact, and an adapter is routed; or no pair of matrices stands for it; or it is on an embedding or a convolution.
        ConfigError: approximate, and none is.
    """
    check_linear(source)
    here = [(name, layer.site(name)) for layer in source.layers for name in source.adapters if name in layer.weft_site]
    unpaired = [(name, site.structure.choice) for name, site in here if not site.mergeable]
    if approximate and (experts := [layer for layer in source.layers if isinstance(layer, WeftExpertWeight)]):
        raise MergeError(
            f"{experts[0].module_name} holds experts, whose routers are not approximated: serve the adapter with weftlora."
        )
    routed = bool(unpaired) and all(structure.routed for _, structure in unpaired)
    if unpaired and not (approximate and routed):
        name, structure = next((each for each in unpaired if not each[1].routed), unpaired[0])
        instead = (
            f", or take an approximation whose error is measured (approximate={MEAN_GATE!r} with data; --approximate {MEAN_GATE} "
            "--data FILE)"
        )
        raise MergeError(
            f"adapter {name!r} is {structure.method}, and {structure.no_closed_form}, so there is no exact export: serve it with "
            f"weftlora{instead if structure.routed else ''}."
        )
    if approximate and not routed:
        raise ConfigError(
            f"approximate={MEAN_GATE!r} is for routed adapters, and this one exports exactly: leave it out."
        )


def check_vocabulary(source: Source) -> None:
    """Refuse a model whose embeddings were resized after its base was loaded: a LoRA does not hold them. Raises AdapterError."""
    place = None if source.base is None else folder_of(source.base)
    settings: Any = getattr(base_of(source.model), "config", None)
    if place is None or settings is None:
        return
    try:
        stored = AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # the proof will say what is wrong with it
        return
    before, now = (getattr(each.get_text_config(), "vocab_size", None) for each in (stored, settings))
    if before != now:
        raise AdapterError(
            f"the model in memory has a vocabulary of {now} tokens and its base {source.base} one of {before} "
            "(resize_token_embeddings), and a LoRA holds no embeddings: save the resized base and give its folder as base, or "
            "say base='memory' and keep it yourself."
        )


def pairs(source: Source, gates: Gates) -> dict[str, Pair | Stack]:
    """Every site's update as one pair, those of a parameter's experts as one stack; several adapters side by side."""
    found: dict[str, Pair | Stack] = {}
    for layer in source.layers:
        name = layer.module_name
        mine = [adapter for adapter in source.adapters if adapter in layer.weft_site]
        if isinstance(layer, WeftExpertWeight):
            sites = zip(*([m.site for m in layer.members(a)] for a in mine), strict=True)
            found[name] = Stack(tuple(combined(map(closed_form, own)) for own in sites))
        else:
            found[name] = combined(closed_form(layer.site(a), gates.get(a, {}).get(name)) for a in mine)
    return found


def as_stock_reads(source: Source, found: Mapping[str, Pair | Stack]) -> dict[str, Pair | Stack]:
    """The same updates; those of experts whose sides stock peft takes for one another as the pairs of ΔWᵀ."""
    turned = {
        layer.module_name for layer in source.layers if isinstance(layer, WeftExpertWeight) and turned_by_stock(layer)
    }
    return {name: update.transposed() if name in turned else update for name, update in found.items()}


def turned_by_stock(layer: WeftExpertWeight) -> bool:
    """Whether stock peft takes the two sides of these matrices for one another: it reads [in, out] where a flag says so alone, and
    older versions always."""
    reads = bool(getattr(layer.get_base_layer(), "is_transposed", False)) if asks_how_experts_lie() else True
    return layer.layout.transposed != reads


def laid_out(found: Mapping[str, Pair | Stack], choices: Choices) -> dict[str, Pair | Stack]:
    """The sites that have a slot, at one rank where the layout asks for it.

    Raises:
        AdapterError: no site has one, or `server_ranks` with more slots than servers take.
    """
    sites = {name: pair for name, pair in found.items() if pair.rank}
    if not sites:
        raise AdapterError(
            "no module of the adapter has any rank left, so there is nothing to export: use the base as it is."
        )
    if not (choices.uniform or choices.server_ranks):
        return sites
    rank = common_rank(sites, choices.server_ranks)
    return {name: pair.padded(rank) for name, pair in sites.items()}


def write(
    place: Path,
    bare: LoraExport,
    config: LoraConfig,
    sites: Mapping[str, Pair | Stack],
    heads: Mapping[str, Tensor],
    dtype: torch.dtype,
    prover: Prover | None,
    keys: Mapping[str, str],
) -> LoraExport:
    """The two files, and what was measured of them: in fp32 first, whatever they are to be in the end.

    Raises:
        AdapterError: stock peft does not compute what the live adapter does; a value does not fit into the dtype.
    """
    save(place, config, sites, heads, torch.float32, keys)
    proof = None if prover is None else prover.prove(place, bare.ranks)
    if dtype == torch.float32:
        return replace(bare, proof=proof)
    save(place, config, sites, heads, dtype, keys)
    error = None if prover is None else prover.compared(prover.of_adapter(place, bare.ranks), None).error
    return replace(bare, proof=proof, rounding=Rounding(name_of(dtype), lost_to(dtype, sites), error))


def lost_to(dtype: torch.dtype, sites: Mapping[str, Pair | Stack]) -> float:
    """The share of all ‖ΔW‖ that goes when the factors are rounded to `dtype`."""
    lost = whole = 0.0
    for pair in sites.values():
        exact = pair.delta()
        lost += float((pair.rounded(dtype).delta() - exact).square().sum())
        whole += float(exact.square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def lora_bytes(source: Source) -> int | None:
    """Bytes of the `adapter_model.safetensors` that `export_lora` writes in fp32, a rank per site; None where no site has a slot, or
    one has no pair of matrices.

    For a routed adapter, which has no exact export, those of its export at the mean gate.
    """
    sites_of = ((layer, name) for layer in source.layers for name in source.adapters if name in layer.weft_site)
    if any(layer.site(name).outside for layer, name in sites_of):
        return None
    found = pairs(source, _any_gates(source))
    whole = trained_modules(base_of(source.model), source.adapters) | in_full(drawn_parts(source), found)
    sites = {name: pair for name, pair in found.items() if pair.rank}
    shapes = {f"{HOST}{name}": tuple(value.shape) for name, value in whole.items()}
    keys = stock_keys(source, sites)
    for name, pair in sites.items():
        shapes |= {f"{HOST}{keys[name]}.lora_{part}.weight": tuple(getattr(pair, part.lower()).shape) for part in "AB"}
    return file_bytes(shapes) if sites else None


def _any_gates(source: Source) -> Gates:
    """Weights for the heads of every routed site: which ones does not matter to its rank."""
    gates: Gates = {}
    for layer, name in (
        (layer, name) for layer in source.layers for name in source.adapters if name in layer.weft_site
    ):
        site = layer.site(name)
        if site.routed:
            heads = site.factors().heads
            gates.setdefault(name, {})[layer.module_name] = torch.full((heads,), 1 / heads)
    return gates


def file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a safetensors file with fp32 tensors of these shapes: the length of its header, the header, the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + 8 * math.ceil(len(text) / 8) + end
