"""Text of others on every surface: whatever is in it, a terminal obeys none of it and a page shows all of it."""

from __future__ import annotations

import html.parser
import io
import json
import math
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Group
from rich.table import Table
from rich.text import Text

from weftlora.cli import commands, output
from weftlora.errors import ConfigError, WeftError, suggest, unknown_key
from weftlora.export.record import _in_yaml, _table
from weftlora.foreign_text import LIMIT, for_markdown, from_json, in_code, shortened, visible

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b]52;c;ZXZpbA==\x07",
    "[/b]",
    "[bold]x[/bold]",
    "[link=http://evil]x[/link]",
    ":boom:",
    "\\[/b]",
    "x\\",
    "a\rb",
    "a\x08b",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "a\u200bb",
    "\x9b31m",
    "\udcff",
    "\U000e0041",
    "a\nb",
    "a\tb",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}",
    "`x` | y",
    "[a](javascript:alert(1))",
    "![](http://evil/x.png)",
    "# h",
    "</script>",
    "\x00",
    "\u2028",
]
foreign = (
    st.text(st.characters(), max_size=40)
    | st.sampled_from(HOSTILE)
    | st.tuples(st.sampled_from(HOSTILE), st.text(max_size=10), st.sampled_from(HOSTILE)).map("".join)
)
many = settings(max_examples=300, deadline=None)


def unseen(text: str, *allowed: str) -> list[str]:
    """The characters of `text` that a terminal would obey or a reader not see."""
    hidden = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    fine = {"\u200c", "\u200d", *allowed}
    return [c for c in text if unicodedata.category(c) in hidden and c not in fine]


@many
@given(foreign)
def test_nothing_that_is_hidden_is_left(text: str) -> None:
    assert unseen(visible(text)) == []
    assert unseen(visible(text, lines=True), "\n", "\t") == []
    assert visible(visible(text)) == visible(text)


@pytest.mark.parametrize("text", ["Zürich", "日本語", "नमस्ते", "👩‍👩‍👧", "می‌خواهم", "naïve [x] <y> | `z`", "Ω ‖ΔW‖ · ²"])
def test_what_can_be_read_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def on_screen(renderable: Any) -> str:
    screen = output.Screen()
    screen.file = io.StringIO()
    screen.width = 200
    screen.print(renderable)
    return screen.file.getvalue()


@many
@given(foreign)
@example("[/b]")
@example("\x1b]0;x\x07")
def test_the_screen_shows_it_as_text(text: str) -> None:
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    for renderable in (text, Text(text), table, Group(text, table)):
        shown = on_screen(renderable)
        assert unseen(shown, "\n", "\t") == []
    bare = "".join(visible(text, lines=True).split())
    assert bare in "".join(on_screen(text).split())


@many
@given(foreign)
def test_an_error_is_one_line_that_names_it(text: str) -> None:
    said = io.StringIO()
    for error in (
        ConfigError(f"x={text}: no."),
        unknown_key(text, ["heads"], "train"),
        WeftError(suggest(text, ["heads"])),
    ):
        assert unseen(str(error), "\n", "\t") == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr", said)
            commands._say(str(error))
    assert said.getvalue().count("\n") == 3
    assert unseen(said.getvalue(), "\n") == []


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 5), st.integers(0, 6))
def test_an_error_is_short_however_large_the_value(seed: int, size: int) -> None:
    text = chr(97 + seed) * 10**size
    assert len(str(ConfigError(f"x={text!r} is not a number: give one."))) <= LIMIT
    assert str(ConfigError(f"x={text!r} is not a number: give one.")).endswith("give one.")
    assert len(shortened(text)) <= LIMIT


