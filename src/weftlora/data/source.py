"""What every reader returns: the rows of one file, each with the line it came from, and the file's hash."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weftlora.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One record. `line` counts from 1; it is the row's number where the source has no lines."""

    values: dict[str, Any]
    line: int
    whole: bool = True  # False: cut out of running text, so its end is not the end of a document


@dataclass(frozen=True)
class Source:
    """The rows of one file or split. `unit` says what `Row.line` counts; `blank` how many empty lines were passed."""

    name: str
    rows: list[Row]
    hashes: dict[str, str]
    unit: str = "line"
    blank: int = 0
    parts: dict[str, Source] = field(default_factory=dict)  # the other splits of a folder that holds several

    def at(self, line: int) -> str:
        return place(self.name, line, self.unit)


def place(name: str | Path, line: int, unit: str = "line") -> str:
    """How an error names a row: `rows.jsonl, line 17`."""
    return f"{name}, {unit} {line}"


def bad_row(name: str | Path, line: int, what: str, unit: str = "line") -> DataError:
    """The error for one row; `what` goes on after the colon and says what to do."""
    return DataError(f"{place(name, line, unit)}: {what}")
