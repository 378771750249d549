"""Text that somebody else wrote, made fit to be shown and to be read: names from data, models, adapters and recipes, their JSON.

    visible        for a terminal, an error, a log: what would steer a terminal or hide in a line is written out (\\x1b, \\u202e)
    for_markdown   for a model card: also, nothing of it is markup
    html_table     what a notebook shows of a result: a heading, a table, sentences; nothing of the text is markup
    from_json      what a JSON text says; it fails in one way only

The HTML of pages is escaped by the template that it stands in, after `visible`.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

LIMIT = 2000
"""Characters of an error that are shown, however large the value is that it is about."""
_JOINERS = "\u200c\u200d"
"""Zero-width joiners: without them scripts and emoji are spelt wrong, and they hide nothing."""
_HIDDEN = re.compile(
    # controls; soft hyphen and other format characters, marks of direction, separators of lines, lone surrogates, private and tags
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    r"\ue000-\uf8ff\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff\U000f0000-\U0010ffff]|[^\x00-\x7f]"
)
_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_MARKUP = re.compile(r"([\\`*\[\]|~!#])")


def visible(text: str, lines: bool = False) -> str:
    """`text` with everything written out that a reader could not see, or a terminal would obey.

    Args:
        lines: leave ends of lines and tabs as they are; otherwise the result is one line.

    >>> visible("a\\x1b[31m\\u202eb")
    'a\\\\x1b[31m\\\\u202eb'
    """
    return _HIDDEN.sub(lambda found: _written(found[0]), text) if lines else visible(text, True).translate(_BREAKS)


_BREAKS = {10: "\\n", 9: "\\t"}


def _written(character: str) -> str:
    if unicodedata.category(character) not in _CATEGORIES or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: str, limit: int = LIMIT) -> str:
    """`text`, or its beginning and its end with a word on how much there is between."""
    if len(text) <= limit:
        return text
    end = limit // 4
    return f"{text[: limit - end - 40]} … [{len(text) - limit + 40:,} characters] … {text[-end:]}"


def for_markdown(text: str) -> str:
    """`text` as words of a Markdown document: one line, and no link, table, heading or HTML in it."""
    return html.escape(_MARKUP.sub(r"\\\1", visible(text)), quote=False)


def html_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], sentences: Iterable[str] = ()
) -> str:
    """A result as a notebook shows it: the title, a table where it has rows, then a sentence a line; all of it only text.

    >>> html_table("a < b", ["name"], [["<script>"]])
    '<p><b>a &lt; b</b></p><table><thead><tr><th>name</th></tr></thead><tbody><tr><td>&lt;script&gt;</td></tr></tbody></table>'
    """

    def cells(kind: str, values: Iterable[object]) -> str:
        return "".join(f"<{kind}>{_escaped(value)}</{kind}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table>" if body else ""
    below = "<br>".join(map(_escaped, sentences))
    return f"<p><b>{_escaped(title)}</b></p>{table}" + (f"<p>{below}</p>" if below else "")


def _escaped(value: object) -> str:
    return html.escape(visible(shortened(str(value))))


def in_code(text: str) -> str:
    """`text` inside a span of code, which no backtick may end."""
    return visible(text).replace("`", "'")


def from_json(text: str, exact: bool = False) -> Any:
    """What a JSON text says.

    A whole number beyond 64 bits, which nothing of ours writes, is read as a float: nothing that counts with it can overflow.

    Args:
        exact: whole numbers of any length are what they are, for what is shown and not counted with.

    Raises:
        ValueError: no JSON, or nested too deep for a reader that calls itself.
    """
    try:
        return json.loads(text) if exact else json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)
