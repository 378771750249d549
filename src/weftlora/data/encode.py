"""Examples into tokens and labels, for training and for generating from.

    causal           [prefix] prompt | answer [eos]       labels: −100 … −100 | answer [eos]
    text             [prefix] text [eos]                  labels: all tokens (no eos on a block of a file)
    seq2seq          [prefix] prompt [suffix]             labels: answer [eos]
    classification   [prefix] text [suffix]               labels: the class number
    chat             what the tokenizer's chat template makes of messages; labels: what the assistant says

prefix and suffix are what the tokenizer puts around a text (BOS; CLS and SEP); a prompt that begins with the prefix gets no second
one. Prompt and answer are tokenised apart and joined as tokens, so no token ever straddles the boundary: the loss covers the answer's
tokens exactly, and the prompt's tokens in training are those of generation. With a tokenizer that marks word starts (SentencePiece),
the answer therefore starts with such a mark whether or not the text has a space there; write " answer" only for tokenizers that
keep the space themselves (byte-level BPE).

A conversation is rendered whole and tokenised once, so that its tokens are those of `apply_chat_template`. Which of them are learned
is found in the text, and mapped to tokens by their offsets (by lengths of prefixes where a tokenizer has no offsets):

    from   len render(messages[:i], open_answer)      everything up to the assistant's i-th message, its header included
    to     the end of what the template ends it with, without blanks after its last special token

A template that rewrites earlier turns when later ones follow has no such places, unless it marks them itself ({% generation %}): that
is an error, since its masks would be wrong, and the loss on the last answer, or a row for each, is what can be had.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from weftlora.data.examples import PAIRED, Example, Message
from weftlora.errors import DataError, ModelError
from weftlora.settings import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row of a tokenised split; `labels` is a class number for classification.

    `prompt` and `answer` are their text, None for plain text. `shifted` is 1 where labels are the inputs' own tokens,
    so that the first bears no loss, and 0 where a decoder has its own input. `joined`: the tokens before an answer are not those
    of the prompt that a server sends, since a token spans both, or the header is cut otherwise when words follow.
    """

    input_ids: list[int]
    labels: list[int] | int
    truncated: bool = False
    prompt: str | None = None
    answer: str | None = None
    shifted: int = 1
    joined: bool = False


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
        """`ids` after the prefix, which they may begin with. Never empty where there is a BOS or EOS: a model needs a token."""
        if opened := [*self._before(ids), *ids]:
            return opened
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eos
        return [] if start is None else [start]

    def _before(self, ids: list[int]) -> list[int]:
        """The prefix, or none where the text brings it."""
        there = bool(self.prefix) and ids[: len(self.prefix)] == self.prefix
        return [] if there else self.prefix

    def framed(self, ids: list[int]) -> list[int]:
        """`ids` between prefix and suffix."""
        after = [] if self.suffix and ids[-len(self.suffix) :] == self.suffix else self.suffix
        return [*self._before(ids), *ids, *after]

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


def as_text(prompt: str) -> str:
    """`prompt`. Raises DataError where it holds bytes that are no text."""
    if _SURROGATE.search(prompt):
        raise DataError("the prompt holds bytes that are not UTF-8 text: write it in UTF-8.")
    return prompt


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], tools: list[Any] | None = None
) -> list[int]:
    """The tokens of a prompt as in training, for a decoder to go on from; messages go through the chat template."""

    frame = Frame.of(tokenizer)
    if isinstance(prompt, str):
        return frame.opened(frame.ids([as_text(prompt)])[0])
    for message in prompt:
        as_text(str(message.get("content", "")))
    text = render(tokenizer, [list(prompt)], ["the prompt"], open_answer=True, tools=tools)[0]
    check_reaches(tokenizer, prompt, tools, "the prompt", set())
    return frame.ids([text])[0]


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
            ids = ids[len(start) :] if ids[: len(start)] == start else ids
            body = frame.ended(ids) if row.whole else ids
            windows = [start + body[at : at + room] for at in range(0, len(body), room)]
            out.append([Encoded(window, list(window)) for window in windows if len(window) > 1])
        return out

    return encode


