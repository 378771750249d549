"""A weftlora adapter merged into its base's weights, as a folder that transformers loads.

    W' = round(W + ΔW)        W the original weight, the sum in fp32, one rounding into the dtype of the folder

Of a quantised base W is the matrix that its layers compute with. The sums are quantised again, as merging into such a base does
everywhere and which loses most, unless a dtype is named, which leaves them dequantised, or the unquantised checkpoint.

What the rounding loses is measured per site and on the logits, and a merge that loses too much is refused unless told to go on:

    lost = ‖(round(W + ΔW) − round(W)) − ΔW‖_F / ‖ΔW‖_F

0 keeps all of the update, 1 is as far off as no update at all, and above 1 the noise of rounding is larger than the update. Where W is
stored in the format itself, an update below half a step is gone entirely (round(W + ΔW) = W).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weftlora.adapted.experts import WeftExpertWeight
from weftlora.adapted.frozen_weights import Checkpoint
from weftlora.adapted.layer import WeftLayer, WeftLinear
from weftlora.adapted.quantised import can_be_requantised, format_of, is_quantised, requantised
from weftlora.adapted.updates import base_of
from weftlora.errors import MergeError
from weftlora.export import folder, live, record
from weftlora.export.folder import name_of, save_model
from weftlora.export.live import Outputs
from weftlora.export.lora import pairs
from weftlora.export.proof import TOLERANCE, Prover
from weftlora.export.record import Merge, SiteLoss
from weftlora.export.source import Inputs, Source, check_linear, inputs_of
from weftlora.host.stock_lora import without_adapters

# The 16 values of NF4: quantiles of a normal distribution scaled to [−1, 1], with an exact zero.
# Source: QLoRA, arXiv 2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64


def round_nf4(w: Tensor) -> Tensor:
    """W after NF4 in blocks of 64 with fp32 block maxima, fp32: what 4 bits keep (without double quantisation)."""
    flat = w.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    values = torch.tensor(NF4, device=w.device)
    nearest = torch.bucketize(blocks / largest, (values[1:] + values[:-1]) / 2)
    return (values[nearest] * largest).flatten()[: len(flat)].view_as(w)


def kept_by(dtype: torch.dtype, w: Tensor, delta: Tensor) -> Tensor:
    """The update that is left when both W + ΔW and W are rounded to `dtype`, fp64."""
    w64, delta64 = w.double(), delta.double()
    return (w64 + delta64).float().to(dtype).double() - w64.float().to(dtype).double()


def kept_by_nf4(w: Tensor, delta: Tensor) -> Tensor:
    """The update that is left in NF4, fp64."""
    return (round_nf4(w.float() + delta.float()) - round_nf4(w)).double()


LIMIT = 0.1
"""The share of the adapter's change of the logits (or, unverified, of ‖ΔW‖) that rounding may lose without being told so."""


@dataclass(frozen=True)
class Choices:
    """How to merge; see `weftlora.export.merge`."""

    dtype: torch.dtype | None
    verify: bool
    accept_loss: bool
    original: Checkpoint | None


def merge(source: Source, out: Path, choices: Choices, inputs: Inputs | None) -> Merge:
    """Write the folder; see `weftlora.export.merge`."""
    check(source, choices)
    again, dtype = stays_quantised(source, choices), choices.dtype or weight_dtype(source)
    done: list[Merge] = []

    with live.shell(source.model, source.adapters) as own:
        if choices.original is None and not again:
            live.dequantise(own)
        prover = Prover.of(own, source, inputs or inputs_of(source, None), {}) if choices.verify else None
        if choices.original is not None:
            live.dequantise(own, choices.original)
        nf4 = None if prover is None or again else logits_lost_to_nf4(own, source, prover)
        sites = quantise_updates(own, source) if again else add_updates(own, source, dtype)

        def fill(place: Path) -> None:
            save(own, source, place, None if again else dtype)
            named = format_of(base_of(source.model)) if again else None
            bare = replace(bare_record(out, source, sites, named or name_of(dtype), choices), lost_logits_nf4=nf4)
            done.append(measured(place, bare, choices, prover))
            (place / "README.md").write_text(record.merged(done[0], source), encoding="utf-8")

        folder.write(out, fill)
    return done[0]


