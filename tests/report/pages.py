"""Pages taken apart: their elements as a tree, their charts as data, and how far colours stand apart.

found = tree(page(inspection)); found.find("h1")[0].text
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from weftlora.inspection.record import Inspection

NASTY = "<script>alert('x')</script>&\"'{{ 7 * 7 }}</script><!--"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1100, "height": 900}
MARKS = ".role-mark path, .role-mark text, .role-mark line"
Open = Callable[..., Any]
VOID = {"meta", "link", "input", "br"}


class Elements(HTMLParser):
    """The start tags of a page, and the text outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.inside):
            self.text.append(data)


@dataclass
class Node:
    """An element with what is in it."""

    tag: str
    attributes: dict[str, str | None]
    inner: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its words, with single spaces."""
        return " ".join("".join(each if isinstance(each, str) else f" {each.text} " for each in self.inner).split())

    def all(self) -> Iterator[Node]:
        """Itself and everything in it, in order."""
        yield self
        for each in self.inner:
            if isinstance(each, Node):
                yield from each.all()

    def find(self, tag: str, **attributes: str) -> list[Node]:
        """The elements of a tag with these attributes (class_ for class)."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [n for n in self.all() if n.tag == tag and all(n.attributes.get(k) == v for k, v in wanted.items())]


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].inner.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, tag

    def handle_data(self, data: str) -> None:
        self.open[-1].inner.append(data)


def tree(text: str) -> Node:
    """A page as a tree; every element must be closed."""
    builder = _Builder()
    builder.feed(text)
    assert len(builder.open) == 1
    return builder.open[0]


def specs(text: str) -> dict[str, Any]:
    """The charts of a page by the id of their place."""
    found = re.search(r'<script type="application/json" id="specs">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


def renamed(found: Inspection, name: str) -> Inspection:
    """The record with one site, its source, a domain and a sentence named `name`."""
    old = found.sites[0].site

    def change(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: change(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return type(value)(**fields)
        if isinstance(value, dict):
            return {name if key in (old, "dock") else key: change(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [change(inner) for inner in value]
        return name if value in (old, "dock") else value

    return dataclasses.replace(change(found), source=name, base=name, left_out=[name])


def luminance(colour: str) -> float:
    """Relative luminance of rgb(…), as the guidelines for accessible content define it."""
    parts = [int(float(n)) / 255 for n in re.findall(r"[\d.]+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast of two colours: 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def style(page: Any, selector: str, what: str) -> str:
    """What a browser makes of a property of the first such element."""
    return str(page.eval_on_selector(selector, f"e => getComputedStyle(e).{what}"))


@contextmanager
def opening(browser: Any, files: dict[str, Path]) -> Iterator[Open]:
    """Open pages by name where nothing but files can be fetched, and wait until their charts are drawn.

    Afterwards they must have asked for nothing but themselves, and complained of nothing.
    """
    said: list[str] = []
    contexts = []

    def open_(name: str, scheme: str = "light", viewport: dict[str, int] = DESK) -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        context.route(
            "**/*",
            lambda route: route.continue_() if route.request.url.startswith(("file:", "data:")) else route.abort(),
        )
        page = context.new_page()
        page.on("console", lambda message: said.append(f"console: {message.type} {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: said.append(f"request: {request.url}"))
        page.goto(files[name].as_uri())
        page.wait_for_selector("html[data-charts=drawn]", timeout=30_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    own = {f"request: {path.as_uri()}" for path in files.values()} | {"request: data:,"}
    assert [line for line in said if line not in own] == []
