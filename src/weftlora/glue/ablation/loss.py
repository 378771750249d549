"""Cross-entropy by row, from logits, in the way that the model itself computes its loss.

    token models     ℓ = Σ over label tokens of −log p, divided by the number of label tokens of the whole batch
    classifiers      ℓ = −log p(label), divided by the number of rows

log p in fp32 (fp64 for fp64 logits), sums in fp64, so that neither chunks nor processes show in it. Whether labels are
shifted by one token is found by comparing with the model's own loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from weftlora.errors import ConfigError
from weftlora.glue.ablation.rows import IGNORE

Kind = Literal["classes", "tokens", "next tokens"]


@dataclass(frozen=True)
class RowLoss:
    """`kind`: which labels belong to which logits; `count`: how many labels the batch has."""

    kind: Kind
    count: int

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [rows, (tokens,) classes], labels [rows(, tokens)] → [rows] fp64, which sum to the loss of the batch."""
        if self.kind == "next tokens":
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        counted = wanted != IGNORE
        return self.summed(flat[counted], wanted[counted], self.rows_of(labels)[counted], len(labels))

    def summed(self, logits: Tensor, wanted: Tensor, rows: Tensor, count: int) -> Tensor:
        """[count] fp64 from the logits [labels, classes] of labels that count, with the row each stands in."""
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(exact, wanted, reduction="none").double()
        return torch.zeros(count, dtype=torch.float64, device=losses.device).index_add(0, rows, losses) / self.count

    @staticmethod
    def rows_of(labels: Tensor) -> Tensor:
        """The row of every label, flat."""
        return torch.arange(len(labels), device=labels.device).repeat_interleave(labels[0].numel())


def recognise(logits: Tensor, labels: Tensor, loss: Tensor | None) -> RowLoss | None:
    """How `loss` comes from these logits and labels; None if it is no cross-entropy over them.

    Raises:
        ConfigError: the model gives no loss, or one that is not finite.
    """
    if loss is None:
        raise ConfigError("the model returns no loss for the validation rows: its forward must take `labels`.")
    if not bool(loss.isfinite().all()):
        raise ConfigError(
            f"the loss of the validation rows is {float(loss)}: no label of theirs counts, or the training has diverged."
        )
    if not isinstance(logits, Tensor) or labels.is_floating_point():
        return None
    found: list[RowLoss] = []
    if labels.dim() == 1 and logits.dim() == 2 and len(logits) == len(labels):
        found = [RowLoss("classes", int((labels != IGNORE).sum()))]
    elif labels.dim() == 2 and logits.shape[:-1] == labels.shape:
        found = [
            RowLoss("next tokens", int((labels[:, 1:] != IGNORE).sum())),
            RowLoss("tokens", int((labels != IGNORE).sum())),
        ]
    apart = {
        float((kind(logits, labels).sum().cpu() - loss.double().cpu()).abs()): kind for kind in found if kind.count
    }
    nearest = min(apart, default=None)
    return apart[nearest] if nearest is not None and nearest <= 1e-3 * abs(float(loss)) else None
