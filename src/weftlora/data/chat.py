"""Conversations through the tokenizer's chat template, with the loss on what the assistant says.

    render(messages[:i], open_answer)      everything up to the assistant's i-th message, its header included: no loss
    render(messages[:i+1]) − the above     the message and whatever the template ends it with: loss

The pieces are tokenised apart and joined as tokens, as prompt and answer are (see `encode`). A template that rewrites
earlier turns when later ones follow has no such pieces; that is an error, since its masks would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from weftlora.data.encode import IGNORE, Encode, Encoded, Frame, has_target
from weftlora.data.examples import Example, Message
from weftlora.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text; `answer` is the assistant's own words in it, None outside its messages."""

    text: str
    answer: str | None


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, open_answer: bool) -> str:
    """The conversation as text, with the assistant's header at the end when `open_answer`.

    Raises ModelError without a chat template and DataError when the template refuses the messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template, so chat messages cannot be written out: give a chat model, set "
            "tokenizer.chat_template, or use format: prompt_completion."
        )
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_answer)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the chat template refuses these messages ({error}); correct their roles.") from None
    return str(rendered)


def pieces(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> list[Piece]:
    """The rendered conversation up to its last assistant message, cut where the loss starts and stops."""
    out: list[Piece] = []
    done = ""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number in turns:
        before = render(tokenizer, list(messages[:number]), where, open_answer=True)
        after = render(tokenizer, list(messages[: number + 1]), where, open_answer=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError(
                f"{where}: the chat template rewrites earlier turns when a later one follows, so the "
                "assistant's tokens cannot be told apart; use one row per answer."
            )
        out += [Piece(before[len(done) :], None), Piece(after[len(before) :], messages[number]["content"])]
        done = after
    return out


def chat(frame: Frame, max_length: int, truncate: str, at: Callable[[int], str]) -> Encode:
    """Labels on every assistant message; what follows the last one is left out. `at` places a line in errors."""
    special = set(frame.tokenizer.all_special_ids)

    def encode(rows: Sequence[Example]) -> list[list[Encoded]]:
        cut = [pieces(frame.tokenizer, row.messages, at(row.line)) for row in rows]
        ids = iter(frame.ids([piece.text for row in cut for piece in row]))
        return [_joined([(piece, next(ids)) for piece in row]) for row in cut]

    def _joined(row: list[tuple[Piece, list[int]]]) -> list[Encoded]:
        last = row[-1][1]
        if special.isdisjoint(last):  # the template ends no message: the model still has to learn where to stop
            row[-1] = (row[-1][0], frame.ended(last))
        ids = [token for _, tokens in row for token in tokens]
        labels = [token if piece.answer is not None else IGNORE for piece, tokens in row for token in tokens]
        owner = [number for number, (_, tokens) in enumerate(row) for _ in tokens]
        truncated = len(ids) > max_length
        if truncated:
            kept = slice(-max_length, None) if truncate == "prompt" else slice(0, max_length)
            ids, labels, owner = ids[kept], labels[kept], owner[kept]
        headless = truncate == "prompt" and IGNORE not in labels  # the last answer alone does not fit
        if (truncated and (truncate == "drop" or headless)) or not has_target(labels):
            return []
        held = [number for number, _ in groupby(owner) if row[number][0].answer is not None]
        final = row[held[-1]][0]
        prompt = "".join(piece.text for piece, _ in row[: held[-1]])
        return [Encoded(ids, labels, truncated, prompt, final.answer)]

    return encode
