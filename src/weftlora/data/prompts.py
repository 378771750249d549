"""What an evaluation generates from, and what it compares with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weftlora.data.encode import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class GenerationPrompt:
    """`input_ids` are exactly the tokens before the answer in the row (for chat with the assistant's header)."""

    prompt: str
    input_ids: list[int]
    reference: str
    domain: str | None


def generation_prompts(split: Dataset, limit: int | None = None) -> list[GenerationPrompt]:
    """The prompts of a tokenised split in order, the first `limit` of them; in a chat the last answer is asked for.

    Works for causal and seq2seq rows. Plain text and classification rows have nothing to generate: the list is empty.
    """
    if "prompt" not in split.column_names or not len(split) or isinstance(split[0]["labels"], int):
        return []
    rows = split if limit is None else split.select(range(min(limit, len(split))))
    return [GenerationPrompt(row["prompt"], _before_answer(row), row["completion"], row.get("domain")) for row in rows]


def _before_answer(row: dict[str, list[int]]) -> list[int]:
    """Causal rows: the tokens before the last labelled stretch. Seq2seq rows have no masked label: all tokens."""
    ids, labels = row["input_ids"], row["labels"]
    if IGNORE not in labels:
        return ids
    at = len(labels)
    while labels[at - 1] == IGNORE:  # a cut chat may end in a user's turn
        at -= 1
    while labels[at - 1] != IGNORE:
        at -= 1
    return ids[:at]
