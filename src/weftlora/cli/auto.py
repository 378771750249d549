"""`weftlora auto`: the best adapter for a file within a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType

from weftlora.cli import output
from weftlora.cli.compare import number
from weftlora.cli.options import Jobs, Json, Quiet, TrustTerms, jobs_of

if TYPE_CHECKING:
    from weftlora.auto.record import Found
    from weftlora.auto.running import Standing


def auto(
    recipe: Annotated[str, typer.Argument(help="A search's file, or the first KEY=VALUE.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="data.train=rows.jsonl budget=2h serve=vllm")
    ] = None,
    jobs: Jobs = "1",
    out: Annotated[str | None, typer.Option(help="Write the search to this folder; short for out=....")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the search in the folder and start again.")
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Put what has ended into this too, such as s3://bucket/prefix, and continue from there on any machine.",
        ),
    ] = None,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the best adapter for your rows within a budget of time, and export it.

    Times a few steps, tunes plain LoRA's rate, searches methods, trains the best on paired seeds, and keeps plain LoRA unless
    another is better. A search that was stopped goes on where it was: give the same command again.
    """
    given = [*(overrides or []), *([f"out={out}"] if out else [])]
    with output.calling(as_json, quiet=True), watching(not (quiet or as_json)) as watch:
        from weftlora.auto import auto as call

        found = call(recipe, *given, jobs=jobs_of(jobs), overwrite=overwrite, watch=watch, store=store)
    output.show(found.record(), as_json, lambda: result(found))


# ---------------------------------------------------------------------- while it runs


def watching(
    show: bool, clock: Callable[[], float] = time.monotonic
) -> AbstractContextManager[Callable[[Standing], None]]:
    """Who to tell how far a search is: a live line on a terminal, now and then a line elsewhere; what was decided always."""
    return output.watching_many(
        show, clock, progress, progress, lambda standing: f"{standing.stage}: {standing.said}" if standing.said else ""
    )


def progress(standing: Standing) -> str:
    """A stage, its runs, what is at work, and how much of the budget is spent."""
    at_work = "; ".join(
        f"{each.name}: {each.tick.phase} {each.tick.done}/{each.tick.total}" for each in standing.running
    )
    spent = f"{standing.spent:,.0f} of {standing.budget:,.0f} s"
    return "  ".join(filter(None, [f"{standing.stage}: {standing.done} of {standing.total} runs", spent, at_work]))


# ---------------------------------------------------------------------- after


def result(found: Found) -> RenderableType:
    """Why this one, the finalists, what was left out, and where everything is."""
    lines = [found.why, ""]
    table = output.table(
        "method", "lr", f"{found.metric.replace('_', ' ')}", "verdict", words=("method", "verdict"), look="headed"
    )
    lr = {method.name: method.lr for method in found.methods}
    for row in found.rows:
        score = "" if row.score is None else number(row.score.mean, found.metric)
        table.add_row(row.name, f"{lr[row.name] or 0:g}", score, row.verdict.sentence)
    below = [f"left out: {left.method}: {left.why}" for left in found.left_out]
    memory = "" if found.peak_bytes is None else f", none of more than {found.peak_bytes / 2**20:,.0f} MiB"
    error = "" if found.export_error is None else f", {found.export_error:.1e} from the live adapter"
    below += [
        f"adapter: {found.folder}/{found.run}/adapter  ({found.method}, lr {found.lr:g}, rank {found.rank}, {found.parameters or 0:,} "
        "trainable parameters)",
        f"recipe:  {found.folder}/{found.recipe}",
        f"export:  {found.folder}/{found.export}{error}" if found.export else "export:  none",
        *([found.export_note] if found.export_note else []),
        f"page:    {found.folder}/report.html",
        f"{found.runs} runs in {found.spent:,.0f} of {found.budget:,.0f} s{memory}",
    ]
    return Group(*lines, *([table] if found.rows else []), *below)
