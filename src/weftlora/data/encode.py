"""Examples into tokens and labels, for training and for generating from.

    causal           [prefix] prompt | answer [eos]       labels: −100 … −100 | answer [eos]
    text             [prefix] text [eos]                  labels: all tokens (no eos on a block of a file)
    seq2seq          [prefix] prompt [suffix]             labels: answer [eos]
    classification   [prefix] text [suffix]               labels: the class number
    chat             what the tokenizer's chat template makes of messages; labels: what the assistant says

prefix and suffix are what the tokenizer puts around a text (BOS; CLS and SEP). Prompt and answer are tokenised apart
and joined as tokens, so no token ever straddles the boundary: the loss covers the answer's tokens exactly, and the
prompt's tokens in training are those of generation. With a tokenizer that marks word starts (SentencePiece), the answer
therefore starts with such a mark whether or not the text has a space there; write " answer" only for tokenizers that
keep the space themselves (byte-level BPE).

A conversation is cut the same way, before and after every message of the assistant:

    render(messages[:i], open_answer)      everything up to the assistant's i-th message, its header included: no loss
    render(messages[:i+1]) − the above     the message and whatever the template ends it with: loss

A template that rewrites earlier turns when later ones follow has no such pieces; that is an error, since its masks would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from weftlora.data.examples import Example, Message
from weftlora.errors import DataError, ModelError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


IGNORE = -100
"""The label of a token that the loss leaves out; torch's cross entropy skips it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row of a tokenised split; `labels` is a class number for classification.

    `prompt` and `answer` are their text, None for plain text. `shifted` is 1 where labels are the inputs' own tokens,
    so that the first bears no loss, and 0 where a decoder has its own input.
    """

    input_ids: list[int]
    labels: list[int] | int
    truncated: bool = False
    prompt: str | None = None
    answer: str | None = None
    shifted: int = 1


Encode = Callable[[Sequence["Example"]], list[list[Encoded]]]  # per example its rows; none: dropped


@dataclass(frozen=True)
class Frame:
    """A tokenizer's habits: what it puts before and after a text, and its end-of-text token."""

    tokenizer: PreTrainedTokenizerBase
    prefix: list[int]
    suffix: list[int]
    eos: int | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        for probe in ("a", tokenizer.eos_token or "a"):
            full = list(tokenizer(probe)["input_ids"])
            plain = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
            for start in range(len(full) - len(plain) + 1) if plain else ():
                if full[start : start + len(plain)] == plain:
                    return cls(tokenizer, full[:start], full[start + len(plain) :], tokenizer.eos_token_id)
        raise ModelError(
            "the tokenizer turns the letter 'a' into no token at all: give one whose vocabulary is complete."
        )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text alone, nothing added."""
        if not texts:
            return []
        batch = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in batch["input_ids"]]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.ids(texts)]

    def opened(self, ids: list[int]) -> list[int]:
        """`ids` after the prefix. Never empty where there is a BOS or EOS: a model needs a token to go on."""
        if opened := [*self.prefix, *ids]:
            return opened
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eos
        return [] if start is None else [start]

    def ended(self, ids: list[int]) -> list[int]:
        """`ids` with one end-of-text token behind them."""
        if self.eos is None:
            raise ModelError(
                "the tokenizer has no end-of-text token, so an answer could never end: set its eos_token, "
                "or give a model made for generation."
            )
        return ids if ids[-1:] == [self.eos] else [*ids, self.eos]


_SURROGATE = re.compile("[\ud800-\udfff]")
"""What Python makes of bytes that are no text; tokenizers refuse it."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a prompt as in training, for a decoder to go on from; messages go through the chat template."""

    frame = Frame.of(tokenizer)
    written = [prompt] if isinstance(prompt, str) else [str(message.get("content", "")) for message in prompt]
    if any(_SURROGATE.search(text) for text in written):
        raise DataError("the prompt holds bytes that are not UTF-8 text: write it in UTF-8.")
    if isinstance(prompt, str):
        return frame.opened(frame.ids([prompt])[0])
    return frame.ids([render(tokenizer, list(prompt), "the prompt", open_answer=True)])[0]


