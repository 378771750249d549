"""What comes of loading: tokenised splits, and the account of how they came about; and a look at what of a row is learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weftlora.data.config import Format, Task
from weftlora.foreign_text import shortened, visible
from weftlora.settings import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BOOKS = {"index": "int64", "truncated": "bool", "joined": "bool", "answer_tokens": "int32"}
"""Columns that rows are counted by, and that no split keeps."""


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one split: `read = unused + empty + dropped + kept`.

    `rows` are the dataset's rows: `kept`, or more where long documents of plain text became several, or a conversation a row per
    answer. `unused` rows are beyond the limit, `empty` ones have no answer or no text (blank lines among them), `dropped` ones no
    answer within the length. Of the kept rows, `truncated` ones lost tokens and `repeated` ones are copies of an earlier row;
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
class Loaded:
    """Tokenised splits and the account of how they came about.

    Columns: `input_ids`, `attention_mask` and `labels` (lists of int; one int for classification), and where the format
    has them the raw `prompt`, `completion` and `domain`. `labels` are the class names by number, `domains` the names
    that occur, `hashes` the SHA-256 of each file read, `max_length` the length in tokens that rows were held to.
    `columns` says of each file in a line what was made of its columns, `notes` what else a person should know.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    task: Task
    format: Format
    labels: list[str] | None
    domains: list[str]
    counts: dict[str, Counts]
    hashes: dict[str, str]
    max_length: int
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sources: tuple[tuple[str, int], ...] = ()
    """Each file that was read, and its rows."""


Piece = tuple[str, bool]
"""A stretch of text, and whether it is learned."""


def shown(split: Dataset, tokenizer: PreTrainedTokenizerBase, rows: int = 3) -> Iterator[list[Piece]]:
    """The first rows as the model is given them, in stretches that are learned or not.

    Of a decoder with its own input the answer follows its prompt; a class is no text, so nothing of a classified row is learned.
    """
    for row in split.select(range(min(rows, len(split)))):
        ids, labels = row["input_ids"], row["labels"]
        if isinstance(labels, int):
            yield [(tokenizer.decode(ids), False)]
        elif IGNORE not in labels and labels != ids:
            yield [(tokenizer.decode(ids), False), (tokenizer.decode(labels), True)]
        else:
            yield _stretches(ids, labels, tokenizer)


def sampled(split: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first row in one line as the model is given it, what is learned of it between ⟦ and ⟧."""
    pieces = next(shown(split, tokenizer, 1), [])
    text = "".join(f"⟦{text}⟧" if learned else text for text, learned in pieces)
    return shortened(visible(text.replace("\n", "↵")), 400)


def _stretches(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    out: list[Piece] = []
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or (labels[at] == IGNORE) != (labels[start] == IGNORE):
            done = len(tokenizer.decode(ids[:start])) if start else 0  # a piece alone may lose its leading blank
            out.append((tokenizer.decode(ids[:at])[done:], labels[start] != IGNORE))
            start = at
    return out