def stays_quantised(source: Source, choices: Choices) -> bool:
    """Whether the sums are quantised again: the base is, and nobody names another type or the original."""
    quantised = any(is_quantised(layer.get_base_layer()) for layer in source.layers if layer.reading is None)
    return quantised and choices.dtype is None and choices.original is None


def check(source: Source, choices: Choices) -> None:
    """Refuse what has no merged form.

    Raises:
        MergeError: a routed adapter, a base that transformers cannot save, tied weights that would change twice, or a base that
            takes no update.
    """
    base = base_of(source.model)
    if not isinstance(base, PreTrainedModel):
        raise MergeError(
            f"a {type(base).__name__} is not a model of transformers, so there is no folder to write: use model.merge_and_unload()."
        )
    check_linear(source)
    for layer in source.layers:
        for name in source.adapters:
            if name in layer.weft_site and not layer.site(name).mergeable:
                structure = layer.site(name).structure.choice
                instead = ", or export its mean-gate approximation as a LoRA" if structure.routed else ""
                raise MergeError(
                    f"adapter {name!r} is {structure.method}, and {structure.no_closed_form}: serve it with weftlora{instead}."
                )
        check_base(layer, choices)
    tied = {id(p) for p in (base.get_input_embeddings().weight,) if base.get_output_embeddings() is not None}
    for layer in source.layers:
        if id(getattr(layer.get_base_layer(), "weight", None)) in tied:
            raise MergeError(
                f"{layer.module_name} shares its weight with the input embedding, so a merge would change both: export it as LoRA."
            )


def check_base(layer: WeftLayer, choices: Choices) -> None:
    """Refuse a base layer to which nothing can be added.

    Raises:
        MergeError: it is no x Wᵀ, or quantised and its quantiser takes or saves no other weight; experts with `original`.
    """
    if isinstance(layer, WeftExpertWeight):
        if choices.original is not None:
            raise MergeError(
                f"{layer.module_name} holds experts, whose matrices checkpoints keep under other names than the model: merge into the "
                "weights in memory (without original), or export the adapter as LoRA, which is exact."
            )
        layer.check_mergeable([])
        return
    base = layer.get_base_layer()
    if choices.original is not None or (choices.dtype is not None and is_quantised(base)):
        return
    instead = (
        "name a type for dequantised weights (dtype='bfloat16', --dtype bfloat16) or the folder of the unquantised checkpoint "
        "(original=..., --original), or export the adapter as LoRA, which is exact."
    )
    if is_quantised(base):
        quantiser = cast(WeftLinear, layer).quantiser
        if not can_be_requantised(base, quantiser):
            raise MergeError(
                f"{layer.module_name} is a {type(base).__name__}, a base kept in fewer bits that takes no other weight: {instead}"
            )
        if quantiser is not None and not saves(quantiser):
            raise MergeError(
                f"{layer.module_name} is a {type(base).__name__}, and transformers saves no model that is quantised so: {instead}"
            )
        return
    weight = getattr(base, "weight", None)
    if isinstance(base, (nn.Linear, Conv1D)) and weight is not None and type(weight.detach()) is Tensor:
        return
    raise MergeError(f"{layer.module_name} is a {type(base).__name__}, to which no update can be added: {instead}")


def saves(quantiser: Any) -> bool:
    """Whether a quantiser of transformers writes its models into folders; older versions ask for the way of saving."""
    found = quantiser.is_serializable
    return bool(found() if callable(found) else found)


