"""What routers do over rows: how much of each head is used, how sharply, and for which domain.

    ω_n        the weight that head n is used with
    mean_n     mean of ω_n over tokens
    entropy    mean over tokens of −Σ ω ln ω / ln N            1: every token mixes all heads evenly
    balance    −Σ mean ln mean / ln N                           1: all heads are used equally over the data
    top1_n     share of tokens whose largest ω is head n's

Entropy 1 with balance 1 is a router that does nothing; entropy 0 with balance 1 one that divides the tokens among its heads.
Padding is left out where a site sees tokens in the shape of a mask: the attention mask, also flattened, and in the decoder of
an encoder-decoder its own mask, or else the labels'.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weftlora.adapted.routing import routing
from weftlora.adapted.updates import base_of
from weftlora.adapter.site import Site
from weftlora.errors import AdapterError
from weftlora.inspection.record import Routers, SiteUsage, Usage
from weftlora.inspection.subject import Rows
from weftlora.progress import Progress, Tick
from weftlora.runs.scores import evaluating
from weftlora.schedule.direction_ranking import MeanGate
from weftlora.settings import IGNORE


class Seen:
    """Running sums over the tokens of one router, fp64."""

    def __init__(self, heads: int):
        self.tokens = 0
        self.entropy = 0.0
        self.total = torch.zeros(heads, dtype=torch.float64)
        self.top = torch.zeros(heads, dtype=torch.float64)

    def add(self, omega_tn: Tensor) -> None:
        """Take in the weights [T, N] of T tokens."""
        omega = omega_tn.detach().double().cpu()
        self.tokens += len(omega)
        self.entropy += float(torch.special.entr(omega).sum())
        self.total += omega.sum(0)
        self.top += torch.bincount(omega.argmax(-1), minlength=omega.shape[-1])

    def usage(self) -> Usage:
        """The figures over what was seen; at least one token must have been."""
        mean, full = self.total / self.tokens, math.log(len(self.total))
        return Usage(
            tokens=self.tokens,
            mean=mean.tolist(),
            entropy=self.entropy / self.tokens / full,
            balance=float(torch.special.entr(mean).sum()) / full,
            top1=(self.top / self.tokens).tolist(),
        )


def measure_usage(
    model: nn.Module, sites: Mapping[str, Site], adapter: str, rows: Rows, progress: Progress
) -> tuple[Routers, dict[str, MeanGate]]:
    """The routers of `sites` over `rows`, and their mean gates; nothing in the model changes.

    Raises:
        AdapterError: the adapter is not the active one, so that its routers do not run.
    """
    seen: dict[str, dict[str, Seen]] = {name: {} for name in sites}
    total, done = sum(map(len, rows.batches.values())), 0
    prefix = _prefix(model)
    device = next(model.parameters()).device
    with evaluating(model):
        for domain, batches in rows.batches.items():
            for batch in batches:
                inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                masks = _masks(model, inputs)
                with routing(model) as record:
                    model(**inputs)
                for name, calls in record.omega.items():
                    if (site := _of(name.removeprefix(prefix), adapter)) in seen:
                        for omega in calls:
                            into = seen[site].setdefault(domain, Seen(omega.shape[-1]))
                            into.add(_counted(record.used(name, omega), masks))
                done += 1
                progress(Tick("routers", done, total))
    ran = {name: parts for name, parts in seen.items() if any(part.tokens for part in parts.values())}
    if not ran:
        raise AdapterError(
            f"no router of adapter {adapter!r} saw a token: make it the active adapter (model.set_adapter), and give rows."
        )
    found = [_site_usage(name, parts) for name, parts in ran.items()]
    gates = {name: _gate(sites[name], parts.values()) for name, parts in ran.items()}
    return Routers(rows.source, rows.count, found, [name for name in rows.batches if name]), gates


def _site_usage(name: str, parts: Mapping[str, Seen]) -> SiteUsage:
    whole = Seen(len(next(iter(parts.values())).total))
    for part in parts.values():
        whole.tokens += part.tokens
        whole.entropy += part.entropy
        whole.total += part.total
        whole.top += part.top
    return SiteUsage(name, whole.usage(), {d: part.usage() for d, part in parts.items() if d and part.tokens})


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


def _counted(omega: Tensor, masks: list[Tensor]) -> Tensor:
    """The weights [T, N] of the tokens that are no padding."""
    flat = omega.flatten(0, -2)
    for mask in masks:
        if mask.shape == omega.shape[:-1] or (omega.dim() == 2 and mask.dim() == 2 and mask.numel() == len(flat)):
            return flat[mask.flatten().bool()]
    return flat
