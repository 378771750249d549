"""What routers do over rows: how much of each head is used, how sharply, and for which domain.

    ω_n        the weight that head n is used with
    mean_n     mean of ω_n over tokens
    entropy    mean over tokens of −Σ ω ln ω / ln N            1: every token mixes all heads evenly
    balance    −Σ mean ln mean / ln N                           1: all heads are used equally over the data
    top1_n     share of tokens whose largest ω is head n's
    knows      mutual information of head and domain             0: every domain uses the heads alike

and what the heads give, whatever the router makes of it, for every row:

    o_n = mean over the row's tokens of s Bₙ A x        their principal axes; shares of variance between heads and between domains

Source of the latter: HydraLoRA's figures of adapters by domain (arXiv 2404.19245, figures 3 and 9), a t-SNE of weights. Here it is
what the heads of one adapter do to rows of several domains, along principal axes, which have a scale.

Entropy 1 with balance 1 is a router that does nothing; entropy 0 with balance 1 one that divides the tokens among its heads.
Padding is left out where a site sees tokens in the shape of a mask: the attention mask, also flattened, and in the decoder of
an encoder-decoder its own mask, or else the labels'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLinear
from weftlora.adapted.routing import Seen, counted, information, routing
from weftlora.adapted.updates import base_of
from weftlora.adapter.site import Site
from weftlora.errors import AdapterError
from weftlora.inspection.record import HeadOutputs, HeadPoint, Routers, SiteUsage, Usage
from weftlora.inspection.subject import Rows
from weftlora.kernel import switched
from weftlora.progress import Progress, Tick
from weftlora.runs.scores import evaluating
from weftlora.schedule.direction_ranking import MeanGate
from weftlora.settings import IGNORE


class Outputs:
    """Mean inputs of one site, a row of data each, and their domains."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.domains: list[str] = []

    def add(self, x: Tensor, masks: list[Tensor], domain: str) -> None:
        """Take in what the site read, [batch, tokens, in]; an input of another shape cannot be told apart by rows."""
        if x.dim() != 3:
            return
        mask = next((m for m in masks if m.shape == x.shape[:2]), torch.ones(x.shape[:2], device=x.device)).bool()
        for row, kept in zip(x.detach(), mask, strict=True):
            if kept.any():
                self.inputs.append(row[kept].double().mean(0).cpu())
                self.domains.append(domain)

    def found(self, name: str, site: Site, drawn: bool) -> HeadOutputs | None:
        """None where fewer than two rows were told apart, or the heads give nothing yet."""
        f = site.factors()
        if len(self.inputs) < 2:
            return None
        a, b = f.A.detach().double().cpu(), f.B.detach().double().cpu()
        u = f.scale * torch.stack(self.inputs) @ a.T
        u = u if f.gate is None else u * f.gate.detach().double().cpu()
        given = torch.einsum("tr,onr->tno", u, b.unflatten(1, (f.heads, len(a))))  # [rows, heads, out]
        apart = given - given.mean((0, 1))
        whole = float(apart.square().sum())
        if not whole:
            return None
        within = given - given.mean(0)
        names = list(dict.fromkeys(self.domains))
        groups = [torch.tensor([n for n, d in enumerate(self.domains) if d == name]) for name in names]
        between = sum(len(rows) * float(within[rows].mean(0).square().sum()) for rows in groups)
        rest = float(within.square().sum())
        several = len(names) > 1 and rest > 0
        points = apart.flatten(0, 1)
        values, axes = torch.linalg.eigh(points @ points.T)  # of the points, not of the outputs, which are more
        values, axes = values.flip(0)[:2].clamp_min(0), axes.flip(1)[:, :2]
        axes = axes * torch.where(axes.gather(0, axes.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
        at = (axes * values.sqrt()).unflatten(0, given.shape[:2]).tolist()
        return HeadOutputs(
            site=name,
            between_heads=1 - rest / whole,
            between_domains=between / rest if several else None,
            chance=(len(names) - 1) / (len(self.inputs) - 1) if several else None,
            explained=(values / whole).tolist(),
            points=[
                HeadPoint(domain, head, *place)
                for domain, heads in zip(self.domains, at, strict=True)
                for head, place in enumerate(heads, 1)
            ]
            if drawn
            else [],
        )


DRAWN = 8
"""Sites whose head outputs are drawn."""


@contextmanager
def _reading(model: nn.Module, into: Mapping[str, Outputs], masks: list[Tensor], domain: str) -> Iterator[None]:
    """Take in what the modules of these sites read within the block; each computes itself, so that it is asked."""
    handles = []
    for layer in (m for m in model.modules() if isinstance(m, WeftLinear) and m.module_name in into):

        def take(module: nn.Module, given: tuple[Any, ...], found: Outputs = into[layer.module_name]) -> None:
            found.add(given[0], masks, domain)

        handles.append(layer.register_forward_pre_hook(take))
    try:
        with switched(groups=False, mlp=False):
            yield
    finally:
        for handle in handles:
            handle.remove()


def measure_usage(
    model: nn.Module, sites: Mapping[str, Site], adapter: str, rows: Rows, progress: Progress
) -> tuple[Routers, dict[str, MeanGate]]:
    """The routers of `sites` over `rows`, and their mean gates; nothing in the model changes.

    Raises:
        AdapterError: the adapter is not the active one, so that its routers do not run.
    """
    seen: dict[str, dict[str, Seen]] = {name: {} for name in sites}
    outputs = {name: Outputs() for name in sites}
    total, done = sum(map(len, rows.batches.values())), 0
    prefix = _prefix(model)
    device = next(model.parameters()).device
    with evaluating(model):
        for domain, batches in rows.batches.items():
            for batch in batches:
                inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                masks = _masks(model, inputs)
                with routing(model) as record, _reading(model, outputs, masks, domain):
                    model(**inputs)
                for name, calls in record.omega.items():
                    if (site := _of(name.removeprefix(prefix), adapter)) in seen:
                        for omega in calls:
                            into = seen[site].setdefault(domain, Seen(omega.shape[-1]))
                            into.add(counted(record.used(name, omega), masks))
                done += 1
                progress(Tick("routers", done, total))
    ran = {name: parts for name, parts in seen.items() if any(part.tokens for part in parts.values())}
    if not ran:
        raise AdapterError(
            f"no router of adapter {adapter!r} saw a token: make it the active adapter (model.set_adapter), and give rows."
        )
    found = [_site_usage(name, parts) for name, parts in ran.items()]
    gates = {name: _gate(sites[name], parts.values()) for name, parts in ran.items()}
    every = max(1, math.ceil(len(sites) / DRAWN))
    gave = [outputs[name].found(name, site, n % every == 0) for n, (name, site) in enumerate(sites.items())]
    domains = [name for name in rows.batches if name]
    return Routers(rows.source, rows.count, found, domains, [each for each in gave if each is not None]), gates


def _site_usage(name: str, parts: Mapping[str, Seen]) -> SiteUsage:
    domains = {domain: part for domain, part in parts.items() if domain and part.tokens}
    known = information(domains.values()) if len(domains) > 1 else None
    return SiteUsage(name, usage(Seen.pooled(parts.values())), {d: usage(part) for d, part in domains.items()}, known)


def usage(seen: Seen) -> Usage:
    """The figures over what was seen; at least one token must have been."""
    return Usage(
        tokens=seen.tokens,
        mean=seen.mean.tolist(),
        entropy=seen.sharpness,
        balance=seen.balance,
        top1=(seen.top / seen.tokens).tolist(),
    )


def _gate(site: Site, parts: Iterable[Seen]) -> MeanGate:
    found = list(parts)
    tokens = torch.tensor([sum(part.tokens for part in found)], dtype=torch.float64)
    return MeanGate(site, torch.cat([torch.stack([part.total for part in found]).sum(0), tokens]))


def _prefix(model: nn.Module) -> str:
    """What names in `model` have in front of those in the base it wraps."""
    inner = base_of(model)
    return next((f"{name}." for name, module in model.named_modules() if module is inner and name), "")


def _of(name: str, adapter: str) -> str:
    """The site behind a record's name, which says the adapter where several are active."""
    return name.removesuffix(f"[{adapter}]")


def _masks(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Which tokens are no padding, [batch, tokens] each: of the input and, in an encoder-decoder, of the decoder.

    Labels of the input's own shape get a column of padding, in place, so that the two sides can be told apart.
    """
    held = (inputs.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    masks = [mask for mask in held if isinstance(mask, Tensor)]
    labels, given = inputs.get("labels"), inputs.get("input_ids")
    sides = getattr(getattr(base_of(model), "config", None), "is_encoder_decoder", False)
    if not sides or not isinstance(labels, Tensor) or any(name.startswith("decoder_") for name in inputs):
        return masks
    if isinstance(given, Tensor) and labels.shape == given.shape:
        labels = inputs["labels"] = nn.functional.pad(labels, (0, 1), value=IGNORE)
    return [*masks, labels != IGNORE]