class Page(html.parser.HTMLParser):
    """The text and the tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[tuple[str, Any]] = []

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, attributes))


def parsed(page: str) -> Page:
    found = Page()
    found.feed(page)
    return found


@settings(max_examples=100, deadline=None)
@given(foreign)
def test_a_page_shows_it_as_text(text: str) -> None:
    from weftlora.report import web

    plain, given_ = (web.render("base.html.jinja", {"c": {"title": name}}) for name in ("plain", text))
    assert unseen(given_.replace("\ufeff", ""), "\n", "\t", *(set(plain) - {"\x1b"})) == []
    assert [tag for tag, _ in parsed(given_).tags] == [tag for tag, _ in parsed(plain).tags]


def test_a_value_in_a_template_is_written_out_and_escaped() -> None:
    from jinja2 import Environment

    from weftlora.report.web import _shown

    environment = Environment(autoescape=True, finalize=_shown)
    template = environment.from_string("<p title='{{ x }}'>{{ x }}</p>{{ n }}{{ safe|safe }}")
    for text in HOSTILE:
        page = template.render(x=text, n=3, safe="<b>ours</b>")
        assert unseen(page, "\n", "\t") == []
        assert [tag for tag, _ in parsed(page).tags] == ["p", "b"]
        assert parsed(page).tags[0][1] == [("title", visible(text, lines=True))]


def in_a_notebook(text: str) -> dict[str, tuple[str, int]]:
    """What a notebook shows of every result that holds this text, and in how many cells or sentences it stands there."""
    from weftlora.compare.record import Comparison, Method, Row, Verdict
    from weftlora.inspection.core_directions import AdapterDirections, DirectionsReport
    from weftlora.inspection.record import Inspection
    from weftlora.runs.run import Run
    from weftlora.search.selection import Candidate, Selection

    run = SimpleNamespace(
        folder=text, status="complete", steps=1, parameters={}, metrics={text: 1.0}, adapter_folder=text
    )
    group = Candidate(text, 0, (), 0.0, 1.0, 0.0, True, True, False, 0.0)
    row = Row(text, None, None, 0, Verdict("single", text))
    compared = SimpleNamespace(folder=text, rows=[row], metric="loss", baseline=text, budget=text, complete=False)
    compared.method = lambda name: Method(name, {})
    site = SimpleNamespace(site=text, predicted=[3, 1], rate=[0.5], norm=1.0, rank=4, relative=None)
    adapter = AdapterDirections(text, "launched", [site])  # type: ignore[list-item]
    looked = SimpleNamespace(sites=[site] * 9, method=text, source=text, verdict=[text])
    return {
        "run": (Run._repr_html_(run), 2),  # type: ignore[arg-type]
        "selection": (Selection((group,), "block", {}, {}, {})._repr_html_(), 1),
        "comparison": (Comparison._repr_html_(compared), 5),  # type: ignore[arg-type]
        "directions": (DirectionsReport(8, 0, None, [adapter], [])._repr_html_(), 2),
        "inspection": (Inspection._repr_html_(looked), 11),  # type: ignore[arg-type]
    }


@settings(max_examples=60, deadline=None)
@given(foreign)
@example("<script>alert(1)</script>")
def test_a_notebook_shows_it_as_text(text: str) -> None:
    for kind, (shown, times) in in_a_notebook(text).items():
        assert unseen(shown) == [], kind
        assert {tag for tag, _ in parsed(shown).tags} <= {
            "p",
            "b",
            "br",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
        }, kind
        assert not any(attributes for _, attributes in parsed(shown).tags), kind
        assert "".join(parsed(shown).text).count(visible(text)) >= times, kind


@many
@given(foreign, foreign)
def test_a_card_shows_it_as_words(name: str, value: str) -> None:
    rows = _table({name: value, "last": "x"}).split("\n")
    assert len(rows) == 3 + bool(value)
    for row in rows:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3, row
    text = for_markdown(value)
    assert "<" not in text
    assert "\n" not in text
    assert not re.search(r"(?<!\\)(?:\\\\)*[\[\]`*]", text)
    assert "`" not in in_code(value)
    assert unseen(text) == []


@many
@given(foreign)
def test_the_head_of_a_card_is_yaml(text: str) -> None:
    import yaml

    assert yaml.safe_load(f"base_model: {_in_yaml(text)}\ntags: []") == {
        "base_model": text if re.fullmatch(r"[A-Za-z][\w./-]*", text) else visible(text),
        "tags": [],
    }


def test_no_console_but_ours_is_made_and_no_markup_is_read() -> None:
    import weftlora

    for path in Path(weftlora.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\bConsole\(", source.replace("class Screen(Console)", "")), path
        assert "from_markup" not in source, path


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000, "", "nul", "[1,]"])
def test_what_is_no_json_or_nested_too_deep_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_json(text)


def test_all_else_is_what_json_says_but_for_numbers_beyond_64_bits() -> None:
    plain = {"a": [1, -(2**53), 1.5, None, True, "x"], "b": {"c": 123456789012345678}}
    assert from_json(json.dumps(plain)) == plain
    huge = from_json("[12345678901234567890, " + "9" * 400 + "]")
    assert huge == [12345678901234567890.0, math.inf]
    assert [type(number) for number in huge] == [float, float]
