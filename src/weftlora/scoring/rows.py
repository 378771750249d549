"""Validation rows for scoring, in any form that users have them: rows, a DataLoader, or a list of batches.

A row is a dict of lists, numbers or tensors without a batch axis; a batch is a dict of tensors with one. Rows of unequal length are
padded on the right: `labels` with −100, everything else with 0, and an `attention_mask` is made if there is none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from weftlora.errors import ConfigError, DataError
from weftlora.settings import IGNORE

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows to draw from. A copy of a model shares them."""

    items: Any  # a sequence of rows, or a map-style dataset
    collate: Callable[[list[Any]], Mapping[str, Any]]

    def draw(self, count: int, seed: str, *, other: bool = False) -> Batch:
        """`count` rows (all, if there are fewer), chosen by `seed` alone, as one batch on the CPU.

        What is random in the dataset or its collate_fn (masked tokens) is drawn by `seed` too, and moves no generator of the run.

        Args:
            other: from the rows that this draw leaves.

        Raises:
            DataError: no label of these rows counts, or no row is left.
        """
        everything = range(len(self.items))
        chosen = random.Random(f"rows/{seed}").sample(everything, min(count, len(everything)))
        if other:
            left = sorted(set(everything) - set(chosen))
            chosen = random.Random(f"other rows/{seed}").sample(left, min(count, len(left)))
        if not chosen:
            raise DataError(
                f"all {len(everything)} validation rows are drawn, so there are no others to compare with: give more."
            )
        with _own_dice(seed):
            collated = self.collate([self.items[n] for n in sorted(chosen)])
        batch = {k: v for k, v in collated.items() if isinstance(v, Tensor)}
        labels = batch.get("labels")
        if labels is None or not labels.numel():
            raise DataError(
                "the validation rows have no `labels`, so there is no loss to decide by where rank moves: add them."
            )
        if not labels.is_floating_point() and bool((labels == IGNORE).all()):
            raise DataError(
                f"every label of the {len(chosen)} validation rows drawn is ignored ({IGNORE}), so no loss exists: give rows with "
                "answers, or more of them."
            )
        return batch

    @property
    def tokens(self) -> float | None:
        """Of a row, on average over some of them, evenly spaced; None where rows have none."""
        return tokens_of(self.items)

    def __deepcopy__(self, memo: Any) -> Rows:
        return self


SAMPLED = 64
"""Rows whose tokens are counted: their mean decides between ways whose costs differ by factors."""


def tokens_of(items: Any) -> float | None:
    """Of a row of a sequence or map-style dataset, on average; None where its rows have no `input_ids`, or it has no length."""
    try:
        count = len(items)
        places = sorted({round(i * (count - 1) / (SAMPLED - 1)) for i in range(SAMPLED)}) if count else []
        lengths = [len(items[place]["input_ids"]) for place in places]
    except (TypeError, KeyError, IndexError, AttributeError):
        return None
    return sum(lengths) / len(lengths) if lengths else None


@contextmanager
def _own_dice(seed: str) -> Iterator[None]:
    """Python's, numpy's and torch's generators on the CPU, seeded for the length of the block."""
    number = random.Random(f"dice/{seed}").getrandbits(32)
    python, its = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(number)
            random.seed(number)
            np.random.seed(number)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(its)


def rows_of(validation: Any) -> Rows:
    """The rows of a dataset or sequence of rows, of a DataLoader (its dataset and collate_fn), or of batches.

    Raises:
        ConfigError: none of these.
        DataError: it has no rows.
    """
    if isinstance(validation, Rows):
        return _not_empty(validation)
    if isinstance(validation, DataLoader):
        if hasattr(validation.dataset, "__len__") and validation.collate_fn is not None:
            return _not_empty(Rows(validation.dataset, validation.collate_fn))
        validation = list(validation)
    if isinstance(validation, Mapping) or not isinstance(validation, Iterable):
        raise ConfigError(
            f"validation={type(validation).__name__} is nothing to draw rows from: give a list of rows, a dataset, a DataLoader or "
            "a list of batches."
        )
    if not (hasattr(validation, "__getitem__") and hasattr(validation, "__len__")):
        validation = list(validation)
    if len(validation) and not isinstance(validation[0], Mapping):
        raise ConfigError(
            f"a validation row is a {type(validation[0]).__name__}, not a dict such as {{'input_ids': ..., 'labels': ...}}: give "
            "dicts of what the model's forward takes."
        )
    if len(validation) and _is_batch(validation[0]):
        validation = [row for batch in validation for row in _apart(batch)]
    return _not_empty(Rows(validation, pad))


def _not_empty(rows: Rows) -> Rows:
    if not len(rows.items):
        raise DataError("validation has no rows, and they decide where rank moves: give some.")
    return rows


def _is_batch(item: Mapping[str, Any]) -> bool:
    if "input_ids" in item:
        return isinstance(item["input_ids"], Tensor) and item["input_ids"].dim() > 1
    tensors = list(item.values())
    if not all(isinstance(t, Tensor) and t.dim() > 0 for t in tensors):
        return False
    return len({len(t) for t in tensors}) == 1


def _apart(batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > 0}
    return [{k: v[n] for k, v in tensors.items()} for n in range(len(batch["labels"]))]


def pad(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """One batch of `rows`."""
    made = [{k: torch.as_tensor(v) for k, v in row.items() if _is_numbers(v)} for row in rows]
    lengths = {len(row["input_ids"]) for row in made if "input_ids" in row}
    if len(lengths) > 1:
        for row in made:
            row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    return {k: _stack([row[k] for row in made], IGNORE if k == "labels" else 0) for k in made[0]}


def _is_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_numbers(each) for each in value)
    return isinstance(value, (Tensor, int, float)) or type(value).__module__ == "numpy"


def _stack(values: list[Tensor], fill: int) -> Tensor:
    if values[0].dim() == 0 or len({v.shape for v in values}) == 1:
        return torch.stack(values)
    length = max(len(v) for v in values)
    return torch.stack([F.pad(v, (*(0, 0) * (v.dim() - 1), 0, length - len(v)), value=fill) for v in values])
