"""Rows with named columns into examples with roles: what is the prompt, what is the answer, what is the label.

Conversations in any of the usual forms become messages as the tokenizer's chat template takes them:

    messages                role and content; from and value; plain texts in turns, the user's first
    prompt + completion     both lists of messages: only the completion is learned
    prompt + chosen         the answer that was preferred; what was rejected plays no part here
    instruction + output    with a column `system`, or `history` (pairs of question and answer), a conversation of them all

A column whose name says that it matters is used, or refused by name; one that is meant to be left out is named in `data.ignore`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weftlora.data.config import DataConfig, Format, template_columns
from weftlora.data.read import Row, Source, bad_row, place
from weftlora.errors import ConfigError, DataError, suggest

# Columns that stand for a role when the role's own name is absent. Two that fit are an error, never a guess.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "input", "source", "query"),
    "completion": ("output", "answer", "response", "target", "chosen"),
    "messages": ("conversation", "conversations"),
    "text": ("sentence", "document"),
    "label": ("class",),
    "domain": (),
}
ROLES: dict[Format, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
    "classification": ("text", "label"),
}
SPEAKERS = ("system", "developer", "user", "assistant", "tool")
SPOKEN = {speaker: speaker for speaker in SPEAKERS} | {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response", "ipython"), "tool"),
    "function_call": "function_call",
}
"""What others call who speaks."""
SAYS = ("content", "value")
WHO = ("role", "from")
LEARN = ("weight", "train", "loss")
"""Keys of a message that say whether it is learned: 1 and true, or 0 and false."""
PAIRED = ("id", "tool_call_id")
"""Keys that only number messages; a template may leave them out."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called; templates read the first, some the second."""
SYSTEM = ("system", "system_prompt", "system_message")
"""What the column of a conversation's system message is called."""
SEEN = ("images", "image", "audios", "audio", "videos", "video")
"""Columns with what a model is to see or hear beside a text, which is all that is read here."""
MATTERS = (*SYSTEM, "history", "tools", "context", "input", "chat_template_kwargs", *SEEN)
"""Columns that what is learned depends on: never dropped without a word."""
JOINS = {
    ("instruction", "input"): 0,
    ("instruction", "context"): 0,
    ("question", "context"): 1,
    ("question", "input"): 0,
}
"""Pairs of columns that are one prompt, and which of the two stands last: the second (0), or the first (1)."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One row by role. `answer` is what the loss is on: the completion, the whole text, or the label's name.

    `learned` says of each message whether it is; None where all of the assistant's are. `tools` are those of a conversation, and
    `file` and `unit` place its line.
    """

    prompt: str
    answer: str
    domain: str | None
    line: int
    messages: tuple[Message, ...] = ()
    whole: bool = True
    learned: tuple[bool, ...] | None = None
    tools: list[Any] | None = None
    file: str = ""
    unit: str = "line"

    @property
    def where(self) -> str:
        """How an error names the row."""
        return place(self.file, self.line, self.unit)

    @property
    def empty(self) -> bool:
        """Nothing to learn: no answer text, or no text to classify (`examples` leaves `answer` blank then)."""
        return not self.answer.strip()

    @property
    def size(self) -> int:
        """Characters of its text."""
        return len(self.prompt) + len(self.answer) + sum(len(str(each.get("content", ""))) for each in self.messages)

    def key(self, split_on: str = "row") -> str:
        """Equal for rows that are exact duplicates, or that share their prompt with `split_on="prompt"`."""
        held = (self.prompt, self.messages[:-1]) if split_on == "prompt" else (self.prompt, self.messages, self.answer)
        return repr(held) if self.tools is None else repr((*held, self.tools))


@dataclass(frozen=True)
class Columns:
    """Which columns play which role; built once from the training rows and used for every split."""

    format: Format
    of: Mapping[str, str]
    template: str | None = None  # fills the format's first role instead of a column
    prompts: tuple[str, ...] = ()  # several columns that are one prompt, in the order they are shown
    unused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def used(self) -> set[str]:
        """The columns that something is made of."""
        return {*self.of.values(), *self.prompts, *(template_columns(self.template) if self.template else ())}

    def fit(self, values: Mapping[str, Any]) -> bool:
        """Whether a row has the columns that these rows were read by."""
        return {*self.of.values(), *self.prompts} <= values.keys()

    def __str__(self) -> str:
        """One line for a person: what is made of which column."""
        roles = {role: column for role, column in self.of.items() if not (role == "prompt" and self.prompts)}
        used = [role if role == column else f"{role} from {column}" for role, column in roles.items()]
        if self.template is not None:
            used.insert(0, "prompt from the prompt_template")
        if self.prompts:
            used.insert(0, f"prompt from {' and '.join(self.prompts)}")
        said = f"format {self.format}: {', '.join(used)}"
        said += f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return said + (f"; ignored: {', '.join(self.ignored)}" if self.ignored else "")


