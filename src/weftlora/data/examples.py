"""Rows with named columns into examples with roles: what is the prompt, what is the answer, what is the label."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weftlora.data.config import DataConfig, Format, template_columns
from weftlora.data.read import Row, Source, bad_row
from weftlora.errors import ConfigError, DataError, suggest

# Columns that stand for a role when the role's own name is absent. Two that fit are an error, never a guess.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "input", "source"),
    "completion": ("output", "answer", "response", "target"),
    "messages": ("conversation",),
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

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One row by role. `answer` is what the loss is on: the completion, the whole text, or the label's name."""

    prompt: str
    answer: str
    domain: str | None
    line: int
    messages: tuple[Message, ...] = ()
    whole: bool = True

    @property
    def empty(self) -> bool:
        """Nothing to learn: no answer text, or no text to classify (`examples` leaves `answer` blank then)."""
        return not self.answer.strip()

    def key(self, split_on: str = "row") -> str:
        """Equal for rows that are exact duplicates, or that share their prompt with `split_on="prompt"`."""
        held = (self.prompt, self.messages[:-1]) if split_on == "prompt" else (self.prompt, self.messages, self.answer)
        return repr(held)


@dataclass(frozen=True)
class Columns:
    """Which columns play which role; built once from the training rows and used for every split."""

    format: Format
    of: Mapping[str, str]
    template: str | None  # fills the format's first role instead of a column


def find_columns(source: Source, config: DataConfig, wanted: Format | None = None) -> Columns:
    """Format and columns from `config` and, where it says nothing, from `wanted` and the first row of `source`.

    Raises ConfigError when a role has no column, more than one that fits, or no part in the format.
    """
    present = [str(name) for name in source.rows[0].values]
    template = config.prompt_template
    chosen = config.format if config.format != "auto" else wanted or _format(present, config, source.name)
    for role in ("prompt", "completion", "messages", "text", "label"):
        if role not in ROLES[chosen] and getattr(config.fields, role) is not None:
            raise ConfigError(f"data.fields.{role} plays no part in format {chosen}: leave it out.")
    needed = ROLES[chosen][1:] if template is not None else ROLES[chosen]
    roles = {role: _column(role, chosen, present, config, source.name) for role in needed}
    if (domain := config.fields.domain or ("domain" if "domain" in present else None)) is not None:
        roles["domain"] = domain
    return Columns(chosen, roles, template)


def _candidates(role: str, present: list[str], config: DataConfig) -> list[str]:
    if (said := getattr(config.fields, role)) is not None:
        return [said]
    return [role] if role in present else [alias for alias in ALIASES[role] if alias in present]


def _format(present: list[str], config: DataConfig, name: str) -> Format:
    has = {role for role in ALIASES if _candidates(role, present, config)}
    if config.prompt_template is not None:
        has = (has | {"prompt", "text"}) - {"messages"}
    for chosen in ("chat", "prompt_completion", "classification", "text"):
        if has.issuperset(ROLES[chosen]):
            return chosen
    raise ConfigError(
        f"cannot tell the format of {name} from its columns ({', '.join(present) or 'none'}): set data.format to one of "
        f"{', '.join(ROLES)}, and data.fields."
    )


def _column(role: str, chosen: Format, present: list[str], config: DataConfig, name: str) -> str:
    fit = _candidates(role, present, config)
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise ConfigError(
            f"the columns {' and '.join(fit)} of {name} could both be the {role}: say data.fields.{role}=<column>"
            + (" or give a data.prompt_template." if role in ("prompt", "text") else ".")
        )
    raise ConfigError(
        f"{name} has no column for the {role} of format {chosen} (its columns: {', '.join(present)}): "
        f"say data.fields.{role}=<column>."
    )


def examples(source: Source, columns: Columns) -> list[Example]:
    """Every row of `source` by role. Raises DataError naming the row on a missing column or a wrong type."""
    return [_example(row, source, columns) for row in source.rows]


