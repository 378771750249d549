"""What a comparison found, as plain data: its settings, its methods, one outcome per run, and what the runs say together.

Everything here is read from run folders and from `compare.json`, the plan beside them; nothing is measured here. A metric says what
it is of, which way is better, and how it is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from weftlora.foreign_text import html_table
from weftlora.records import Record

Name = Literal["loss", "exact_match", "accuracy", "macro_f1", "bleu", "rouge_l"]


@dataclass(frozen=True)
class Metric:
    """A score as `weftlora.evaluate` names it."""

    name: str
    title: str
    of: Literal["loss", "answers", "classes", "else"] = "else"
    word: str = ""
    """Of a difference: 0.03 nats."""
    higher: bool = True
    """Whether higher is better."""
    share: bool = False
    """In [0, 1]: said in percent, and a difference in points, which are hundredths."""
    most: float = math.inf
    """The largest there is; the least is 0."""
    digits: int = 4

    @property
    def factor(self) -> float:
        """What a difference is multiplied with where it is said in words."""
        return 100.0 if self.share else 1.0


METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", "loss", "loss", "nats", higher=False),
        Metric("exact_match", "exact match", "answers", "points of exact match", share=True, most=1),
        Metric("accuracy", "accuracy", "classes", "points of accuracy", share=True, most=1),
        Metric("macro_f1", "macro F1", "classes", "points of macro F1", share=True, most=1),
        Metric("bleu", "BLEU", "answers", "points of BLEU", most=100, digits=2),
        Metric("rouge_l", "ROUGE-L", "answers", "points of ROUGE-L", most=100, digits=2),
    )
}


def metric_of(name: str) -> Metric:
    """The metric of a name; one that is not known is said by its own name."""
    return METRICS.get(name) or Metric(name, name.replace("_", " "), word=name)


NONE = {"recipe": "none"}
"""The adapter section of the frozen base."""
FORMAT = 1
"""Version of the record; a newer one is refused by name."""

Status = Literal["complete", "diverged", "failed", "missing"]
Kind = Literal["baseline", "better", "worse", "undecided", "single"]


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and the interval that holds the true one at `level`.

    low and high are None where there is none: at n = 1, and of two equal values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    level: float = 0.95


@dataclass(frozen=True)
class Verdict:
    """What may be said of a method against the baseline, and the sentence that says it.

    better, worse: the interval of the paired difference leaves out 0. undecided: it does not. single: one seed, no verdict.
    """

    kind: Kind
    sentence: str
    seeds_needed: int | None = None
    """About how many seeds would settle an undecided difference of the size that was seen; None where no number would."""


@dataclass(frozen=True)
class Rate:
    """A learning rate that was tried with a seed that is not reported; the loss is None if the run diverged."""

    lr: float
    seed: int
    validation_loss: float | None


@dataclass(frozen=True)
class Method:
    """One contender: its adapter section, and what the budget and the choice of the rate made of it."""

    name: str
    adapter: dict[str, Any]
    """The adapter section that is trained, with the rank that the budget gave it; `NONE` is the frozen base."""
    rank: int | None = None
    alpha: float | None = None
    parameters: int | None = None
    """Trainable parameters of the adapter, without a classification head."""
    budget_gap: float | None = None
    """parameters / budget − 1; None where the budget is not one of parameters."""
    steps: int = 0
    """Optimiser steps of the training itself, without a search."""
    lr: float | None = None
    rates: list[Rate] = field(default_factory=list)
    rate_at_edge: bool = False
    """The chosen rate is the lowest or highest that was tried: a better one may lie outside."""
    note: str = ""
    """What could not be made equal, in a sentence."""

    @property
    def frozen(self) -> bool:
        """Whether it is the base without an adapter."""
        return self.adapter == NONE


@dataclass(frozen=True)
class Outcome:
    """One reported run."""

    method: str
    seed: int
    folder: str
    """Relative to the comparison's folder, with / between its parts."""
    status: Status
    scores: dict[str, float] = field(default_factory=dict)
    """On the test rows: loss (nats per token or row), exact_match, accuracy, macro_f1 (shares), bleu, rouge_l (0-100)."""
    domains: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same by domain."""
    figures: dict[str, float] = field(default_factory=dict)
    """trained, stored (numbers); stored_bytes, export_bytes, peak_bytes; train_seconds, cpu_per_step, tokens_per_s; search_steps,
    search_seconds. What a run has none of, or a machine cannot tell, is absent."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Rows with step and loss or validation_loss, in order."""
    problem: str = ""
    """Why it is not complete, in a sentence."""


@dataclass(frozen=True)
class Row:
    """What all seeds of a method say together."""

    name: str
    score: Interval | None
    """Of the metric; None if no seed is complete."""
    gap: Interval | None
    """Metric of the method minus that of the baseline, paired by seed; None for the baseline itself and the frozen base."""
    wins: int
    """Seeds in which it is better than the baseline."""
    verdict: Verdict
    step_ratio: Interval | None = None
    """CPU seconds per step over the baseline's, paired by seed."""


@dataclass(frozen=True)
class Comparison(Record):
    """A comparison: the same model, rows, steps and seeds for every method, and what came out."""

    format_version: ClassVar[int | None] = FORMAT
    folder: str
    model: str
    data: str
    task: str
    metric: str
    higher_is_better: bool
    baseline: str
    seeds: list[int]
    budget: str
    """What is equal between the methods, in a sentence."""
    methods: list[Method]
    outcomes: list[Outcome]
    rows: list[Row]
    versions: dict[str, str]
    machine: str
    """Device, threads and how many runs there were at once, in a line."""
    complete: bool
    split: str = "test"
    """The rows that the scores are of: test, or validation for plain runs that have no test rows."""

    def _repr_html_(self) -> str:
        rows = []
        for row in self.rows:
            method = self.method(row.name)
            score = "" if row.score is None else f"{row.score.mean:.4g}"
            rows.append((row.name, method.rank or "", f"{method.parameters or 0:,}", score, row.verdict.sentence))
        columns = ["method", "rank", "trainable parameters", self.metric.replace("_", " "), f"beside {self.baseline}"]
        more = [] if self.complete else ["Not complete: give the same command again to continue."]
        return html_table(f"Comparison {self.folder}", columns, rows, [self.budget, *more])

    def method(self, name: str) -> Method:
        """The method of a name. Raises KeyError."""
        return {method.name: method for method in self.methods}[name]

    def of(self, name: str) -> list[Outcome]:
        """The outcomes of a method, by seed."""
        return sorted((o for o in self.outcomes if o.method == name), key=lambda o: o.seed)