def weight_dtype(source: Source) -> torch.dtype:
    """The dtype of the weights that are merged into, as they are in memory."""
    weights = (
        layer.weight if isinstance(layer, WeftExpertWeight) else getattr(layer.get_base_layer(), "weight", None)
        for layer in source.layers
    )
    return next((w.dtype for w in weights if w is not None and w.is_floating_point()), torch.float32)


def add_updates(own: nn.Module, source: Source, dtype: torch.dtype) -> list[SiteLoss]:
    """Give every adapted module of the shell its merged weight in `dtype`; the model that the shell borrows from keeps its own."""
    sites = []
    for layer, w, delta in updated(own, source):
        base = layer.get_base_layer()
        sites.append(site_loss(layer.module_name, w, delta, dtype))
        summed = (w + delta).to(dtype)
        if isinstance(layer, WeftExpertWeight):
            layer.put(summed)
        elif isinstance(base, Conv1D):
            base.weight = nn.Parameter(summed.T.contiguous(), requires_grad=False)
        else:
            layer.base_layer = live.linear(base, summed)
        if not torch.isfinite(summed).all():
            raise MergeError(
                f"merging into {layer.module_name} gives values that {name_of(dtype)} cannot hold, so nothing was merged: choose "
                "another dtype, or an adapter that has not diverged."
            )
    return sites


def quantise_updates(own: nn.Module, source: Source) -> list[SiteLoss]:
    """Give every adapted module of the shell its merged weight, quantised as its base is; a plain one among them keeps its type."""
    sites = []
    for layer, w, delta in updated(own, source):
        if isinstance(layer, WeftExpertWeight):
            sites.append(site_loss(layer.module_name, w, delta, layer.weight.dtype))
            layer.put((w + delta).to(layer.weight.dtype))
            continue
        base = layer.get_base_layer()
        if not is_quantised(base):
            dtype = cast(Tensor, base.weight).dtype
            sites.append(site_loss(layer.module_name, w, delta, dtype))
            layer.put_base(live.linear(base, (w + delta).to(dtype)))
            continue
        one = cast(WeftLinear, layer)
        one.put_base(requantised(base, w + delta, one.quantiser))
        off, norm = (one.base_matrix().float() - w - delta).double().norm(), float(delta.double().norm())
        bare = site_loss(layer.module_name, w, delta, torch.float32)
        sites.append(replace(bare, lost=float(off) / norm if norm else 0.0))
    return sites


def updated(own: nn.Module, source: Source) -> Iterator[tuple[WeftLayer, Tensor, Tensor]]:
    """Every adapted module of the shell with its W and its ΔW [out, in], of experts [E, out, in], fp32, one at a time."""
    updates = pairs(source, {})
    for layer in [m for m in own.modules() if isinstance(m, WeftLayer) and m.module_name in updates]:
        if isinstance(layer, WeftExpertWeight):
            w = layer.layout.matrix(layer.weight.detach()).float()
        else:
            w = cast(WeftLinear, layer).base_matrix().float()
        yield layer, w, updates[layer.module_name].delta().to(w.device, torch.float32)


def logits_lost_to_nf4(own: nn.Module, source: Source, prover: Prover) -> float:
    """‖(merged − base, both with the adapted weights in NF4) − (live − base)‖ / ‖live − base‖ over logits: 0 keeps the change."""
    after = in_nf4(own, source, prover, merged=True)
    return prover.lost_change(after, in_nf4(own, source, prover, merged=False))


def in_nf4(own: nn.Module, source: Source, prover: Prover, *, merged: bool) -> Outputs:
    """What the shell computes with its adapted weights in NF4: with the update in them, or as its base without any adapter."""
    replaced: list[tuple[Any, Any]] = []
    try:
        for layer, w, delta in updated(own, source):
            rounded = round_nf4(w + delta if merged else w)
            if isinstance(layer, WeftExpertWeight):
                replaced.append((layer, layer.weight))
                layer.put(rounded)
            else:
                replaced.append((layer, layer.get_base_layer()))
                layer.base_layer = live.linear(layer.get_base_layer(), rounded)
            replaced[-1][0].enable_adapters(False)
        with nullcontext() if merged else live.switched_off(own):  # merged, what was trained in full stays at work
            return live.forward_all(own, prover.inputs.batches)
    finally:
        for layer, before in replaced:
            if isinstance(layer, WeftExpertWeight):
                layer._put_weight(before)
            else:
                layer.base_layer = before
            layer.enable_adapters(True)


