"""Encoded rows into a dataset, and the account of every row that went in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weftlora.data.encode import IGNORE, Encode, Encoded
from weftlora.data.examples import Example
from weftlora.data.split import repeats, sample
from weftlora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one split: `read = unused + empty + dropped + kept`.

    `rows` are the dataset's rows: `kept`, or more where long documents of plain text became several. `unused` rows are
    beyond the limit, `empty` ones have no answer or no text (blank lines among them), `dropped` ones no answer within
    the length. Of the kept rows, `truncated` ones lost tokens and `repeated` ones are copies of an earlier row;
    `in_train` counts the rows of a given validation or test file that are copies of a training row. `tokens` are those
    of `input_ids`, `answer_tokens` those the loss is averaged over (0 for classification, which has one class a row).
    """

    read: int
    unused: int
    empty: int
    dropped: int
    kept: int
    rows: int
    truncated: int
    repeated: int
    in_train: int
    tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Split:
    """One split before encoding: its examples, the empty lines passed on the way, and how errors call it."""

    name: str
    rows: list[Example]
    blank: int = 0
    in_train: int = 0


def tally(split: Split, encode: Encode, limit: int | None, seed: int) -> tuple[Dataset, Counts]:
    """Draw, encode and count the rows of `split`. Raises DataError when none is left."""
    drawn = [split.rows[index] for index in sample(len(split.rows), limit, seed)]
    filled = [row for row in drawn if not row.empty]
    encoded = encode(filled)
    kept = [(row, parts) for row, parts in zip(filled, encoded, strict=True) if parts]
    flat = [(row, part) for row, parts in kept for part in parts]
    counts = Counts(
        read=len(split.rows) + split.blank,
        unused=len(split.rows) - len(drawn),
        empty=len(drawn) - len(filled) + split.blank,
        dropped=len(filled) - len(kept),
        kept=len(kept),
        rows=len(flat),
        truncated=sum(any(part.truncated for part in parts) for _, parts in kept),
        repeated=repeats([row.key() for row, _ in kept]),
        in_train=split.in_train,
        tokens=sum(len(part.input_ids) for _, part in flat),
        answer_tokens=sum(_answer_tokens(part) for _, part in flat),
    )
    if not flat:
        raise DataError(
            f"no row of {split.name} is left to use: of {counts.read}, {counts.empty} are empty and {counts.dropped} "
            "have no answer within data.max_length; raise it, or set data.truncate: completion."
        )
    return _dataset(flat), counts


def _answer_tokens(row: Encoded) -> int:
    """Labels of a decoder's first token bear no loss; those of a decoder that has its own input all do."""
    if isinstance(row.labels, int):
        return 0
    return sum(label != IGNORE for label in row.labels[row.shifted :])


def _dataset(flat: Sequence[tuple[Example, Encoded]]) -> Dataset:
    from datasets import Dataset

    columns: dict[str, list[Any]] = {
        "input_ids": [part.input_ids for _, part in flat],
        "attention_mask": [[1] * len(part.input_ids) for _, part in flat],
        "labels": [part.labels for _, part in flat],
    }
    if flat[0][1].prompt is not None:
        columns["prompt"] = [part.prompt for _, part in flat]
        columns["completion"] = [part.answer for _, part in flat]
    if flat[0][0].domain is not None:
        columns["domain"] = [row.domain for row, _ in flat]
    return Dataset.from_dict(columns)
