"""`weftlora compare` and `weftlora report`: which of these adapters helps on my data, at what cost; one offline page about runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from weftlora.cli import output
from weftlora.cli.options import Jobs, Json, Quiet, TrustTerms, jobs_of
from weftlora.compare.record import metric_of
from weftlora.errors import ConfigError
from weftlora.extras import needs

if TYPE_CHECKING:
    from weftlora.compare.plan import Plan
    from weftlora.compare.record import Comparison, Interval, Method, Outcome
    from weftlora.compare.running import Standing


def compare(
    recipe: Annotated[
        str, typer.Argument(help="A comparison's file; with --worker, or its folder; with --fetch, its store.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="budget.r=4 seeds=3")] = None,
    jobs: Jobs = "1",
    out: Annotated[str | None, typer.Option(help="Write the comparison to this folder; short for out=....")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the methods and how equal they are; run nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the comparison in the folder and start again.")
    ] = False,
    worker: Annotated[
        bool,
        typer.Option("--worker", help="Be one of many, on any machine that reaches the folder, until no run is left."),
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Keep results in this, such as s3://bucket/prefix, not in a shared folder; with --worker or --engine ray.",
        ),
    ] = None,
    fetch: Annotated[
        bool,
        typer.Option("--fetch", help="Read the comparison from the store that is given into --out, and run nothing."),
    ] = False,
    engine: Annotated[str, typer.Option(help="Run on this machine (local) or on a cluster (ray).")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Connect to this Ray cluster, such as head:6379; with --engine ray.")
    ] = None,
    gpus: Annotated[float | None, typer.Option(help="Give every run this share of a GPU; with --engine ray.")] = None,
    lease: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Take over runs that were not heard of for this long; with --worker."),
    ] = 60.0,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train several adapters side by side on the same seeds, and say which are better.

    One that was stopped goes on where it was: give the same command again, also with more seeds. Runs that failed are tried again,
    and the exit code is 1 as long as there are any; one that diverged is a result.
    """
    given = [*(overrides or []), *([f"out={out}"] if out else [])]
    if dry_run:
        with output.calling(as_json, quiet=True), needs("compare", "weftlora compare"):
            from weftlora.compare.recipe import CompareRecipe

            read = CompareRecipe.read(recipe, *given)
            read.check_places()
            from weftlora.compare.plan import make

            planned = make(read)
        output.show(planned.record(), as_json, lambda: plan_table(planned))
        return
    with output.calling(as_json, quiet=True), watching(not (quiet or as_json)) as watch:
        from weftlora.compare import compare as call
        from weftlora.compare import fetch as bring
        from weftlora.compare import work

        if fetch and (out is None or overrides or worker or overwrite or store):
            raise ConfigError(
                "--fetch takes the URL of a store and the folder to bring it to, with --out, and nothing else."
            )
        if store is not None and not worker and engine == "local":
            raise ConfigError(f"--store {store} is for workers: give --worker or --engine ray with it.")
        if worker and (overwrite or jobs != "1"):
            wrong = "--overwrite" if overwrite else f"--jobs {jobs}"
            raise ConfigError(f"--worker is one of many that share the runs, and takes no {wrong}: leave it out.")
        if fetch:
            found = bring(recipe, str(out))
        elif worker:
            found = work(recipe, *given, lease=lease, watch=watch, store=store)
        else:
            found = call(
                recipe,
                *given,
                jobs=jobs_of(jobs),
                overwrite=overwrite,
                watch=watch,
                engine=cast(Any, engine),
                address=address,
                gpus=gpus,
                store=store,
            )
    output.show(found.record(), as_json, lambda: result(found))
    if any(run.status == "failed" for run in found.outcomes):
        raise typer.Exit(1)


# ---------------------------------------------------------------------- while it runs


