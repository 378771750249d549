"""Examples into tokens and labels.

    causal           [prefix] prompt | answer [eos]       labels: −100 … −100 | answer [eos]
    text             [prefix] text [eos]                  labels: all tokens (no eos on a block of a file)
    seq2seq          [prefix] prompt [suffix]             labels: answer [eos]
    classification   [prefix] text [suffix]               labels: the class number

prefix and suffix are what the tokenizer puts around a text (BOS; CLS and SEP). Prompt and answer are tokenised apart
and joined as tokens, so no token ever straddles the boundary: the loss covers the answer's tokens exactly, and the
prompt's tokens in training are those of generation. With a tokenizer that marks word starts (SentencePiece), the answer
therefore starts with such a mark whether or not the text has a space there; write " answer" only for tokenizers that
keep the space themselves (byte-level BPE).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weftlora.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weftlora.data.examples import Example

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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """The tokens of a prompt as in training, for a decoder to go on from; messages go through the chat template."""
    from weftlora.data.chat import render

    frame = Frame.of(tokenizer)
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
