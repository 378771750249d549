"""What a search found, as plain data: the adapter it ends with, why that one, what was tried and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from weftlora.compare.record import Method, Outcome, Row
from weftlora.foreign_text import html_table
from weftlora.records import Record

FORMAT = 1
"""Version of the record; a newer one is refused by name."""


@dataclass(frozen=True)
class Tried:
    """A method at a rate: its validation loss after each length that it was trained for."""

    stage: Literal["rates", "methods"]
    method: str
    lr: float
    losses: dict[str, float | None]
    """Optimiser steps → validation loss; None where the run diverged or failed."""
    state: Literal["complete", "stopped", "failed"]
    """complete: trained to the full length; stopped: others were better at a shorter one."""
    problem: str = ""


@dataclass(frozen=True)
class Left:
    """A method that was not searched, and why."""

    method: str
    why: str


@dataclass(frozen=True)
class Found(Record):
    """What a search ends with. Folders count from `folder`."""

    format_version: ClassVar[int | None] = FORMAT
    folder: str
    model: str
    data: str
    serve: str
    metric: str
    method: str
    adapter: dict[str, Any]
    """The chosen method's adapter section."""
    lr: float
    rank: int | None
    parameters: int | None
    steps: int
    seed: int
    run: str
    """The run whose adapter it is."""
    recipe: str
    """The file to train it again."""
    export: str
    """The folder for the server; empty where there is none, and `export_note` says why."""
    export_error: float | None
    """The largest difference of a logit from the live adapter over the largest logit."""
    export_note: str
    why: str
    """The sentence that says why this one."""
    ended: Literal["complete", "time"]
    """Whether everything planned was done, or the budget was spent first."""
    budget: float
    spent: float
    """Seconds of wall time, over all starts."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, of the starts that worked at it."""
    runs: int = 0
    """How many runs were trained, short ones included."""
    tried: list[Tried] = field(default_factory=list)
    left_out: list[Left] = field(default_factory=list)
    seeds: int = 0
    methods: list[Method] = field(default_factory=list)
    """Those that were trained on the paired seeds; empty where the budget ended before."""
    outcomes: list[Outcome] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    at_once: str = ""
    """Why there were as many runs at once, where that was left to us."""
    peak_bytes: int | None = None
    """The most memory that a run took in a step, as in its `figures`; None where the machine cannot tell."""

    def _repr_html_(self) -> str:
        rows = [("method", self.method), ("lr", f"{self.lr:g}"), ("rank", self.rank or ""), ("run", self.run)]
        return html_table(f"Search {self.folder}", ["", ""], rows, [self.why])
