"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def _trust(packages: list[str] | None) -> list[str] | None:
    if packages:
        from weftlora.terms.trust import trust_terms

        trust_terms(*packages)
    return packages


TrustTerms = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-terms",
        metavar="PACKAGE",
        callback=_trust,
        help="Import terms that the folder names from this package; may be repeated.",
    ),
]
"""Whose terms a config that comes from a folder may import. Given to a command, it holds for the whole process."""


def _jobs(text: str) -> str:
    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is not a number of runs: give a whole number from 1 up, or auto.")
    return text


Jobs = Annotated[
    str,
    typer.Option(
        metavar="N|auto",
        callback=_jobs,
        help="Run this many at once, each in a process with one torch thread; auto: as many as cores and memory have room for.",
    ),
]


def jobs_of(given: str) -> int | Literal["auto"]:
    """`--jobs` as a call takes it."""
    return "auto" if given == "auto" else int(given)


Out = Annotated[Path | None, typer.Option(help="Write the record to this JSON file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace --out even if it is something else.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
