"""What a comparison comes to, and what it was: the sentences and facts at the top of its page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weftlora.compare.record import Comparison, Kind, Row
from weftlora.compare.stats import expected_false
from weftlora.compare.verdict import size
from weftlora.report.comparison import drawing
from weftlora.report.comparison.parts import Chart, Part, of_method
from weftlora.report.comparison.spread import paired
from weftlora.report.comparison.wording import KINDS, Metric, between, counted, is_frozen, kind_of, listed, metric

ORDER: tuple[Kind, ...] = ("baseline", "better", "undecided", "single", "worse")
"""In which verdicts are read."""


@dataclass(frozen=True)
class Said:
    """The verdict on a method."""

    name: str
    kind: str
    sentence: str
    link: str
    """The id of its runs."""


def overall(found: Comparison) -> str:
    """The plain sentence over all methods."""
    rows, base = contenders(found), found.baseline
    if not any(row.gap for row in rows):
        return f"There is nothing to say yet: no method and {base} have a complete run of the same seed."
    if all(row.verdict.kind == "single" for row in rows):
        return f"No verdict: with one seed, a difference to {base} may be luck. Compare with five seeds or more."
    better = [row for row in by_gain(found, rows) if row.verdict.kind == "better"]
    over = f"over {counted(len(found.seeds), 'seed')}"
    if not better:
        return f"Nothing tried here is distinguishably better than {base}, {over}."
    if len(better) == 1:
        return f"{better[0].name} is better than {base} by {_size(found, better[0])}, {over}."
    sizes = "; ".join(f"{row.name} by {_size(found, row)}" for row in better)
    return f"{len(better)} of {counted(len(rows), 'method')} are better than {base}, {over}: {sizes}."


def _size(found: Comparison, row: Row) -> str:
    return size(row.gap, found.metric) if row.gap else ""


def by_gain(found: Comparison, rows: list[Row]) -> list[Row]:
    """The rows that have a difference to the baseline, best first."""
    sign = -1 if found.higher_is_better else 1
    return sorted((row for row in rows if row.gap), key=lambda row: sign * row.gap.mean if row.gap else 0.0)


def contenders(found: Comparison) -> list[Row]:
    """The rows of what competes: neither the baseline nor the frozen base."""
    return [row for row in found.rows if row.name != found.baseline and not is_frozen(found, row.name)]


def verdicts(found: Comparison) -> list[Said]:
    """What may be said of every method but the baseline: the clear ones first, those without a difference last."""
    rows = contenders(found)
    known = sorted(by_gain(found, rows), key=lambda row: ORDER.index(row.verdict.kind))
    others = [row for row in found.rows if row.name != found.baseline and row not in known]
    return [
        Said(row.name, kind_of(found, row), _sentence(found, row), of_method(found, row.name, "runs"))
        for row in [*known, *others]
    ]


def _sentence(found: Comparison, row: Row) -> str:
    """With n where the verdict does not say it, and with the numbers where there is no verdict."""
    said, how = row.verdict.sentence, metric(found.metric)
    if is_frozen(found, row.name) and row.score:
        return f"{how.title} {how.text(row.score.mean)} without training"
    if row.gap and row.verdict.kind == "single":
        apart = (
            f"{how.size(row.gap.mean)} {'higher' if row.gap.mean > 0 else 'lower'} than" if row.gap.mean else "that of"
        )
        return f"{said}; its {how.title} is {apart} {found.baseline}{chr(39) + 's' if row.gap.mean else ''}"
    if row.gap and row.verdict.kind in ("better", "worse") and "seeds" not in said:
        return f"{said} over {counted(row.gap.n, 'seed')}"
    return said


def facts(found: Comparison) -> Iterator[tuple[str, str]]:
    """What was compared, and how."""
    how, seeds = metric(found.metric), ", ".join(map(str, found.seeds))
    yield "model", found.model
    yield "data", f"{found.data} · {found.task}"
    yield "metric", f"{how.title}, {how.direction}, on the test rows"
    yield "seeds", f"{len(found.seeds)}: {seeds}" + ("; differences are paired by seed" if len(found.seeds) > 1 else "")
    yield "budget", found.budget
    yield "machine", found.machine
    yield "versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())
    for method in found.methods:
        if method.note:
            yield "note", f"{method.name}: {method.note}"
    judged = [row.gap for row in contenders(found) if row.gap and row.gap.low is not None]
    if judged:
        yield "by chance", expected_false(len(judged), judged[0].level)


def warnings(found: Comparison) -> list[str]:
    """What a reader must know before believing the verdicts."""
    said = []
    if missing := [outcome for outcome in found.outcomes if outcome.status == "missing"]:
        names = listed(list(dict.fromkeys(outcome.method for outcome in missing)))
        said.append(f"Not finished: {len(missing)} of {counted(len(found.outcomes), 'run')} are missing ({names}).")
    lost = [outcome for outcome in found.outcomes if outcome.status in ("failed", "diverged")]
    if lost:
        names = listed(list(dict.fromkeys(outcome.method for outcome in lost)))
        said.append(f"{counted(len(lost), 'run')} failed or diverged ({names}); the table of runs says why.")
    edges = [method.name for method in found.methods if method.rate_at_edge]
    if edges:
        said.append(
            f"The best learning rate of {listed(edges)} is the lowest or highest that was tried: a better one may lie outside."
        )
    return said


def differences(found: Comparison) -> Iterator[Part]:
    """Every method's difference to the baseline, seed by seed and on average."""
    how, rows, said = metric(found.metric), [], []
    for row in by_gain(found, contenders(found)):
        if row.gap:
            each = paired(found, row.name, found.metric)
            rows += drawing.forest_rows(row.name, KINDS[row.verdict.kind], row.gap, each, how)
            said.append(f"{row.name} {how.gap(row.gap.mean)} ({between(row.gap, how.gap)})")
    if not rows:
        return
    what = f"Difference in {how.title} to {found.baseline}"
    chart = Chart(what, f"{what}, by method: {'; '.join(said)}", drawing.forest(rows, axis(found, how)))
    side = "right" if found.higher_is_better else "left"
    lead = f"What lies {side} of the line is better than {found.baseline} with the same seed."
    if any("low" in row for row in rows):
        lead += " Large dots are means, bars their intervals, the small dots below them the seeds."
    yield Part("differences", f"Difference to {found.baseline}", lead, [chart])


def axis(found: Comparison, how: Metric) -> str:
    """The title of an axis of differences."""
    what = f"{how.title}, {how.gap_unit}" if how.gap_unit else how.title
    return f"← worse · {what} · better →" if found.higher_is_better else f"← better · {what} · worse →"
