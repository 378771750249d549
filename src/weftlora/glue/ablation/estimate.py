"""Brackets to second order, for all slots from two forward and backward passes.

    last-in    −∂L/∂α_i + ½ F_i        at all gates 1
    first-in   −∂L/∂α_i                at all gates 0
    F_i = N Σ_rows (∂L_row/∂α_i)²      empirical Fisher of the gate; L_row is the row's share of L, N the labels that count

Every row has gates of its own, so one backward pass gives the gradients of all rows. After training ∂L/∂α at gate 1 is near 0,
which is why last-in needs the curvature. Source: ours; the paper has exact scores only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from weftlora.glue.ablation.exact import shares
from weftlora.glue.ablation.network import Network
from weftlora.glue.ablation.reference import SlotId
from weftlora.glue.ablation.rows import Batch
from weftlora.site import Site


def brackets(
    network: Network, sites: Sequence[Site], slots: Sequence[SlotId], batch: Batch, *, chunk_tokens: int | None = None
) -> Tensor:
    """[slots, 2, rows] fp64."""
    found = torch.zeros(len(slots), 2, len(batch["labels"]), dtype=torch.float64)
    size, replicas = shares(batch, chunk_tokens)
    size = size * replicas  # one replica of more rows
    for rows in torch.arange(len(batch["labels"])).split(size):
        part = {k: v[rows.to(v.device)] for k, v in batch.items()}
        for term, gate in enumerate((1.0, 0.0)):
            slope = gate_gradients(network, sites, part, gate)
            for n, (m, slot) in enumerate(slots):
                found[n, term, rows] = -slope[m][:, slot]
                if term == 0:
                    found[n, term, rows] += 0.5 * network.loss.count * slope[m][:, slot] ** 2
    return found


def gate_gradients(network: Network, sites: Sequence[Site], batch: Batch, gate: float) -> list[Tensor]:
    """∂L_row/∂α per site, [rows, slots] fp64 on the CPU, with every gate at `gate`."""
    leaves = []
    for site in sites:
        mask = cast(Tensor, site.mask)
        dtype = torch.promote_types(site.structure.factors(1.0).A.dtype, torch.float32)
        leaves.append(torch.full((len(batch["labels"]), len(mask)), gate, dtype=dtype, device=mask.device))
    try:
        with torch.enable_grad():
            for site, leaf in zip(sites, leaves, strict=True):
                site.keep = leaf.requires_grad_()
            loss = network.losses(batch).sum()
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    finally:
        for site in sites:
            site.keep = None
    return [
        torch.zeros(leaf.shape, dtype=torch.float64) if slope is None else slope.double().cpu()
        for leaf, slope in zip(leaves, slopes, strict=True)
    ]