def watching(
    show: bool, clock: Callable[[], float] = time.monotonic
) -> AbstractContextManager[Callable[[Standing], None]]:
    """Who to tell how far a comparison is: a live table on a terminal, now and then a line elsewhere."""
    return output.watching_many(show, clock, standing_table, _progress, lambda standing: standing.said)


def _progress(standing: Standing) -> str:
    at_work = "; ".join(
        f"{each.name}: {each.tick.phase} {each.tick.done}/{each.tick.total}" for each in standing.running
    )
    return "  ".join(filter(None, [f"{standing.done} of {standing.total} runs", _left(standing.seconds_left), at_work]))


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} left" if hours else f"{minutes}:{rest:02} left"


def standing_table(standing: Standing) -> RenderableType:
    """How far a comparison is: each method's runs and mean so far, then what is at work and how long it will take."""
    columns = ("method", "runs", f"{standing.metric} so far")
    table = output.table(*columns, words=columns, look="headed")
    for name, (runs, mean) in standing.best.items():
        table.add_row(name, str(runs), "" if mean is None else number(mean, standing.metric))
    lines = [f"{each.name}: {each.tick.phase} {each.tick.done}/{each.tick.total}" for each in standing.running]
    over = f"{standing.done} of {standing.total} runs  {_left(standing.seconds_left)}"
    return Group(table, *lines, over)


# ---------------------------------------------------------------------- before and after


def plan_table(plan: Plan) -> RenderableType:
    """The methods of a plan: rank, alpha, trainable parameters, how far from the budget; and how many runs it is."""
    table = output.table("method", "rank", "alpha", "trainable", "from the budget", "steps", look="headed")
    for method in plan.methods:
        gap = "" if method.budget_gap is None else f"{method.budget_gap:+.1%}"
        alpha = "" if method.alpha is None else f"{method.alpha:g}"
        numbers = (_or_blank(method.rank), alpha, f"{method.parameters or 0:,}", gap, str(method.steps or ""))
        table.add_row(method.name, *numbers)
    tried = len(plan.rates) * len(plan.tuning_seeds)
    own = [f"{method.name} at lr {method.lr:g}" for method in plan.methods if method.lr is not None]
    if tried:
        own.append(f"{tried} of a method to choose its rate from {_listed(plan.rates)}")
    elif len(own) < sum(not method.frozen for method in plan.methods):
        own.append(f"{'the others' if own else 'all'} at lr {plan.rates[0]:g}")
    rates = "".join(f", {each}" for each in own)
    lines = [plan.budget_sentence, f"{plan.runs} runs: seeds {_listed(plan.seeds)}{rates}.", *_notes(plan.methods)]
    return Group(table, *lines)


def result(found: Comparison) -> RenderableType:
    """The verdicts, then a row per method for what it reaches and one for what it costs, then what must be known to read them."""
    width = max(len(row.name) for row in found.rows)
    verdicts = [f"{row.name.ljust(width)}  {row.verdict.sentence}" for row in found.rows]
    return Group(
        *verdicts,
        "",
        quality_table(found),
        cost_table(found),
        *_below(found),
    )


def quality_table(found: Comparison) -> Table:
    """A row per method: its score, its difference to the baseline, both with their intervals, and the seeds it wins."""
    n = len(found.seeds)
    score = f"{found.metric.replace('_', ' ')}, n = {n}"
    table = output.table("method", score, f"minus {found.baseline}", "wins", look="headed")
    for row in found.rows:
        wins = f"{row.wins} of {row.gap.n}" if row.gap else ""
        score, gap = _interval(row.score, found.metric, n), _interval(row.gap, found.metric, n, sign=True)
        table.add_row(row.name, score, gap, wins)
    return table