def site_loss(name: str, w: Tensor, delta: Tensor, dtype: torch.dtype) -> SiteLoss:
    """What rounding loses of one update ΔW [out, in] on W [out, in]."""
    norm = float(delta.double().norm())
    lost = [float((kept - delta.double()).norm()) for kept in (kept_by(dtype, w, delta), kept_by_nf4(w, delta))]
    return SiteLoss(name, norm, *((x / norm if norm else 0.0) for x in lost))


def save(own: nn.Module, source: Source, place: Path, dtype: torch.dtype | None) -> None:
    """The shell's model without adapters, everything in `dtype` (None: as it is), and its tokenizer where one is known."""
    plain = cast(Any, without_adapters(base_of(own), trained=True))
    if dtype is not None:
        cast_parameters(plain, dtype)
        plain.config.dtype = dtype
        live.forget_quantiser(plain)
    save_model(plain, place)
    tokenizer = source.tokenizer
    if tokenizer is None and source.base is not None and (Path(source.base) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(source.base, trust_remote_code=False)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every module parameters of its own in `dtype`; what was one parameter stays one."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_floating_point():
                new.setdefault(id(p), nn.Parameter(p.detach().to(dtype), requires_grad=False))
                setattr(module, name, new[id(p)])


def bare_record(out: Path, source: Source, sites: list[SiteLoss], dtype: str, choices: Choices) -> Merge:
    """What is known before the folder has been run."""
    whole = math.sqrt(sum(site.norm**2 for site in sites)) or 1.0
    lost = math.sqrt(sum((site.norm * site.lost) ** 2 for site in sites)) / whole
    lost_nf4 = math.sqrt(sum((site.norm * site.lost_nf4) ** 2 for site in sites)) / whole
    weights = "the weights it was trained on"
    if choices.original is not None:
        weights = "the weights of the unquantised checkpoint"
    elif choices.dtype is not None and (named := format_of(base_of(source.model))) is not None:
        weights = f"the weights it was trained on, dequantised from {named}"
    return Merge(out, source.adapters, dtype, weights, sites, lost, lost_nf4)


def measured(place: Path, bare: Merge, choices: Choices, prover: Prover | None) -> Merge:
    """What the written folder computes against the live adapter, and what was lost.

    Raises:
        MergeError: more was lost than `LIMIT` without `accept_loss`, or than fp32 allows.
    """
    exact = bare.dtype == "float32" and choices.original is None
    found = bare
    if prover is not None:
        outputs = prover.of_model(place)
        proof = prover.compared(outputs, TOLERANCE if exact else None)
        if exact and not proof.error <= TOLERANCE:
            raise MergeError(
                f"the merged model differs from the live adapter by {proof.error:.2g} of the largest logit (allowed: "
                f"{TOLERANCE:g}), so it was not kept: please report it."
            )
        found = replace(bare, proof=proof, lost_logits=prover.lost(outputs))
    share, of = (found.lost, "‖ΔW‖") if found.lost_logits is None else (found.lost_logits, "the change of the logits")
    if exact or share <= LIMIT:
        return found
    if not choices.accept_loss:
        worst = max(bare.sites, key=lambda site: site.lost)
        raise MergeError(
            f"merging into {bare.dtype} loses {share:.1%} of {of} (limit: {LIMIT:.0%}; {worst.lost:.1%} of ‖ΔW‖ at {worst.site}), "
            "so nothing was written: merge into float32, export the adapter as LoRA, or continue with accept_loss=True "
            "(--accept-loss)."
        )
    return replace(found, accepted=True)
