"""Rows of different lengths into one rectangular batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weftlora.errors import ConfigError
from weftlora.settings import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Collator:
    """Pads on the right: `input_ids` with `pad_token_id`, `attention_mask` with 0, `labels` with −100.

    Called with rows of a `Loaded` split, returns int64 tensors: `input_ids` and `attention_mask` [batch, time], and
    `labels` [batch, time] (causal), [batch, answer time] (seq2seq) or [batch] (classification; absent where the rows
    have none). With `pad_to_multiple_of`, times are rounded up to it. Raw columns are left out, except those in `keep`,
    which come as lists.

    Packed rows (`packed`) come with `position_ids` that begin at 0 for each of the rows they are made of, and without an
    `attention_mask`: that is how models of transformers tell that these do not see each other. With `flat`, a batch is one row
    of that kind, [1, time], and nothing is padded; a first token of theirs has no label, since nothing predicts it. That is for flash
    attention, which takes rows apart by their positions; others would work on a mask of time × time.

    The padding is masked out, so a tokenizer without a padding token may give its end-of-text token here.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    keep: tuple[str, ...] = ()
    flat: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise ConfigError(
                f"Collator(pad_token_id={self.pad_token_id!r}) cannot pad: give the tokenizer's pad_token_id, "
                "or its eos_token_id where it has none."
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigError(f"Collator(pad_to_multiple_of={self.pad_to_multiple_of}) must be at least 1, or None.")

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.flat:
            return _flattened(features)
        mask = self._padded([row["attention_mask"] for row in features], 0)
        batch: dict[str, Any] = {"input_ids": self._padded([row["input_ids"] for row in features], self.pad_token_id)}
        batch |= {"position_ids": positions(mask)} if int(mask.max()) > 1 else {"attention_mask": mask}
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


def _flattened(features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The rows of a batch, packed or not, one behind the other."""
    tokens: list[int] = []
    labels: list[int] = []
    places: list[int] = []
    for row in features:
        numbers = list(row["attention_mask"])
        begins = [at for at, number in enumerate(numbers) if at == 0 or number != numbers[at - 1]]
        own = list(row["labels"])
        for start, end in zip(begins, [*begins[1:], len(numbers)], strict=True):
            own[start] = IGNORE
            places += range(end - start)
        tokens += row["input_ids"]
        labels += own
    columns = {"input_ids": tokens, "position_ids": places, "labels": labels}
    return {name: torch.tensor([values], dtype=torch.int64) for name, values in columns.items()}


def positions(numbers: Tensor) -> Tensor:
    """Positions [batch, time] that begin at 0 wherever the number of the packed row [batch, time] changes, padding included.

    >>> positions(torch.tensor([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    time = torch.arange(numbers.shape[1]).expand_as(numbers)
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return time - torch.where(begins, time, 0).cummax(1).values


def packed(split: Dataset, max_length: int, folder: Path | None = None) -> Dataset:
    """Rows of up to `max_length` tokens made of those of `split`, best fit first, by trl.

    `attention_mask` holds which of its rows each token is of (1, 2, ...), and a first token has no label: nothing predicts it.
    """
    from trl.data_utils import pack_dataset

    def numbered(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        labels, masks = [], []
        for held, lengths in zip(batch["labels"], batch["seq_lengths"], strict=True):
            masks.append([number for number, length in enumerate(lengths, start=1) for _ in range(length)])
            firsts = {sum(lengths[:number]) for number in range(len(lengths))}
            labels.append([IGNORE if at in firsts else label for at, label in enumerate(held)])
        return {"labels": labels, "attention_mask": masks}

    def options(name: str) -> dict[str, Any]:
        kept = {} if folder is None else {"cache_file_name": str(folder / name), "load_from_cache_file": False}
        return {**kept, "new_fingerprint": f"{split._fingerprint}-{name}"}

    tokens = split.select_columns(["input_ids", "labels"])
    made = pack_dataset(tokens, max_length, "bfd", options("packing.arrow"))
    made = made.map(numbered, batched=True, remove_columns=["seq_lengths"], **options("train-packed.arrow"))
    if folder is not None:
        (folder / "packing.arrow").unlink(missing_ok=True)
    return made
