"""What the page of a comparison is made of: parts with charts and tables, whose cells know what to sort by and where they lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from weftlora.compare.record import Comparison
from weftlora.report.charts import Spec


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    detail: str = ""
    """What stands small under it: its interval, or how it is meant."""
    order: float | str | None = None
    """What sorting goes by; None stands last, whichever way."""
    link: str = ""
    """The id of what it leads to on the page."""
    mark: str = ""
    """A class of the style sheet."""


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    title: str
    detail: str = ""
    number: bool = True


@dataclass(frozen=True)
class Line:
    """A row of a table; the first cell names it."""

    name: str
    """Of its method."""
    kind: str
    """Of its verdict."""
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Sheet:
    """A table that can be sorted, and filtered by method if `filtered`."""

    title: str
    columns: Sequence[Column]
    lines: Sequence[Line]
    filtered: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart, its caption, and what it shows for those who cannot see it."""

    caption: str
    alt: str
    spec: Spec


@dataclass(frozen=True)
class Part:
    """One part of the page."""

    key: str
    title: str
    lead: str
    charts: Sequence[Chart] = field(default_factory=list)
    sheet: Sheet | None = None
    folded: bool = False
    """Whether the table waits behind a line to open it with, below the charts that show the same."""


def of_method(found: Comparison, name: str, what: str) -> str:
    """The id of a method's `runs` or `recipe` on the page; names themselves may hold anything."""
    return f"{what}-{[method.name for method in found.methods].index(name)}"
