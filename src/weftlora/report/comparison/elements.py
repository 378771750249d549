"""What the page of a comparison is made of: parts with charts and tables, numbers as people read them, and means over seeds.

Cells of a table know what to sort by and where they lead. Metrics have their units, means their intervals. Means are taken here of
what a comparison's own record has none of: curves, domains, further metrics, costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from weftlora.compare import record, statistics
from weftlora.compare.record import Comparison, Interval, Kind, Outcome, Row
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


KINDS: dict[Kind, str] = {
    "baseline": "baseline",
    "better": "better",
    "worse": "worse",
    "undecided": "not settled",
    "single": "no verdict",
}
"""How the page calls what may be said of a method."""


class Metric(record.Metric):
    """How a score is written."""

    @property
    def direction(self) -> str:
        return "higher is better" if self.higher else "lower is better"

    @property
    def unit(self) -> str:
        """Of its axis."""
        return ", %" if self.share else ""

    def drawn(self, value: float) -> float:
        """The value on an axis: shares as percent."""
        return 100 * value if self.share else value

    def text(self, value: float) -> str:
        """A score."""
        return minus(f"{value:.1%}".replace("%", " %") if self.share else f"{value:.{self.digits}f}")

    def possible(self, interval: Interval) -> Interval:
        """The interval of a score, cut where scores end."""
        return possible(interval, self.most)

    def gap(self, value: float) -> str:
        """A difference of two scores, with its sign; of shares in percentage points."""
        number = f"{100 * value:+.1f}" if self.share else f"{value:+.{self.digits}f}"
        return minus(number)

    def size(self, value: float) -> str:
        """A difference without its sign, with its unit."""
        return f"{self.gap(abs(value)).removeprefix('+')} {self.gap_unit}".rstrip()

    @property
    def gap_unit(self) -> str:
        return "percentage points" if self.share else ""


def metric(name: str) -> Metric:
    """The metric of a name; one that is not known is written plainly."""
    return Metric(**vars(record.metric_of(name)))


def minus(number: str) -> str:
    """The number with a minus sign that is as wide as its plus."""
    return number.replace("-", "\N{MINUS SIGN}")


def between(interval: Interval, text: Callable[[float], str]) -> str:
    """The interval in words; what two of one value have instead of one, and nothing for one seed, which the page says once."""
    if interval.low is None or interval.high is None:
        return "" if interval.n == 1 else "two equal values, no interval"
    if interval.low == interval.high:
        return "the same for every seed"
    return f"{text(interval.low)} to {text(interval.high)}"


ONE_SEED = "one seed"
"""What a tooltip has in place of an interval of one seed."""


def possible(interval: Interval, most: float = math.inf) -> Interval:
    """The interval without what no such number can be: below 0, or above `most`.

    >>> possible(Interval(0.97, 0.91, 1.03, 5), most=1).high
    1
    """
    if interval.low is None or interval.high is None:
        return interval
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, most))


def mean_cell(interval: Interval | None, text: Callable[[float], str], link: str = "", mark: str = "") -> Cell:
    """A mean over its interval."""
    if interval is None:
        return Cell("–", mark=mark)
    return Cell(text(interval.mean), between(interval, text), interval.mean, link, mark)


def figures(outcomes: Iterable[Outcome], key: str) -> list[float]:
    """A figure of every run that has it."""
    return [value for o in outcomes if math.isfinite(value := o.figures.get(key, math.nan))]


def spread_cell(values: list[float], text: Callable[[float], str], link: str = "") -> Cell:
    """A number that is usually the same in every run; from least to largest where it is not."""
    if not values:
        return Cell("–")
    low, high = min(values), max(values)
    shown = text(low) if text(low) == text(high) else f"{text(low)} – {text(high)}"
    return Cell(shown, order=sum(values) / len(values), link=link)


def count(value: float) -> str:
    """A whole number.

    >>> count(146432.0)
    '146,432'
    """
    return f"{round(value):,}"


def size(value: float) -> str:
    """Bytes, in the largest unit that leaves a digit before the point.

    >>> size(512), size(612_000), size(3.2e9)
    ('512 B', '598 KiB', '2.98 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def rate(value: float) -> str:
    """A learning rate.

    >>> rate(0.001), rate(3e-05)
    ('0.001', '3e-5')
    """
    return f"{value:g}".replace("e-0", "e-")


def listed(words: list[str]) -> str:
    """Words as a sentence lists them.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "seed"), counted(5, "seed")
    ('1 seed', '5 seeds')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def kind_of(found: Comparison, row: Row) -> str:
    """What the page says of a row in a word or two."""
    return "frozen base" if is_frozen(found, row.name) else KINDS[row.verdict.kind]


def is_frozen(found: Comparison, name: str) -> bool:
    """Whether a method is the frozen base."""
    return found.method(name).frozen


def interval(values: Sequence[float]) -> Interval | None:
    """The mean and its interval; None without a number that is finite."""
    known = [value for value in values if math.isfinite(value)]
    return statistics.interval(known) if known else None


def score(outcome: Outcome, metric: str, domain: str | None = None) -> float | None:
    """A score of a complete run, on all rows or on those of a domain; None where there is none."""
    scores: Mapping[str, float] = outcome.scores if domain is None else outcome.domains.get(domain, {})
    value = scores.get(metric, math.nan)
    return value if outcome.status == "complete" and math.isfinite(value) else None


def scores(found: Comparison, name: str, metric: str, domain: str | None = None) -> dict[int, float]:
    """A score of every complete run of a method, by seed."""
    return {o.seed: value for o in found.of(name) if (value := score(o, metric, domain)) is not None}


def paired(found: Comparison, name: str, metric: str, domain: str | None = None) -> dict[int, float]:
    """The score of a method less that of the baseline, by seed, where both are complete."""
    base = scores(found, found.baseline, metric, domain)
    return {seed: value - base[seed] for seed, value in scores(found, name, metric, domain).items() if seed in base}