def seq2seq(frame: Frame, max_length: int, truncate: str) -> Encode:
    """Prompt and answer apart, for an encoder-decoder."""
    inner = max_length - len(frame.prefix) - len(frame.suffix)

    def encode(rows: Sequence[Example]) -> list[list[Encoded]]:
        prompts = frame.ids([row.prompt for row in rows])
        answers = [frame.ended(ids) for ids in frame.ids([row.answer for row in rows])]
        out: list[list[Encoded]] = []
        for row, prompt, answer in zip(rows, prompts, answers, strict=True):
            truncated = len(prompt) > inner or len(answer) > max_length
            dropped = truncated and (truncate == "drop" or (truncate == "prompt" and len(answer) > max_length))
            kept = prompt[-inner:] if truncate == "prompt" else prompt[:inner]
            source = frame.framed(kept) or frame.opened([])
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
            full = frame.framed(ids[:inner])
            out.append([] if dropped else [Encoded(full, number[row.answer], len(ids) > inner, row.prompt, row.answer)])
        return out

    return encode


# ---------------------------------------------------------------------- conversations

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant says."""
Span = tuple[int, int]


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    where: Sequence[str],
    open_answer: bool,
    tools: list[Any] | None = None,
) -> list[str]:
    """Conversations as text, each with the assistant's header at the end when `open_answer`; `where` places each in errors.

    Raises ModelError without a chat template and DataError when the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the tokenizer has no chat template, so chat messages cannot be written out: give a chat model, set "
            "tokenizer.chat_template, or use format: prompt_completion."
        )
    try:
        return _rendered(tokenizer, conversations, open_answer, tools)
    except Exception:
        pass
    out = []
    for messages, place in zip(conversations, where, strict=True):  # whose is it?
        try:
            out += _rendered(tokenizer, [messages], open_answer, tools)
        except Exception as error:  # a template is a program of the model's maker, which may fail in every way
            raise DataError(f"{place}: {_why(tokenizer, messages, error)}") from None
    return out


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    open_answer: bool,
    tools: list[Any] | None,
) -> list[str]:
    made = [_as_taken(tokenizer, each) for each in conversations]
    texts: Any = tokenizer.apply_chat_template(made, tools=tools, tokenize=False, add_generation_prompt=open_answer)
    return list(texts)


