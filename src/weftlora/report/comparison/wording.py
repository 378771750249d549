"""Numbers as people read them: metrics with their units, means with their intervals, sizes and counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from weftlora.compare import metrics
from weftlora.compare.record import Comparison, Interval, Kind, Outcome, Row
from weftlora.report.comparison.parts import Cell

KINDS: dict[Kind, str] = {
    "baseline": "baseline",
    "better": "better",
    "worse": "worse",
    "undecided": "not settled",
    "single": "no verdict",
}
"""How the page calls what may be said of a method."""


class Metric(metrics.Metric):
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
    return Metric(**vars(metrics.metric_of(name)))


def minus(number: str) -> str:
    """The number with a minus sign that is as wide as its plus."""
    return number.replace("-", "\N{MINUS SIGN}")


def between(interval: Interval, text: Callable[[float], str]) -> str:
    """The interval in words; what one seed, or two of one value, have instead of one."""
    if interval.low is None or interval.high is None:
        return "one seed, no interval" if interval.n == 1 else "two equal values, no interval"
    if interval.low == interval.high:
        return "the same for every seed"
    return f"{text(interval.low)} to {text(interval.high)}"


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