def cost_table(found: Comparison) -> Table:
    """A row per method: its size, its rate, its CPU seconds a step over the baseline's, and the most memory it took."""
    table = output.table("method", "rank", "trainable", "lr", "CPU a step", "peak memory", look="headed")
    for row in found.rows:
        method = found.method(row.name)
        peak = [run.figures["peak_bytes"] for run in found.of(row.name) if "peak_bytes" in run.figures]
        table.add_row(
            row.name,
            _or_blank(method.rank),
            f"{method.parameters or 0:,}",
            "" if method.lr is None else f"{method.lr:g}",
            "" if row.step_ratio is None else f"{row.step_ratio.mean:.2f} x",
            f"{max(peak) / 2**20:,.0f} MiB" if peak else "",
        )
    return table


def _below(found: Comparison) -> list[str]:
    from weftlora.compare.statistics import expected_false

    lines = [found.budget, f"{found.machine}; n = {len(found.seeds)} seed{'s' * (len(found.seeds) > 1)}."]
    judged = [row.gap for row in found.rows if row.gap is not None and row.gap.low is not None]
    if judged:
        said = expected_false(len(judged), judged[0].level)
        lines.append(f"{said[0].upper()}{said[1:]}.")
    if edge := [f"{method.name} ({method.lr:g})" for method in found.methods if method.rate_at_edge]:
        lines.append(f"A better rate may be outside those that were tried: {', '.join(edge)}.")
    lines += [*_notes(found.methods), *_problems(found.outcomes)]
    if any(run.status == "failed" for run in found.outcomes):
        lines.append("Give the same command again to retry what failed.")
    return [*lines, f"runs: {found.folder}"]


def _problems(outcomes: list[Outcome]) -> list[str]:
    """Why runs are not complete: a line for those of a method that say the same."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for run in outcomes:
        if run.status != "complete":
            places.setdefault((run.method, run.status, run.problem), []).append(run.folder)
    return [
        f"{', '.join([first, *(place.rsplit('/', 1)[-1] for place in more)])}: {status}: {problem}"
        for (_, status, problem), (first, *more) in places.items()
    ]


def _notes(methods: list[Method]) -> list[str]:
    return [f"{method.name}: {method.note}" for method in methods if method.note]


def _interval(found: Interval | None, metric: str, seeds: int, sign: bool = False) -> str:
    """A mean with its interval, and of how many seeds, where that is not all."""
    if found is None:
        return ""
    unit = " %" if metric_of(metric).share else ""
    mean, *ends = (
        number(value, metric, sign).removesuffix(unit)
        for value in (found.mean, found.low, found.high)
        if value is not None
    )
    shown = f"{mean} [{', '.join(ends)}]{unit}" if ends else f"{mean}{unit}"
    return shown if found.n == seeds else f"{shown} (n = {found.n})"


def number(value: float, metric: str, sign: bool = False) -> str:
    """A score or a difference of two, as tables have it."""
    form = "+" if sign else ""
    if metric_of(metric).share:
        return f"{100 * value:{form}.1f} %"
    return f"{value:{form}.4f}" if metric == "loss" else f"{value:{form}.1f}"


def _or_blank(value: int | None) -> str:
    return "" if value is None else str(value)


def _listed(values: list[int] | list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS...", help="A comparison's folder, or run folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the page to this file; it needs no network.")] = Path(
        "report.html"
    ),
    baseline: Annotated[
        str | None, typer.Option(help="Compare the others with this method; plain LoRA by default.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Judge by this score, such as loss or exact_match.")] = None,
    title: Annotated[str | None, typer.Option(help="Set the heading; by default the model and its data.")] = None,
    routers: Annotated[
        bool, typer.Option("--routers", help="Also run routers over validation rows; loads the base.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out even if it is not a page of weftlora.")
    ] = False,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
) -> None:
    """Write one offline page: which method is better, at what cost, and every run behind it."""
    with output.calling(as_json, quiet=True):
        from weftlora.report import report as call

        written = call(
            *runs, out=out, baseline=baseline, metric=metric, title=title, routers=routers, overwrite=overwrite
        )
    output.show(
        written.record(), as_json, lambda: "\n".join([written.verdict, *written.warnings, f"written: {written.path}"])
    )