def _example(row: Row, source: Source, columns: Columns) -> Example:
    domain = _domain(row, source, columns)
    if columns.format == "chat":
        messages = _messages(row, source, columns.of["messages"])
        answer = "".join(message["content"] for message in messages if message["role"] == "assistant")
        return Example("", answer, domain, row.line, messages=messages)
    first = ROLES[columns.format][0]
    head = _text(row, source, columns.of[first]) if columns.template is None else _filled(row, source, columns.template)
    if columns.format == "text":
        return Example("", head, domain, row.line, whole=row.whole)
    if columns.format == "classification":
        label = _label(row, source, columns.of["label"])
        return Example(head, label if head.strip() else "", domain, row.line)
    return Example(head, _text(row, source, columns.of["completion"]), domain, row.line)


def _value(row: Row, source: Source, column: str) -> Any:
    if column not in row.values:
        has = ", ".join(map(str, row.values)) or "none"
        raise bad_row(source.name, row.line, f"no column {column!r} (it has {has}); add it.", source.unit)
    return row.values[column]


def _text(row: Row, source: Source, column: str) -> str:
    value = _value(row, source, column)
    if not isinstance(value, str):
        raise bad_row(source.name, row.line, f"column {column!r} holds {value!r:.60}, not text; quote it.", source.unit)
    return _encodable(value, row, source, column)


def _encodable(value: str, row: Row, source: Source, column: str) -> str:
    """JSON may hold half a surrogate pair, which no tokenizer takes."""
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_row(
            source.name, row.line, f"column {column!r} has half a surrogate pair; remove it.", source.unit
        ) from None
    return value


def _filled(row: Row, source: Source, template: str) -> str:
    values = {name: _value(row, source, name) for name in template_columns(template)}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise bad_row(
                source.name,
                row.line,
                f"column {name!r} holds {value!r:.60}, which the prompt_template cannot show as text; make it text.",
                source.unit,
            )
    return _encodable(template.format(**values), row, source, "prompt_template")


def _label(row: Row, source: Source, column: str) -> str:
    value = _value(row, source, column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise bad_row(source.name, row.line, f"the label column {column!r} is empty; label or delete it.", source.unit)
    if not isinstance(value, str | int):
        raise bad_row(
            source.name, row.line, f"label {value!r:.60} is neither text nor a whole number; classes only.", source.unit
        )
    return str(value).strip()


def _domain(row: Row, source: Source, columns: Columns) -> str | None:
    if "domain" not in columns.of:
        return None
    value = _value(row, source, columns.of["domain"])
    if not isinstance(value, str | int) or not str(value).strip():
        raise bad_row(source.name, row.line, f"domain {value!r:.60} is not a name; give every row one.", source.unit)
    return str(value)


def _messages(row: Row, source: Source, column: str) -> tuple[Message, ...]:
    turns = _value(row, source, column)
    if not isinstance(turns, list) or not turns:
        raise bad_row(
            source.name, row.line, f"{column!r} is not a list of messages; give role and content.", source.unit
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise bad_row(
                source.name, row.line, f"message {number} of {column!r} lacks a text role or content.", source.unit
            )
        if role not in SPEAKERS:
            raise bad_row(
                source.name, row.line, f"message {number} has the role {role!r}: {suggest(role, SPEAKERS)}", source.unit
            )
        messages.append({"role": role, "content": _encodable(content, row, source, column)})
    if all(message["role"] != "assistant" for message in messages):
        raise bad_row(source.name, row.line, "no assistant message to learn from; add one.", source.unit)
    return tuple(messages)


def label_names(rows: list[Example], source: Source) -> list[str]:
    """The class names in a stable order: by number when all are whole numbers, else alphabetically.

    Raises DataError when there are fewer than two.
    """
    names = {example.answer for example in rows if not example.empty}
    if len(names) < 2:
        raise DataError(
            f"{source.name} has {len(names)} class ({', '.join(names) or 'none'}): classification needs two or more."
        )
    if all(_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


_NUMBER = re.compile(r"-?[0-9]{1,18}")