@dataclass(frozen=True)
class Seen:
    """The columns of all rows of a source, in the order they were met: of each the first value that is filled, if any is."""

    first: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Seen:
        """Reads every row once."""
        first: dict[str, Any] = {}
        open_: set[str] = set()
        names: set[str] = set()
        for row in rows:
            values = row.values
            if not values.keys() <= names:
                for name in values:
                    if name not in names:
                        names.add(name)
                        open_.add(name)
                        first[name] = None
            if open_:
                for name in [name for name in open_ if name in values]:
                    if filled(value := values[name]):
                        first[name] = value
                        open_.discard(name)
        return cls({str(name): value for name, value in first.items()})

    def filled(self, name: str) -> bool:
        return self.first.get(name) is not None

    def is_list(self, name: str) -> bool:
        return isinstance(self.first.get(name), list)


def filled(value: Any) -> bool:
    """Whether a cell holds anything."""
    return value is not None and value != [] and value != {} and not (isinstance(value, str) and not value.strip())


def find_columns(source: Source, config: DataConfig, wanted: Format | None = None) -> Columns:
    """Format and columns from `config` and, where it says nothing, from `wanted` and all rows of `source`.

    Raises ConfigError when a role has no column, more than one that fits, or no part in the format, and where a column that matters
    would be dropped.
    """
    seen = Seen.of(source.rows)
    found = _Finder(seen, [name for name in seen.first if name not in config.ignore], config, source.name)
    columns = found.columns(wanted)
    unused = tuple(name for name in found.present if name not in columns.used)
    _check_left_out(unused, columns, seen, source.name)
    ignored = tuple(name for name in config.ignore if name in seen.first)
    return Columns(columns.format, columns.of, columns.template, columns.prompts, unused, ignored)


def check_columns(source: Source, columns: Columns, config: DataConfig) -> Columns:
    """The columns of other rows, where those of `source` are none that they would drop. Raises ConfigError."""
    seen = Seen.of(source.rows)
    left = tuple(name for name in seen.first if name not in config.ignore and name not in columns.used)
    _check_left_out(left, columns, seen, source.name)
    return columns


def _check_left_out(unused: tuple[str, ...], columns: Columns, seen: Seen, name: str) -> None:
    """Refuse to drop what matters. Raises ConfigError."""
    for column in unused:
        if column in MATTERS and seen.filled(column):
            cure = (
                f"write it into data.prompt_template, as in '{{{column}}} ...', or set data.ignore={column}"
                if columns.format == "prompt_completion"
                else f"set data.ignore={column} to leave it out"
            )
            raise ConfigError(
                f"the column {column} of {name} holds values and has no place in the rows as they are read ({columns}): {cure}."
            )
    if columns.format != "classification" and isinstance(seen.first.get("label"), bool) and "label" in unused:
        raise ConfigError(
            f"the column label of {name} says which answers are good: keep the rows where it is true, and set data.ignore=label."
        )