def causal(frame: Frame, max_length: int, truncate: str) -> Encode:
    """Prompt and answer joined, labels on the answer."""

    def encode(rows: Sequence[Example]) -> list[list[Encoded]]:
        prompts = [frame.opened(ids) for ids in frame.ids([row.prompt for row in rows])]
        answers = [frame.ended(ids) for ids in frame.ids([row.answer for row in rows])]
        return [_joined(prompt, answer, row) for prompt, answer, row in zip(prompts, answers, rows, strict=True)]

    def _joined(prompt: list[int], answer: list[int], row: Example) -> list[Encoded]:
        truncated = len(prompt) + len(answer) > max_length
        if truncated and truncate == "prompt":
            prompt = cut_start(prompt, max_length - len(answer), len(frame.prefix))
        too_long = len(prompt) + len(answer) > max_length
        ids = (prompt + answer)[:max_length]
        labels = ([IGNORE] * len(prompt) + answer)[:max_length]
        if (too_long and truncate != "completion") or not has_target(labels):
            return []
        return [Encoded(ids, labels, truncated, row.prompt, row.answer)]

    return encode


def cut_start(ids: list[int], length: int, keep: int) -> list[int]:
    """The last tokens of `ids`, `length` in all, the first `keep` (the prefix) staying; at least one besides them."""
    if len(ids) <= length:
        return ids
    tail = max(1, length - keep)
    return ids[:keep] + ids[keep:][-tail:]


def has_target(labels: list[int]) -> bool:
    """Whether the loss has a token to average over: the first token is never predicted."""
    return any(label != IGNORE for label in labels[1:])


def text(frame: Frame, max_length: int) -> Encode:
    """All tokens are labels; a document beyond `max_length` becomes several rows, each after the prefix."""

    def encode(rows: Sequence[Example]) -> list[list[Encoded]]:
        documents = frame.ids([row.answer for row in rows])
        start = frame.opened([])
        room = max_length - len(start)
        out = []
        for row, ids in zip(rows, documents, strict=True):
            body = frame.ended(ids) if row.whole else ids
            windows = [start + body[at : at + room] for at in range(0, len(body), room)]
            out.append([Encoded(window, list(window)) for window in windows if len(window) > 1])
        return out

    return encode


def seq2seq(frame: Frame, max_length: int, truncate: str) -> Encode:
    """Prompt and answer apart, for an encoder-decoder."""
    inner = max_length - len(frame.prefix) - len(frame.suffix)

    def closed(ids: list[int]) -> list[int]:
        return [*frame.prefix, *ids, *frame.suffix]

    def encode(rows: Sequence[Example]) -> list[list[Encoded]]:
        prompts = frame.ids([row.prompt for row in rows])
        answers = [frame.ended(ids) for ids in frame.ids([row.answer for row in rows])]
        out: list[list[Encoded]] = []
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            truncated = len(prompt) > inner or len(answer) > max_length
            dropped = truncated and (truncate == "drop" or (truncate == "prompt" and len(answer) > max_length))
            kept = prompt[-inner:] if truncate == "prompt" else prompt[:inner]
            source = closed(kept) or frame.opened([])
            labels = answer[:max_length]
            out.append([] if dropped else [Encoded(source, labels, truncated, row.prompt, row.answer, shifted=0)])
        return out

    return encode


def classification(frame: Frame, max_length: int, truncate: str, labels: Sequence[str]) -> Encode:
    """A text and the number of its class in `labels`; a long text loses its end."""
    number = {name: index for index, name in enumerate(labels)}
    inner = max_length - len(frame.prefix) - len(frame.suffix)

    def encode(rows: Sequence[Example]) -> list[list[Encoded]]:
        out: list[list[Encoded]] = []
        for row, ids in zip(rows, frame.ids([row.prompt for row in rows]), strict=True):
            dropped = not ids or (truncate == "drop" and len(ids) > inner)
            full = [*frame.prefix, *ids[:inner], *frame.suffix]
            out.append([] if dropped else [Encoded(full, number[row.answer], len(ids) > inner, row.prompt, row.answer)])
        return out

    return encode


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
