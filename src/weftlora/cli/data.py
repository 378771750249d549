"""`weftlora data`, and `weftlora train --dry-run`: what a recipe will train on, before it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weftlora.cli import output
from weftlora.cli.options import Json, Quiet, TrustTerms

if TYPE_CHECKING:
    from weftlora.train.previewing import Preview, Rows

BAR = 40
"""Characters of the longest bar of a histogram."""
SHOWN = 1200
"""Characters of a row that are shown."""
LEARNT, GIVEN = "bold green", "dim"


def data(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, a built-in name (see `weftlora recipes`) or a run folder.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="data.train=rows.jsonl")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Show this many rows as the model gets them.")] = 3,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Do not load the model; estimate neither time nor memory.")
    ] = False,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look at what a recipe will train on: its rows, their lengths, what is learned, how long it will take.

    Nothing is written and nothing is trained.
    """
    look(recipe, overrides or [], not no_model, rows, as_json, quiet)


def look(recipe: str, overrides: list[str], model: bool, rows: int, as_json: bool, quiet: bool) -> None:
    """Show a preview."""
    with output.working(as_json, quiet) as progress:
        from weftlora.train import preview

        found = preview(recipe, *overrides, model=model, rows=rows, progress=progress)
    output.show(found.record(), as_json, lambda: shown(found))


def shown(found: Preview) -> RenderableType:
    """What was found, for a person."""
    parts: list[RenderableType] = [f"{found.format} for {found.task}, up to {found.max_length} tokens a row"]
    parts += [f"{name}: {count:,} rows" for name, count in found.files.items()]
    parts += [*found.columns, "", _splits(found.splits), *_histogram(found.splits["train"])]
    for number, row in enumerate(found.samples, start=1):
        parts += ["", f"row {number} (what is learned is marked)", _coloured(row)]
    return Group(*parts, "", *_cost(found))


def _splits(splits: dict[str, Rows]) -> Table:
    """A column per split, since there are more numbers than splits."""
    table = output.table("rows", *splits, look="headed")
    for what, key in _NUMBERS:
        table.add_row(what, *(f"{getattr(rows, key):,}" for rows in splits.values()))
    return table


_NUMBERS = (
    *(("read", "read"), ("empty", "empty"), ("dropped, too long", "dropped"), ("cut", "cut"), ("used", "rows")),
    *(("tokens", "tokens"), ("of answers", "answer_tokens")),
    *(("tokens a row, median", "median"), ("95 % have at most", "p95"), ("longest", "longest")),
)


def _histogram(rows: Rows) -> list[str]:
    most = max(count for _, _, count in rows.lengths)
    width = len(f"{rows.lengths[-1][1]:,}")
    lines = [
        f"{low:>{width},} to {high:>{width},}  {'█' * -(-BAR * count // most)} {count:,}"
        for low, high, count in rows.lengths
    ]
    return ["tokens a training row:", *lines]


def _coloured(row: list[list[object]]) -> Text:
    """A row with what is learned in colour, and between marks where there is no colour."""
    text, left = Text(), SHOWN
    plain = not output.Screen().is_terminal
    for piece, learned in row:
        words = str(piece)[:left]
        left -= len(words)
        text.append(f"⟦{words}⟧" if learned and plain else words, style=LEARNT if learned else GIVEN)
        if left <= 0:
            text.append(" …", style=GIVEN)
            break
    return text


def _cost(found: Preview) -> list[str]:
    lines = [
        f"training: {found.steps:,} steps of {found.rows_per_step} rows, {found.epochs:g} epochs of {found.tokens_per_epoch:,} tokens "
        f"({found.answer_tokens_per_epoch:,} of answers)"
    ]
    if found.defaults:
        lines.append(f"by default: {'; '.join(found.defaults)}")
    if found.estimate is not None:
        cost = found.estimate
        memory = "" if cost.memory_bytes is None else f", {cost.memory_bytes / 2**20:,.0f} MiB at most"
        lines.append(
            f"about {_duration(cost.seconds)} on {cost.device} ({cost.seconds_per_step:.2g} s a step{memory}; {cost.trainable:,} "
            "trainable parameters), measurements and checkpoints not counted"
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
