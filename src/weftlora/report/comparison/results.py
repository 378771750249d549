"""The results on the page of a comparison: what it comes to, in sentences, and the tables and charts that say so.

facts, verdicts, warnings   what was compared, and what may be said of it: the top of the page
results                     a row per method, its scores and costs with their intervals, each leading to the runs behind it
domains                     the same by domain, where the rows have domains
quality                     scores against trainable parameters and CPU seconds, with the front of what nothing beats in both
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weftlora.compare.record import METRICS, Comparison, Interval, Kind, Outcome, Row
from weftlora.compare.statistics import expected_false, size_in_words
from weftlora.report import charts
from weftlora.report.charts import Spec, tooltip
from weftlora.report.comparison import plots
from weftlora.report.comparison.elements import (
    KINDS,
    ONE_SEED,
    Cell,
    Chart,
    Column,
    Line,
    Metric,
    Part,
    Sheet,
    between,
    count,
    counted,
    figures,
    interval,
    is_frozen,
    kind_of,
    listed,
    mean_cell,
    metric,
    of_method,
    paired,
    possible,
    rate,
    score,
    scores,
    size,
    spread_cell,
)

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
    """The plain sentence over all methods; of a comparison that is not finished it begins with that, and how far each method is."""
    return f"{unfinished(found)}{_so_far(found)}"


def unfinished(found: Comparison) -> str:
    """That runs are missing, with n per method; empty where none is."""
    missing = [outcome for outcome in found.outcomes if outcome.status == "missing"]
    if not missing:
        return ""
    done = {method.name: [o for o in found.of(method.name) if o.status != "missing"] for method in found.methods}
    each = ", ".join(f"{name} n = {len(ended)} of {len(found.of(name))}" for name, ended in done.items())
    return f"Unfinished, {len(missing)} of {counted(len(found.outcomes), 'run')} missing ({each}). "


def _so_far(found: Comparison) -> str:
    rows, base = contenders(found), found.baseline
    if not any(row.gap for row in rows):
        waiting = [outcome for outcome in found.outcomes if "weftlora " in outcome.problem]
        if waiting and not any(row.score for row in found.rows):
            return f"Nothing was measured yet: give the {counted(len(waiting), 'command')} below."
        return f"There is nothing to say yet: no method and {base} have a complete run of the same seed."
    if all(row.verdict.kind == "single" for row in rows):
        return f"No verdict: with one seed, a difference to {base} may be luck. Compare with five seeds or more."
    better = [row for row in by_gain(found, rows) if row.verdict.kind == "better"]
    least, most = (function(row.gap.n for row in rows if row.gap) for function in (min, max))
    over = f"over {counted(most, 'seed')}" if least == most else f"over {least} to {most} seeds"
    if not better:
        return f"Nothing tried here is distinguishably better than {base}, {over}."
    if len(better) == 1:
        gap = better[0].gap
        return f"{better[0].name} is better than {base} by {_size(found, better[0])}, over {counted(gap.n if gap else 0, 'seed')}."
    sizes = "; ".join(f"{row.name} by {_size(found, row)}" for row in better)
    return f"{len(better)} of {counted(len(rows), 'method')} are better than {base}, {over}: {sizes}."


def _size(found: Comparison, row: Row) -> str:
    return size_in_words(row.gap, found.metric) if row.gap else ""


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
    yield "metric", f"{how.title}, {how.direction}, on the {found.split} rows"
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
    if commands := [o.problem for o in found.outcomes if o.status == "missing" and "weftlora " in o.problem]:
        said.append(f"To finish: {'; '.join(command.partition(': ')[2] for command in commands)}.")
    elif any(outcome.status == "missing" for outcome in found.outcomes):
        said.append(
            f"To finish, give the command of {found.folder} again: weftlora compare continues where it was stopped."
        )
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
            rows += plots.forest_rows(row.name, KINDS[row.verdict.kind], row.gap, each, how)
            apart = between(row.gap, how.gap)
            said.append(f"{row.name} {how.gap(row.gap.mean)}" + (f" ({apart})" if apart else ""))
    if not rows:
        return
    what = f"Difference in {how.title} to {found.baseline}"
    chart = Chart(what, f"{what}, by method: {'; '.join(said)}", plots.forest(rows, axis(found, how)))
    side = "right" if found.higher_is_better else "left"
    lead = f"What is {side} of the line is better than {found.baseline} with the same seed."
    if any("low" in row for row in rows):
        lead += " Large dots are means, bars their intervals, the small dots below them the seeds."
    yield Part("differences", f"Difference to {found.baseline}", lead, [chart])


def axis(found: Comparison, how: Metric) -> str:
    """The title of an axis of differences."""
    what = f"{how.title}, {how.gap_unit}" if how.gap_unit else how.title
    return f"← worse · {what} · better →" if found.higher_is_better else f"← better · {what} · worse →"


def results(found: Comparison) -> Part:
    """All methods, best first."""
    how, others = metric(found.metric), other_metrics(found)
    columns = [
        Column("method", number=False),
        Column(how.title, how.direction),
        Column("difference", f"to {found.baseline}"),
        Column("wins", "of its seeds"),
        *(Column(metric(name).title, metric(name).direction) for name in others),
        Column("rank"),
        Column("trainable", "parameters"),
        Column("stored", "numbers"),
        Column("export", "on disk"),
        Column("learning rate", "chosen for it"),
        Column("step ratio", f"CPU, to {found.baseline}"),
        Column("training", "seconds"),
        Column("tokens/s"),
        Column("memory", "peak"),
    ]
    lines = [Line(row.name, kind_of(found, row), list(_cells(found, row, others))) for row in ranking(found)]
    level = next((row.score.level for row in found.rows if row.score), 0.95)
    means = (
        f"Means over seeds with {level:.0%} intervals."
        if len(found.seeds) > 1
        else "One seed: no number has an interval."
    )
    lead = (
        f"{means} Every number leads to the runs it comes from, every name to its recipe; a click on a heading sorts."
    )
    return Part("results", "Results", lead, sheet=Sheet("Results", columns, lines, filtered=True))


def ranking(found: Comparison) -> list[Row]:
    """The rows, best first; those without a score last."""
    sign = -1 if found.higher_is_better else 1
    return sorted(found.rows, key=lambda row: (row.score is None, sign * row.score.mean if row.score else 0.0))


def other_metrics(found: Comparison) -> list[str]:
    """The scores that runs have beside the metric of the verdicts, in the order of the metrics that are known."""
    names = {name for outcome in found.outcomes for name in outcome.scores} - {found.metric}
    return [*(name for name in METRICS if name in names), *sorted(names - set(METRICS))]


def _cells(found: Comparison, row: Row, others: Iterable[str]) -> Iterable[Cell]:
    how, method, link = metric(found.metric), found.method(row.name), of_method(found, row.name, "runs")
    complete = [outcome for outcome in found.of(row.name) if outcome.status == "complete"]
    yield Cell(row.name, kind_of(found, row), row.name, of_method(found, row.name, "recipe"))
    yield _score(row.score, how, link)
    yield mean_cell(row.gap, how.gap, link, row.verdict.kind)
    yield Cell(f"{row.wins} of {row.gap.n}", order=row.wins, link=link) if row.gap else Cell("–")
    for name in others:
        scores = [value for outcome in complete if (value := score(outcome, name)) is not None]
        yield _score(interval(scores), metric(name), link)
    yield Cell("–") if method.rank is None else Cell(str(method.rank), order=method.rank, link=link)
    yield _trained(found, row.name, complete, link)
    yield spread_cell(figures(complete, "stored"), count, link)
    yield spread_cell(figures(complete, "export_bytes"), size, link)
    yield (
        Cell("–")
        if method.lr is None
        else Cell(rate(method.lr), "at the edge" if method.rate_at_edge else "", method.lr, link)
    )
    yield _cost(row.step_ratio, lambda value: f"{value:.2f}", link)
    yield _measured(complete, "train_seconds", lambda value: f"{value:,.3g}", link)
    yield _measured(complete, "tokens_per_s", lambda value: f"{value:,.0f}", link)
    yield _measured(complete, "peak_bytes", size, link)


def _trained(found: Comparison, name: str, complete: list[Outcome], link: str) -> Cell:
    """Trainable parameters, and by how much they miss the budget."""
    method = found.method(name)
    if method.parameters is None:
        return spread_cell(figures(complete, "trained"), count, link)
    gap = "" if method.budget_gap is None else f"{method.budget_gap:+.1%} of budget".replace("-", "\N{MINUS SIGN}")
    return Cell(count(method.parameters), gap, method.parameters, link)


def _measured(complete: list[Outcome], key: str, text: Callable[[float], str], link: str) -> Cell:
    return _cost(interval(figures(complete, key)), text, link)


def _cost(whole: Interval | None, text: Callable[[float], str], link: str) -> Cell:
    return mean_cell(whole and possible(whole), text, link)


def _score(whole: Interval | None, how: Metric, link: str) -> Cell:
    return mean_cell(whole and how.possible(whole), how.text, link)


DOMAIN = KINDS["undecided"]
"""Differences within domains have no verdicts; all stand in one colour."""


def domains(found: Comparison) -> Iterator[Part]:
    """Differences to the baseline in a chosen domain, and the score of every method in every domain."""
    names = sorted({domain for outcome in found.outcomes for domain in outcome.domains})
    if len(names) < 2:
        return
    how = metric(found.metric)
    rows = []
    for domain in names:
        for row in ranking(found):
            each = paired(found, row.name, found.metric, domain)
            whole = interval(list(each.values()))
            if whole is not None and row.name != found.baseline and not is_frozen(found, row.name):
                rows += plots.forest_rows(row.name, DOMAIN, whole, each, how, domain=domain)
    drawn = []
    if rows:
        pick = charts.drop_down("domain", "Domain", list(dict.fromkeys(row["domain"] for row in rows)), "domain")
        what = f"Difference in {how.title} to {found.baseline} within a domain"
        drawn = [Chart(what, f"{what}, by method", plots.forest(rows, axis(found, how), pick))]
    lead = (
        f"{how.title.capitalize()} in each domain, paired by seed as above. With {len(names)} domains and several methods some "
        "interval will leave out 0 by luck: these are leads, not verdicts."
    )
    yield Part("domains", "By domain", lead, drawn, _sheet(found, names), folded=bool(drawn))


def _sheet(found: Comparison, names: list[str]) -> Sheet:
    how = metric(found.metric)
    lines = []
    for row in ranking(found):
        link = of_method(found, row.name, "runs")
        cells = [Cell(row.name, order=row.name, link=of_method(found, row.name, "recipe"))]
        means = [interval(list(scores(found, row.name, found.metric, domain).values())) for domain in names]
        cells += [mean_cell(mean and how.possible(mean), how.text, link) for mean in means]
        lines.append(Line(row.name, kind_of(found, row), cells))
    columns = [Column("method", number=False), *(Column(domain, how.title) for domain in names)]
    return Sheet(f"{how.title.capitalize()} by domain", columns, lines)


Text = Callable[[float], str]


def quality(found: Comparison) -> Iterator[Part]:
    """A chart per cost, where at least two methods are known by it."""
    how = metric(found.metric)
    costs: list[tuple[str, str, Mapping[str, Interval], Text]] = [
        ("trainable parameters", f"{how.title.capitalize()} and trainable parameters", trained(found), count),
        (
            "CPU seconds of training",
            f"{how.title.capitalize()} and time",
            seconds(found),
            lambda value: f"{value:,.0f} s" if value >= 10 else f"{value:.2g} s",
        ),
    ]
    shown, fronts = [], []
    for what, title, cost, text in costs:
        points = _points(found, cost, text)
        if len(points) > 1 and not _is_equal(points):
            best = front(points, found.higher_is_better)
            for point in points:
                point["front"] = point["name"] in best
            alt = f"{how.title} against {what}; no method is both cheaper and better than {listed(best)}"
            shown.append(Chart(title, alt, _chart(found, points, what)))
            fronts.append(f"by {what}, {listed(best)}")
    if shown:
        many = len(found.seeds) > 1
        bars = (
            "Bars are intervals over seeds; where they overlap, neither need be better."
            if many
            else "Each is of one seed."
        )
        lead = (
            f"No other method is both cheaper and better than those on the dashed line: {'; '.join(fronts)}. "
            f"{bars}{_frozen(found)}"
        )
        yield Part("quality", "Quality and cost", lead, shown)


EQUAL = 1.15
"""Largest cost over the smallest up to which methods cost the same, as where a budget made them equal: a chart would tell nothing."""


def _is_equal(points: list[dict[str, Any]]) -> bool:
    costs = [point["x"] for point in points]
    return 0 < max(costs) <= EQUAL * min(costs)


def trained(found: Comparison) -> dict[str, Interval]:
    """Trainable parameters of every method."""
    given = {m.name: Interval(m.parameters, None, None, 1) for m in found.methods if m.parameters is not None}
    return _over_runs(found, lambda outcome: next(iter(figures([outcome], "trained")), None)) | given


def seconds(found: Comparison) -> dict[str, Interval]:
    """CPU seconds of training: its steps, and those that a search before it was worth."""

    def of(outcome: Outcome) -> float | None:
        each, searched = figures([outcome], "cpu_per_step"), figures([outcome], "search_steps")
        return each[0] * (found.method(outcome.method).steps + sum(searched)) if each else None

    return _over_runs(found, of)


def _over_runs(found: Comparison, number: Callable[[Outcome], float | None]) -> dict[str, Interval]:
    held: dict[str, Interval] = {}
    for method in found.methods:
        complete = [o for o in found.of(method.name) if o.status == "complete"]
        if (whole := interval([value for o in complete if (value := number(o)) is not None])) is not None:
            held[method.name] = whole
    return held


def _points(found: Comparison, cost: Mapping[str, Interval], text: Text) -> list[dict[str, Any]]:
    how = metric(found.metric)
    points = []
    for row in ranking(found):
        if row.score is None or row.name not in cost or is_frozen(found, row.name):
            continue
        x, y = possible(cost[row.name]), how.possible(row.score)
        point = {"name": row.name, "x": x.mean, "y": how.drawn(y.mean), "cost": text(x.mean), "n": y.n}
        point |= {"score": how.text(y.mean), "interval": between(y, how.text) or ONE_SEED}
        if y.low is not None and y.high is not None:
            point |= {"y_low": how.drawn(y.low), "y_high": how.drawn(y.high)}
        if x.low is not None and x.high is not None and x.high > x.low:
            point |= {"x_low": x.low, "x_high": x.high}
        points.append(point)
    return points


def front(points: list[dict[str, Any]], higher: bool) -> list[str]:
    """The names of those that no other is at least as cheap and as good as, and better in one; cheapest first.

    >>> front([{"name": "a", "x": 1, "y": 3}, {"name": "b", "x": 2, "y": 2}, {"name": "c", "x": 2, "y": 4}], higher=False)
    ['a', 'b']
    """
    sign = -1 if higher else 1
    at = {point["name"]: (point["x"], sign * point["y"]) for point in points}
    beaten = {n for n, (x, y) in at.items() if any(u <= x and v <= y and (u, v) != (x, y) for u, v in at.values())}
    return sorted(at.keys() - beaten, key=lambda name: (*at[name], name))


def _chart(found: Comparison, points: list[dict[str, Any]], what: str) -> Spec:
    how, names = metric(found.metric), [method.name for method in found.methods if not is_frozen(found, method.name)]
    shown = [name for name in names if any(point["name"] == name for point in points)]
    says = tooltip(
        ("name", "method", None),
        ("score", how.title, None),
        ("interval", "interval", None),
        ("n", "seeds", "d"),
        ("cost", what, None),
    )
    x, y = (
        _axis(points, field, title) for field, title in (("x", what), ("y", f"{how.title}{how.unit} ({how.direction})"))
    )
    drawn = plots.cut(plots.cut(points, x["scale"], "x_low"), y["scale"], "y_low")
    return plots.costs(drawn, shown, found.baseline, x, y, says)


def _axis(points: list[dict[str, Any]], field: str, title: str) -> Spec:
    log = plots.is_wide((point[field] for point in points), 8)
    form = "~s" if max(point[field] for point in points) >= 10_000 else "~g" if log else None
    return charts.quantity(field, title, form, **plots.reach(points, field, f"{field}_low", f"{field}_high", log))


def _frozen(found: Comparison) -> str:
    """Where the frozen base stands; on the chart it would leave no room for the others."""
    how = metric(found.metric)
    scores = [row.score for row in found.rows if is_frozen(found, row.name) and row.score]
    return f" The frozen base, at {how.text(scores[0].mean)}, is not drawn." if scores else ""
