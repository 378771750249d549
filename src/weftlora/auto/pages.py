"""The pages that a search ends with: what was tried, what it cost and why this one; and the finalists as any comparison is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from weftlora.auto.candidates import SERVERS
from weftlora.auto.plan import in_words
from weftlora.auto.record import Found, Tried
from weftlora.compare.record import Comparison, metric_of
from weftlora.report import charts
from weftlora.report.charts import ACCENT, Spec, quantity, tooltip
from weftlora.report.comparison.elements import Metric, between, count, rate
from weftlora.report.comparison.page import write_report
from weftlora.report.web import check_extra, render
from weftlora.report.web import write as write_page

__all__ = ["PAGES", "check_extra", "page", "write"]

PAGES = ("report.html", "finalists.html")
STAGES = {
    "timing": "timing a few steps",
    "rates": "plain LoRA's rate",
    "methods": "methods",
    "finalists": "finalists on paired seeds",
    "ending": "export",
}


def write(found: Found, comparison: Comparison | None, folder: Path) -> None:
    """Write the pages into the search's folder; that of the finalists only where there are any. Raises RunError."""
    write_page(page(found, comparison is not None), folder / PAGES[0], overwrite=True)
    if comparison is not None:
        write_report([comparison.folder], folder / PAGES[1], None, None, "The finalists", False, overwrite=True)


def page(found: Found, has_finalists: bool) -> str:
    """The page of a search: a pure function of its record."""
    shown = [each for each in found.tried if any(loss is not None for loss in each.losses.values())]
    specs = {"tried-0": {**_losses(shown), "description": _alt(shown)}} if shown else {}
    return render(
        "auto.html.jinja",
        specs,
        found=found,
        facts=list(_facts(found)),
        finalists=list(_finalists(found)),
        link=PAGES[1] if has_finalists else "",
        stages=[(STAGES.get(name, name), in_words(seconds)) for name, seconds in found.stages.items()],
        tried=[_line(each) for each in found.tried],
    )


def _facts(found: Found) -> Iterator[tuple[str, str]]:
    yield "adapter", found.run
    yield "learning rate", rate(found.lr)
    if found.rank is not None:
        yield "rank", str(found.rank)
    if found.parameters is not None:
        yield "trainable parameters", count(found.parameters)
    yield "steps", count(found.steps)
    server = SERVERS[found.serve].title
    yield f"export{f' for {server}' if server else ''}", found.export or "none"
    if found.export_error is not None:
        yield (
            "largest logit difference",
            f"{found.export_error:.1e} of the largest logit, by stock peft without weftlora",
        )
    yield "recipe", found.recipe
    yield "time", f"{in_words(found.spent)} of {in_words(found.budget)}"
    yield "runs", count(found.runs)


def _finalists(found: Found) -> Iterator[Sequence[str]]:
    """Method, rate, score with its interval, difference to plain LoRA, verdict."""
    how = Metric(**vars(metric_of(found.metric)))
    lr = {method.name: method.lr for method in found.methods}
    for row in found.rows:
        score = "–" if row.score is None else how.text(row.score.mean)
        spread = "" if row.score is None else between(row.score, how.text)
        gap = "" if row.gap is None else how.gap(row.gap.mean)
        yield row.name, rate(lr[row.name] or 0.0), score, spread, gap, row.verdict.sentence


def _line(each: Tried) -> Sequence[str]:
    last = max(each.losses, key=int)
    losses = ", ".join(
        f"{'–' if loss is None else f'{loss:.4f}'} after {steps}"
        for steps, loss in sorted(each.losses.items(), key=lambda p: int(p[0]))
    )
    state = {"complete": "full length", "stopped": f"stopped at {last}", "failed": each.problem or "failed"}[each.state]
    return each.method, rate(each.lr), losses, state


def _losses(tried: list[Tried]) -> Spec:
    """Validation loss over the rate, by method; larger points were trained for longer."""
    rows = [
        {"method": each.method, "lr": each.lr, "loss": loss, "steps": int(steps)}
        for each in tried
        for steps, loss in each.losses.items()
        if loss is not None
    ]
    names = list(dict.fromkeys(row["method"] for row in rows))
    says = tooltip(
        ("method", "method", None),
        ("lr", "learning rate", "~g"),
        ("loss", "validation loss", ".4f"),
        ("steps", "steps", "d"),
    )
    colour: Any = {
        "field": "method",
        "type": "nominal",
        "title": None,
        "scale": {"domain": names, "range": [ACCENT, *charts.HEADS[1:]][: len(names)] or [ACCENT]},
    }
    return charts.spec(
        rows,
        300,
        mark={"type": "point", "filled": True, "opacity": 0.75},
        encoding={
            "x": {**quantity("lr", "learning rate", "~g", type="log")},
            "y": {**quantity("loss", "validation loss", zero=False)},
            "color": colour,
            "size": {"field": "steps", "type": "ordinal", "title": "steps", "scale": {"range": [40, 140]}},
            "tooltip": says,
        },
    )


def _alt(tried: list[Tried]) -> str:
    lowest = min((loss, each.method, each.lr) for each in tried for loss in each.losses.values() if loss is not None)
    return f"Validation loss over the learning rate for {len(tried)} trials; the lowest is {lowest[0]:.4f}, of {lowest[1]}."