def _as_taken(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    """Messages in the form that the chat template takes: contents in parts, arguments of calls as JSON."""
    made = [_in_parts(message) for message in messages] if takes_parts(tokenizer) else list(messages)
    if any(message.get("tool_calls") for message in made) and takes_json(tokenizer):
        made = [_with_json(message) for message in made]
    return made


_PARTS: dict[str, bool] = {}
"""Of each template seen, whether it takes the content of a message in parts only."""


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a text only where it is a part of a content, as those of models that see images do."""
    template = str(tokenizer.chat_template)
    if template not in _PARTS:
        probe: Message = {"role": "user", "content": "weftlora"}
        found = ["weftlora" in (_probed(tokenizer, [each]) or "") for each in (probe, _in_parts(probe))]
        _PARTS[template] = found == [False, True]
    return _PARTS[template]


def _probed(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str | None:
    """What the template makes of messages of ours; None where it refuses them."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # see `render`
        return None


_JSON: dict[str, bool] = {}
"""Of each template seen, whether it takes the arguments of a call as JSON only."""


def takes_json(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template puts the arguments of a call down as they stand: it refuses a mapping, or writes it as Python does."""
    template = str(tokenizer.chat_template)
    if template not in _JSON:
        call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"weftlora": "a"}}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        asked: Message = {"role": "user", "content": "a"}
        told = [[asked, each] for each in (said, _with_json(said))]
        if takes_parts(tokenizer):
            told = [[_in_parts(message) for message in each] for each in told]
        mapping, text = (_probed(tokenizer, each) for each in told)
        _JSON[template] = (mapping is None or "'weftlora'" in mapping) and '"weftlora"' in (text or "")
    return _JSON[template]


def _with_json(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls") or ():
        held = call.get("function") if isinstance(call.get("function"), dict) else call
        if isinstance(arguments := held.get("arguments"), dict):
            held = {**held, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({**call, "function": held} if "function" in call else held)
    return {**message, "tool_calls": calls} if calls else message


def _in_parts(message: Message) -> Message:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _why(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], error: Exception) -> str:
    """What to do about messages that the template refuses."""
    said = f"the chat template refuses these messages ({error})"
    if messages and messages[0]["role"] in ("system", "developer"):
        try:
            _rendered(tokenizer, [messages[1:]], False, None)
        except Exception:
            pass
        else:
            return f"{said}, since it takes no {messages[0]['role']} message: set data.system=fold to put it before the first user's."
    if messages and messages[0]["role"] == "assistant":
        return f"{said}, which begin with the assistant: put the user's message that it answers before it."
    return f"{said}; correct their roles."


def fold_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with a leading system message put before the text of the first user's."""
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return tuple(messages)
    system, *rest = messages
    first = next((number for number, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return ({**system, "role": "user"}, *rest)
    joined = {**rest[first], "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return (*rest[:first], joined, *rest[first + 1 :])


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation up to its last learned answer, as it is trained on: its text, and where in it the learned answers are."""

    row: Example
    messages: tuple[Message, ...]
    text: str
    spans: list[tuple[int, int, int]]  # from, to, number of the message
    as_sent: bool = True
    """Whether what stands before each answer is the text of the prompt that asks for it."""


def talks(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    answers: str = "all",
    fold: bool = False,
) -> list[list[Talk]]:
    """Of each row its conversations: one, or one for each learned answer with `answers="each"`. Rows have something to learn.

    Raises DataError where the template refuses or drops something, or rewrites what stood before.
    """
    parts: list[tuple[int, Example, tuple[Message, ...], list[int]]] = []
    for at, row in enumerate(rows):
        messages = fold_system(row.messages) if fold else row.messages
        shift = len(row.messages) - len(messages)
        turns = [
            number - shift
            for number, message in enumerate(row.messages)
            if (message["role"] == "assistant" if row.learned is None else row.learned[number])
        ]
        if answers == "each":
            parts += [(at, row, messages[: turn + 1], [turn]) for turn in turns]
        else:
            parts.append((at, row, messages[: turns[-1] + 1], turns if answers == "all" else turns[-1:]))
    texts = _each(tokenizer, [(row, messages) for _, row, messages, _ in parts], False)
    asked = [(row, messages[:turn]) for _, row, messages, turns in parts for turn in turns if turn]
    befores = iter(_each(tokenizer, asked, True))
    out: list[list[Talk]] = [[] for _ in rows]
    for text, (at, row, messages, turns) in zip(texts, parts, strict=True):
        opened = [next(befores) if turn else None for turn in turns]
        spans, as_sent = _spans(tokenizer, row, messages, turns, text, opened)
        out[at].append(Talk(row, messages, text, spans, as_sent))
    return out


def _each(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[Example, Sequence[Message]]], open_answer: bool
) -> list[str]:
    """As `render`, messages of rows, each with its row's tools."""
    if not asked:
        return []
    if not any(row.tools for row, _ in asked):
        return render(tokenizer, [messages for _, messages in asked], [row.where for row, _ in asked], open_answer)
    return [render(tokenizer, [messages], [row.where], open_answer, row.tools)[0] for row, messages in asked]


def _spans(
    tokenizer: PreTrainedTokenizerBase,
    row: Example,
    messages: tuple[Message, ...],
    turns: list[int],
    text: str,
    opened: list[str | None],
) -> tuple[list[tuple[int, int, int]], bool]:
    """Where in `text` each of `turns` is learned: from what generation goes on from, to the end that the template gives it.

    Where prompts are no beginnings of the text, but the template marks its answers, it is what that says, and False.
    """
    found = _by_beginnings(tokenizer, row, messages, turns, text, opened)
    if not isinstance(found, str):
        return found, True
    marked = _by_marks(tokenizer, messages, row.tools, turns)
    if marked is None:
        raise DataError(f"{row.where}: {found}")
    return marked, False


def _by_beginnings(
    tokenizer: PreTrainedTokenizerBase,
    row: Example,
    messages: tuple[Message, ...],
    turns: list[int],
    text: str,
    opened: list[str | None],
) -> list[tuple[int, int, int]] | str:
    """As `_spans`, where prompts are beginnings of the text; else what to tell."""
    starts = []
    for turn, before in zip(turns, opened, strict=True):
        if before is None:
            before = _header(tokenizer, messages, text, row.tools, row.where)
        if not text.startswith(before):
            return _rewritten(len(turns), turn == turns[-1])
        starts.append(len(before))
    tail = _after(text, starts[-1], messages[turns[-1]])
    spans = []
    for start, turn in zip(starts, turns, strict=True):
        end = len(text)
        if turn != turns[-1]:
            content = messages[turn]["content"]
            if tail is not None and text.startswith(content + tail, start):
                end = start + len(content) + len(tail)
            else:
                whole = render(tokenizer, [messages[: turn + 1]], [row.where], False, row.tools)[0]
                if not text.startswith(whole):
                    return _rewritten(len(turns), False)
                end = len(whole)
        spans.append((start, end, turn))
    return spans


def _rewritten(turns: int, last: bool) -> str:
    if last and turns == 1:
        return (
            "the chat template does not write a prompt as the beginning of what it writes with the answer, so the answer's tokens "
            "cannot be told apart: use format: prompt_completion, or another template."
        )
    return (
        "the chat template rewrites earlier turns when a later one follows, so the assistant's tokens cannot be told apart: set "
        "data.answers=each for one row per answer, or data.answers=last for the loss on the last one."
    )


def _after(text: str, start: int, message: Message) -> str | None:
    """What the template puts behind the content of the last message; None where it has changed the content."""
    content = message["content"]
    return text[start + len(content) :] if text.startswith(content, start) else None


def _header(
    tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], text: str, tools: list[Any] | None, where: str
) -> str:
    """Everything up to the words of an assistant that speaks first: nothing was asked, so the header is known from another chat."""
    probe = [{"role": "user", "content": "a"}]
    asked, opened = (render(tokenizer, [probe], [where], opening, tools)[0] for opening in (False, True))
    header = opened.removeprefix(asked) if opened.startswith(asked) else ""
    at = text.find(header + messages[0]["content"].strip()) if header else -1
    if at < 0:
        raise DataError(
            f"{where}: the conversation begins with the assistant, and where its words start cannot be seen in this chat template: "
            "put a message of the user before it."
        )
    return text[: at + len(header)]


def _by_marks(
    tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...], tools: list[Any] | None, turns: list[int]
) -> list[tuple[int, int, int]] | None:
    """Where the template itself says that the assistant speaks; None where it does not, or not once for each of its messages."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(None, tools)
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not _MARKED.search(template):
        return None
    _, marks = render_jinja_template(
        conversations=[_as_taken(tokenizer, messages)],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if len(marks[0]) != len(spoken):
        return None
    return [(*mark, number) for mark, number in zip(marks[0], spoken, strict=True) if number in turns]


def check_reaches(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[Any] | None,
    where: str,
    known: set[tuple[Any, ...]],
) -> None:
    """Refuse what the template would leave out of a conversation: a message, tools, keys of a message. Raises DataError.

    What was seen to reach the text, or to number messages only, is added to `known` and not looked at again: keys by who has them,
    messages by who says them, whether they come first, and whether calls or tools stand beside them.
    """
    said = [
        kind if str(each.get("content") or "").strip() else None
        for each, kind in zip(messages, _kinds(messages, tools), strict=True)
    ]
    keys = {(each["role"], key) for each in messages for key in each if key not in ("role", "content", *PAIRED)} - known
    given = tools is not None and ("", "tools") not in known
    if not (keys or given or {*said} - known - {None}):
        return
    whole = _text_of(tokenizer, messages, tools, where)
    if whole is None:
        return  # which is an error of its own
    for number, (message, kind) in enumerate(zip(messages, said, strict=True)):
        if kind is None or kind in known:
            continue
        role, content = message["role"], message["content"]
        other = {**message, "content": f"{content} weftlora"}
        if _text_of(tokenizer, [*messages[:number], other, *messages[number + 1 :]], tools, where) == whole:
            what = f"the {role} message" if number == 0 else f"message {number + 1}, of the {role},"
            what += " whose text stands beside tool calls," if message.get("tool_calls") else ""
            first = number == 0 and role in ("system", "developer")
            cure = (
                "put it before the first user's, as data.system=fold does"
                if first
                else "give a template that writes it"
            )
            raise DataError(f"{where}: the chat template leaves {what} out: {cure}.")
        known.add(kind)
    for role, key in sorted(keys):
        without = [{k: v for k, v in message.items() if k != key or message["role"] != role} for message in messages]
        if _text_of(tokenizer, without, tools, where) == whole:
            raise DataError(
                f"{where}: a message of the {role} has the key {key!r}, which the chat template leaves out: leave "
                f"it out too (data.ignore={key}), or give a template that writes it."
            )
        known.add((role, key))
    if given:
        if _text_of(tokenizer, messages, None, where) == whole:
            raise DataError(
                f"{where}: it has tools, which the chat template leaves out: leave them out too (data.ignore=tools), or give a "
                "template for tools."
            )
        known.add(("", "tools"))


def _kinds(messages: Sequence[Message], tools: list[Any] | None) -> Iterator[tuple[Any, ...]]:
    """What decides whether a template writes a message, as far as it can be told."""
    for number, message in enumerate(messages):
        yield message["role"], number == 0, bool(message.get("tool_calls")), tools is not None


def _text_of(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[Any] | None, where: str
) -> str | None:
    """The text of a conversation; None where the template refuses it."""
    try:
        return render(tokenizer, [messages], [where], False, tools)[0]
    except DataError:
        return None


COMPARED = 200
"""Conversations of a split whose prompts are tokenised alone too, and compared with what stands before the answers."""


def chat(frame: Frame, max_length: int, truncate: str, answers: str = "all", fold: bool = False) -> Encode:
    """Labels on what the assistant says; what follows the last learned answer is left out."""
    tokenizer = frame.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known: set[tuple[Any, ...]] = set()
    compared = 0

    def encode(rows: Sequence[Example]) -> list[list[Encoded]]:
        for row in rows:
            messages = fold_system(row.messages) if fold else row.messages
            plain = row.tools is None and all(len(message) == 2 for message in messages)
            if not (plain and all(kind in known for kind in _kinds(messages, None))):
                check_reaches(tokenizer, messages, row.tools, row.where, known)
        spoken = talks(tokenizer, rows, answers, fold)
        flat = [talk for held in spoken for talk in held]
        nonlocal compared
        done = iter(_tokenised(tokenizer, flat, max(0, COMPARED - compared)))
        compared += len(flat)
        return [[made for talk in held if (made := _made(talk, *next(done))) is not None] for held in spoken]

    def _made(talk: Talk, ids: list[int], learned: list[Span], joined: bool) -> Encoded | None:
        stops = [(start, _ended_by(ids, start, end)) for start, end in learned]
        start, end = stops[-1]
        if special.isdisjoint(
            ids[start:end]
        ):  # the template ends no message: the model still has to learn where to stop
            ids = frame.ended(ids[:end])
            stops[-1] = (start, len(ids))
        labels = [IGNORE] * len(ids)
        for start, end in stops:
            labels[start:end] = ids[start:end]
        truncated = len(ids) > max_length
        kept = range(len(ids))
        if truncated:
            kept = kept[-max_length:] if truncate == "prompt" else kept[:max_length]
            ids, labels = ids[kept.start : kept.stop], labels[kept.start : kept.stop]
        headless = truncate == "prompt" and IGNORE not in labels  # the last answer alone does not fit
        if (truncated and (truncate == "drop" or headless)) or not has_target(labels):
            return None
        last = max(number for number, (start, end) in enumerate(stops) if start < kept.stop and end > kept.start)
        begins, _, turn = talk.spans[last]
        return Encoded(ids, labels, truncated, talk.text[:begins], talk.messages[turn]["content"], joined=joined)

    def _ended_by(ids: list[int], start: int, end: int) -> int:
        """Where an answer ends: behind its last special token, where only blanks follow that."""
        last = end
        while last > start and ids[last - 1] not in special and tokenizer.decode([ids[last - 1]]).isspace():
            last -= 1
        return last if last > start and ids[last - 1] in special else end

    return encode


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, spoken: Sequence[Talk], compared: int
) -> list[tuple[list[int], list[Span], bool]]:
    """Of each conversation its tokens, which of them are learned, and whether those before are not what a server sends.

    That is seen where a token spans both; of the first `compared` conversations all tokens before their answers are looked at.
    """
    if not spoken:
        return []
    texts = [talk.text for talk in spoken]
    if not tokenizer.is_fast:
        return [_by_prefix(tokenizer, talk) for talk in spoken]
    batch = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    out: list[tuple[list[int], list[Span], bool]] = []
    for talk, ids, offsets in zip(spoken, batch["input_ids"], batch["offset_mapping"], strict=True):
        learned, joined = [], not talk.as_sent
        for begins, ends, _ in talk.spans:
            start = bisect_right(offsets, begins, key=itemgetter(1))
            joined = joined or (start < len(offsets) and offsets[start][0] < begins)
            if len(out) < compared and not joined:
                joined = tokenizer(talk.text[:begins], add_special_tokens=False)["input_ids"] != ids[:start]
            learned.append((start, bisect_left(offsets, ends, key=itemgetter(0))))
        out.append((list(ids), learned, joined))
    return out


def _by_prefix(tokenizer: PreTrainedTokenizerBase, talk: Talk) -> tuple[list[int], list[Span], bool]:
    """As `_tokenised`, for a tokenizer that does not say where its tokens are: the tokens of a prefix are a prefix of the tokens."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    ids, learned = ids_of(talk.text), []
    for begins, ends, _ in talk.spans:
        start, end = ids_of(talk.text[:begins]), ids_of(talk.text[:ends])
        if ids[: len(start)] != start or ids[: len(end)] != end:
            raise DataError(
                f"{talk.row.where}: this tokenizer is a slow one, which does not say where its tokens are, and joins the end of a "
                "prompt with its answer: give a model with a tokenizer.json."
            )
        learned.append((len(start), len(end)))
    return ids, learned, False


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
