"""Losses and scores on held-out rows.

loss        Σ −log p(answer token) / number of answer tokens        perplexity = e^loss
macro-F1    mean over classes of 2·tp / (2·tp + fp + fn); a class that neither occurs nor is predicted is left out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weftlora.glue.modes import in_mode
from weftlora.train.progress import Progress, Tick, ignore

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Measured:
    """The sum of −log p over `count` answer tokens (rows, for a classifier), in nats, and the predicted classes."""

    total: float
    count: int
    predicted: list[int]

    @classmethod
    def pooled(cls, parts: Iterable[Measured]) -> Measured:
        """What was measured on all rows, from disjoint parts of them: losses weigh by token."""
        each = list(parts)
        return cls(
            sum(part.total for part in each),
            sum(part.count for part in each),
            [label for part in each for label in part.predicted],
        )

    @property
    def loss(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode before is put back."""
    with in_mode(model, training=False), torch.no_grad():
        yield


def batches(rows: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a dataset in order, `size` at a time."""
    for start in range(0, len(rows), size):
        columns = rows[start : start + size]
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def mean_loss(model: Any, rows: Any, collate: Collate, size: int, progress: Progress = ignore) -> Measured:
    """The loss of `model` on tokenised `rows` (input_ids, attention_mask, labels), without what an adapter adds to it in training.

    So the base that holds the adapter is called: around it, stock AdaLoRA adds its penalty to every loss, and cannot run at all
    once it is loaded.
    """
    forward = model.get_base_model() if isinstance(model, PeftModel) else model
    total, count, predicted = 0.0, 0, list[int]()
    rows = rows.select_columns(["input_ids", "attention_mask", "labels"])
    causal = not model.config.is_encoder_decoder
    with evaluating(model):
        for done, batch in enumerate(batches(rows, size), start=1):
            inputs = {key: value.to(model.device) for key, value in collate(batch).items()}
            output = forward(**inputs)
            labels = inputs["labels"]
            if labels.dim() == 1:
                scored = len(labels)
                predicted += output.logits.argmax(-1).tolist()
            else:
                scored = int((labels[:, 1:] if causal else labels).ne(-100).sum())
            if scored:
                total += float(output.loss) * scored
                count += scored
            progress(Tick("loss", done, math.ceil(len(rows) / size), total / max(count, 1)))
    return Measured(total, count, predicted)


def accuracy(predicted: Sequence[int], actual: Sequence[int]) -> float:
    """The share of rows whose class was predicted."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(list(actual), list(predicted)))


def macro_f1(predicted: Sequence[int], actual: Sequence[int]) -> float:
    """Unweighted mean of the F1 of the classes that occur or are predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(list(actual), list(predicted), average="macro", zero_division=0))
