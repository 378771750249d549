"""Rows of different lengths into one rectangular batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weftlora.errors import ConfigError
from weftlora.settings import IGNORE


@dataclass(frozen=True)
class Collator:
    """Pads on the right: `input_ids` with `pad_token_id`, `attention_mask` with 0, `labels` with −100.

    Called with rows of a `Loaded` split, returns int64 tensors: `input_ids` and `attention_mask` [batch, time], and
    `labels` [batch, time] (causal), [batch, answer time] (seq2seq) or [batch] (classification; absent where the rows
    have none). With `pad_to_multiple_of`, times are rounded up to it. Raw columns are left out, except those in `keep`,
    which come as lists.

    The padding is masked out, so a tokenizer without a padding token may give its end-of-text token here.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise ConfigError(
                f"Collator(pad_token_id={self.pad_token_id!r}) cannot pad: give the tokenizer's pad_token_id, "
                "or its eos_token_id where it has none."
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"Collator(pad_to_multiple_of={self.pad_to_multiple_of}) must be at least 1, or None.")

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            "input_ids": self._padded([row["input_ids"] for row in features], self.pad_token_id),
            "attention_mask": self._padded([row["attention_mask"] for row in features], 0),
        }
        if "labels" in features[0]:
            labels = [row["labels"] for row in features]
            whole = isinstance(labels[0], int)
            batch["labels"] = torch.tensor(labels, dtype=torch.int64) if whole else self._padded(labels, IGNORE)
        batch |= {name: [row[name] for row in features] for name in self.keep}
        return batch

    def _padded(self, rows: list[Sequence[int]], fill: int) -> Tensor:
        length = max(len(row) for row in rows)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        out = torch.full((len(rows), length), fill, dtype=torch.int64)
        for number, row in enumerate(rows):
            out[number, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        return out
