"""`weftlora report`: one offline page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weftlora.cli import output
from weftlora.cli.options import TrustTerms


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUNS...", help="A comparison's folder, or run folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page; it needs no network.")] = Path("report.html"),
    baseline: Annotated[
        str | None, typer.Option(help="What the others are held against; plain LoRA if not given.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What the verdicts are about, such as loss or exact_match.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The heading; the model and its data if not given.")] = None,
    routers: Annotated[
        bool, typer.Option("--routers", help="Also run routers over validation rows; loads the base.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out even if it is no page of weftlora.")
    ] = False,
    trust_terms: TrustTerms = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")] = False,
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