@dataclass(frozen=True)
class _Finder:
    """Looks for the columns of a source."""

    seen: Seen
    present: list[str]
    config: DataConfig
    name: str

    def columns(self, wanted: Format | None) -> Columns:
        config, template = self.config, self.config.prompt_template
        chosen = config.format if config.format != "auto" else wanted or self._format()
        for role in ("prompt", "completion", "messages", "text", "label"):
            if role not in ROLES[chosen] and getattr(config.fields, role) is not None:
                raise ConfigError(f"data.fields.{role} plays no part in format {chosen}: leave it out.")
        roles: dict[str, str] = {}
        prompts: tuple[str, ...] = ()
        if chosen == "chat" and not self._candidates("messages"):
            roles, prompts = self._turns()
        else:
            for role in ROLES[chosen][1:] if template is not None else ROLES[chosen]:
                if role == "prompt" and (pair := self._pair()):
                    roles[role], prompts = pair[0], pair
                elif not (role == "prompt" and self._preferred_only()):
                    roles[role] = self._column(role, chosen)
        if chosen == "chat":
            if self._holds("tools"):
                roles["tools"] = "tools"
            if (system := next(filter(self._holds, SYSTEM), None)) is not None:
                roles["system"] = system
        if (domain := config.fields.domain or ("domain" if "domain" in self.present else None)) is not None:
            roles["domain"] = domain
        return Columns(chosen, roles, template, prompts)

    def _candidates(self, role: str) -> list[str]:
        if (said := getattr(self.config.fields, role)) is not None:
            return [said]
        if role in self.present:
            return [role]
        fit = [alias for alias in ALIASES[role] if alias in self.present]
        held = [alias for alias in fit if self.seen.filled(alias)]
        return held or fit[:1]  # a column that is empty in every row is no rival

    def _holds(self, name: str) -> bool:
        return name in self.present and self.seen.filled(name)

    def _pair(self) -> tuple[str, ...]:
        """The two columns that are one prompt together, if they are."""
        if self.config.fields.prompt is not None or "prompt" in self.present or self.config.prompt_template is not None:
            return ()
        fit = [name for name in (*ALIASES["prompt"], "context") if name in self.present and self.seen.filled(name)]
        for pair, last in JOINS.items():
            if set(fit) == set(pair) and not any(self.seen.is_list(name) for name in pair):
                return pair[::-1] if last else pair
        return ()

    def _preferred_only(self) -> bool:
        """Whether the prompt is not a column of its own, but what two answers have in common."""
        return not self._candidates("prompt") and {"chosen", "rejected"} <= set(self.present)

    def _turns(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """The roles of a conversation that is spread over columns."""
        if not self._candidates("completion"):
            return {"messages": self._column("messages", "chat")}, ()
        roles = {"completion": self._column("completion", "chat")}
        prompts = self._pair()
        if prompts:
            roles["prompt"] = prompts[0]
        elif self._candidates("prompt"):
            roles["prompt"] = self._column("prompt", "chat")
        if "history" in self.present and self.seen.filled("history"):
            roles["history"] = "history"
        return roles, prompts

    def _format(self) -> Format:
        has = {role for role in ALIASES if self._candidates(role)}
        if self.config.prompt_template is not None:
            has = (has | {"prompt", "text"}) - {"messages"}
        if self._pair() or self._preferred_only():
            has.add("prompt")
        if {"prompt", "completion"} <= has and "messages" not in has and self.config.prompt_template is None:
            spread = any(map(self._holds, (*SYSTEM, "history", "tools")))
            lists = any(
                self.seen.is_list(name) for name in (*self._candidates("prompt"), *self._candidates("completion"))
            )
            if spread or lists:
                return "chat"
        if "messages" in has and not any(self.seen.is_list(name) for name in self._candidates("messages")):
            has.discard("messages")  # a column that is called so, and holds none
            if not has.issuperset(ROLES["prompt_completion"]) and "text" not in has:
                return "chat"  # which then says of the row what it holds instead
        for chosen in ("chat", "prompt_completion", "classification", "text"):
            if has.issuperset(ROLES[chosen]):
                return chosen
        raise ConfigError(
            f"cannot tell the format of {self.name} from its columns ({', '.join(self.present) or 'none'}): set data.format to "
            f"one of {', '.join(ROLES)}, and data.fields."
        )

    def _column(self, role: str, chosen: str) -> str:
        fit = self._candidates(role)
        if len(fit) == 1:
            return fit[0]
        if fit:
            raise ConfigError(
                f"the columns {' and '.join(fit)} of {self.name} could both be the {role}: set data.fields.{role}=<column>"
                + (" or give a data.prompt_template." if role in ("prompt", "text") else ".")
            )
        raise ConfigError(
            f"{self.name} has no column for the {role} of format {chosen} (its columns: {', '.join(self.present)}): "
            f"set data.fields.{role}=<column>."
        )


# ---------------------------------------------------------------------- one row


def examples(source: Source, columns: Columns, ignore: Sequence[str] = ()) -> list[Example]:
    """Every row of `source` by role. Raises DataError naming the row on a missing column or a wrong type."""
    return [example(row, source, columns, ignore) for row in source.rows]


def example(row: Row, source: Source, columns: Columns, ignore: Sequence[str] = ()) -> Example:
    """One row by role; `ignore` names keys of messages that are left out. Raises DataError as `examples` does."""
    domain = _domain(row, source, columns)
    if columns.format == "chat":
        return _conversation(row, source, columns, domain, ignore)
    first = ROLES[columns.format][0]
    if columns.template is not None:
        head = _filled(row, source, columns.template)
    elif columns.prompts:
        head = _together(row, source, columns.prompts) + "\n\n"  # or the answer would go on in the same line
    elif first in columns.of:
        head = _text(row, source, columns.of[first])
    else:
        return _preferred(row, source, domain)
    if columns.format == "text":
        return Example("", head, domain, row.line, whole=row.whole)
    if columns.format == "classification":
        label = _label(row, source, columns.of["label"])
        return Example(head, label if head.strip() else "", domain, row.line)
    return Example(head, _text(row, source, columns.of["completion"]), domain, row.line)


def _bad(row: Row, source: Source, what: str) -> DataError:
    return bad_row(source.name, row.line, what, source.unit)


def _value(row: Row, source: Source, column: str) -> Any:
    if column not in row.values:
        has = ", ".join(map(str, row.values)) or "none"
        raise _bad(row, source, f"no column {column!r} (it has {has}); add it.")
    value = row.values[column]
    return _encodable(value, row, source, column) if isinstance(value, str) else value


def _text(row: Row, source: Source, column: str) -> str:
    """A text, or a number as it is written."""
    value = _value(row, source, column)
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        raise _bad(row, source, f"column {column!r} holds {value!r:.60}, not text; quote it.")
    return str(value)


def _encodable(value: str, row: Row, source: Source, column: str) -> str:
    """JSON may hold half a surrogate pair, which no tokenizer takes."""
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _bad(row, source, f"column {column!r} has half a surrogate pair; remove it.") from None
    return value


def _filled(row: Row, source: Source, template: str) -> str:
    values = {name: _value(row, source, name) for name in template_columns(template)}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise _bad(
                row,
                source,
                f"column {name!r} holds {value!r:.60}, which the prompt_template cannot show as text; make it text.",
            )
    return _encodable(template.format(**values), row, source, "prompt_template")


def _together(row: Row, source: Source, prompts: Sequence[str]) -> str:
    """Columns that are one prompt, an empty line between them; one of them may be blank."""
    held = [_text(row, source, name) for name in prompts if filled(row.values.get(name))]
    return "\n\n".join(held)


def _preferred(row: Row, source: Source, domain: str | None) -> Example:
    """A row with two texts, `chosen` and `rejected`, that begin with the same prompt."""
    chosen, rejected = _text(row, source, "chosen"), _text(row, source, "rejected")
    pairs = zip(chosen, rejected, strict=False)
    shared = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    while shared and not chosen[shared - 1].isspace():  # a word that both begin with is of the answer
        shared -= 1
    return Example(chosen[:shared], chosen[shared:], domain, row.line)


def _label(row: Row, source: Source, column: str) -> str:
    value = _value(row, source, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _bad(row, source, f"the label column {column!r} is empty; label or delete it.")
    if not isinstance(value, str | int):
        raise _bad(row, source, f"label {value!r:.60} is neither text nor a whole number; classes only.")
    return str(value).strip()


def _domain(row: Row, source: Source, columns: Columns) -> str | None:
    if "domain" not in columns.of:
        return None
    value = _value(row, source, columns.of["domain"])
    if not isinstance(value, str | int) or not str(value).strip():
        raise _bad(row, source, f"domain {value!r:.60} is not a name; give every row one.")
    return str(value)


# ---------------------------------------------------------------------- conversations


def _conversation(row: Row, source: Source, columns: Columns, domain: str | None, ignore: Sequence[str]) -> Example:
    of = columns.of
    flags: list[bool | None]
    if "messages" in of:
        messages, flags = _messages(row, source, of["messages"], ignore)
    else:
        messages, flags = _from_columns(row, source, columns, ignore)
    if "system" in of and filled(system := row.values.get(of["system"])):
        if not isinstance(system, str):
            raise _bad(row, source, f"column {of['system']!r} holds {system!r:.60}, not text; quote it.")
        if messages[0]["role"] == "system":
            raise _bad(
                row, source, f"both the column {of['system']!r} and the first message are a system message; keep one."
            )
        messages.insert(0, {"role": "system", "content": _encodable(system, row, source, of["system"])})
        flags.insert(0, None)
    if all(message["role"] != "assistant" for message in messages):
        raise _bad(row, source, "no assistant message to learn from; add one.")
    learned = None
    if any(flag is not None for flag in flags):
        learned = tuple(
            message["role"] == "assistant" and flag is not False for message, flag in zip(messages, flags, strict=True)
        )
    spoken = [
        message["content"] or ("tool_calls" if message.get("tool_calls") else "")
        for number, message in enumerate(messages)
        if (message["role"] == "assistant" if learned is None else learned[number])
    ]
    return Example(
        "",
        "".join(spoken),
        domain,
        row.line,
        tuple(messages),
        learned=learned,
        tools=_tools(row, source, columns),
        file=source.name,
        unit=source.unit,
    )


def _tools(row: Row, source: Source, columns: Columns) -> list[Any] | None:
    if "tools" not in columns.of or not filled(tools := row.values.get("tools")):
        return None
    return _descriptions(tools, row, source)


def _descriptions(tools: Any, row: Row, source: Source) -> list[Any] | None:
    if isinstance(tools, str):
        tools = _parsed(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _bad(row, source, "'tools' is not a list of tool descriptions; give JSON objects.")
    return tools or None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _from_columns(
    row: Row, source: Source, columns: Columns, ignore: Sequence[str]
) -> tuple[list[Message], list[bool | None]]:
    """A conversation that is spread over columns: only the completion is learned."""
    of = columns.of
    before: list[Message] = []
    if "history" in of and filled(row.values.get("history")):
        before += _history(row, source, ignore)
    answer = _value(row, source, of["completion"])
    whole = isinstance(answer, list) and answer and isinstance(answer[0], dict) and _who(answer[0]) != "assistant"
    if not (whole and of["completion"] == "chosen"):  # a preferred conversation already begins with its prompt
        if columns.prompts:
            before.append({"role": "user", "content": _together(row, source, columns.prompts)})
        elif "prompt" in of:
            prompt = _value(row, source, of["prompt"])
            if isinstance(prompt, list):
                before += _messages(row, source, of["prompt"], ignore)[0]
            else:
                before.append({"role": "user", "content": _text(row, source, of["prompt"])})
    if isinstance(answer, list):
        after, flags = _messages(row, source, of["completion"], ignore)
        if whole:  # of it the last answer is what was preferred
            flags = [False] * (len(after) - 1) + [None]
    else:
        after, flags = [{"role": "assistant", "content": _text(row, source, of["completion"])}], [None]
    return before + after, [False] * len(before) + flags


def _who(turn: Mapping[str, Any]) -> str | None:
    held = next((turn[key] for key in WHO if turn.get(key) is not None), None)
    return SPOKEN.get(held.lower()) if isinstance(held, str) else None


def _history(row: Row, source: Source, ignore: Sequence[str]) -> list[Message]:
    turns = row.values["history"]
    if isinstance(turns, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        flat = [text for turn in turns for text in turn]
        if all(isinstance(text, str) for text in flat):
            return [
                {"role": ("user", "assistant")[number % 2], "content": _encodable(text, row, source, "history")}
                for number, text in enumerate(flat)
            ]
        raise _bad(row, source, "column 'history' has a turn that is not text; give pairs of question and answer.")
    return _messages(row, source, "history", ignore)[0]


def _messages(row: Row, source: Source, column: str, ignore: Sequence[str]) -> tuple[list[Message], list[bool | None]]:
    """The messages of a column, and of each whether it says that it is learned (None: it says nothing)."""
    turns = _value(row, source, column)
    if isinstance(turns, str) and isinstance(inner := _parsed(turns), list):
        turns = inner  # a table may keep them as JSON
    if not isinstance(turns, list) or not turns:
        raise _bad(row, source, f"{column!r} is not a list of messages; give role and content.")
    if all(isinstance(turn, str) for turn in turns):
        turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
    messages: list[Message] = []
    flags: list[bool | None] = []
    for number, turn in enumerate(turns, start=1):
        message, flag = _message(turn, number, row, source, column, ignore)
        messages.append(message)
        flags.append(flag)
    return messages, flags


def messages_of(turns: Sequence[Any], name: str) -> list[Message]:
    """Messages that stand in no row, in the form that those of rows are given. Raises DataError, which calls them `name`."""
    return _messages(Row({"messages": list(turns)}, 0), Source(name, (), {}), "messages", ())[0]


def tools_of(tools: Any, name: str) -> list[Any] | None:
    """As `messages_of`, the tools of a conversation; None where there are none."""
    return _descriptions(tools, Row({}, 0), Source(name, (), {})) if filled(tools) else None


def _message(
    turn: Any, number: int, row: Row, source: Source, column: str, ignore: Sequence[str]
) -> tuple[Message, bool | None]:
    if isinstance(turn, dict) and len(turn) == 2 and type(turn.get("content")) is str and turn.get("role") in SPEAKERS:
        _encodable(turn["content"], row, source, column)
        return {"role": turn["role"], "content": turn["content"]}, None  # nearly all of them
    if not isinstance(turn, dict):
        raise _bad(row, source, f"message {number} of {column!r} lacks a text role or content.")
    held = {key: value for key, value in turn.items() if value is not None and key not in ignore}
    role = next((held.pop(key) for key in WHO if key in held), None)
    said = next((held.pop(key) for key in SAYS if key in held), None)
    calls = held.get("tool_calls")
    if not isinstance(role, str) or (said is None and not calls):
        raise _bad(row, source, f"message {number} of {column!r} lacks a text role or content.")
    if role.lower() not in SPOKEN:
        raise _bad(row, source, f"message {number} has the role {role!r}: {suggest(role, SPEAKERS)}")
    speaker = SPOKEN[role.lower()]
    flag = _flag(held, number, row, source)
    if speaker == "function_call":
        held["tool_calls"], said, speaker = [_call(said, number, row, source)], "", "assistant"
    elif calls:
        held["tool_calls"] = _calls(calls, number, row, source)
    elif calls is not None:
        del held["tool_calls"]  # an empty list
    _one_reasoning(held)
    content = "" if said is None else _spoken(said, number, row, source, column)
    extra = {str(key): value for key, value in held.items() if filled(value)}
    return {"role": speaker, "content": content} | extra, flag


def _one_reasoning(held: dict[str, Any]) -> None:
    """Reasoning under the name that templates read."""
    names = [key for key in REASONING if isinstance(held.get(key), str)]
    if names:
        text = held[names[0]]
        for key in names:
            del held[key]
        held[REASONING[0]] = text


def _flag(held: dict[str, Any], number: int, row: Row, source: Source) -> bool | None:
    flags = {key: held.pop(key) for key in LEARN if key in held}
    for key, value in flags.items():
        if value not in (0, 1):
            raise _bad(
                row, source, f"message {number} has {key} {value!r:.40}; only 0 and 1 (false and true) are known."
            )
    return None if not flags else all(map(bool, flags.values()))


def _spoken(said: Any, number: int, row: Row, source: Source, column: str) -> str:
    if isinstance(said, bool) or not isinstance(said, str | int | float | list):
        raise _bad(row, source, f"message {number} of {column!r} lacks a text role or content.")
    if not isinstance(said, list):
        return _encodable(str(said), row, source, column)
    texts = []
    for part in said:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _bad(
                row, source, f"message {number} has a part of type {kind!r:.40}; only parts of text can be learned."
            )
        texts.append(_encodable(text, row, source, column))
    return "".join(texts)


def _calls(calls: Any, number: int, row: Row, source: Source) -> list[Any]:
    if isinstance(calls, str):
        calls = _parsed(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _bad(row, source, f"message {number} has tool_calls that are not a list of calls; give JSON objects.")
    out = []
    for call in calls:
        inner = call.get("function")
        target = dict(inner) if isinstance(inner, dict) else dict(call)
        if isinstance(text := target.get("arguments"), str) and isinstance(parsed := _parsed(text), dict):
            target["arguments"] = parsed  # templates write them out as JSON themselves
        out.append({**call, "function": target} if isinstance(inner, dict) else target)
    return out


def _call(said: Any, number: int, row: Row, source: Source) -> dict[str, Any]:
    """A call that is written as the text of a message of its own."""
    call = _parsed(said) if isinstance(said, str) else said
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise _bad(
            row, source, f"message {number} is a function call without a name; give {{name, arguments}} as JSON."
        )
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments") or {}}}


def label_names(rows: Iterable[str], source: Source) -> list[str]:
    """The class names among the answers in a stable order: by number when all are whole numbers, else alphabetically.

    Raises DataError when there are fewer than two.
    """
    names = {answer for answer in rows if answer.strip()}
    if len(names) < 2:
        raise DataError(
            f"{source.name} has {len(names)} class ({', '.join(names) or 'none'}): classification needs two or more."
        )
    if all(_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


_NUMBER = re.compile(r"-?[0-9]{1,18}")
