"""`weftlora search`: which blocks a search selects, how clearly, how stably, and what to compare it with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from weftlora.cli import output
from weftlora.cli.options import Json, Quiet
from weftlora.extras import needs

if TYPE_CHECKING:
    from weftlora.search import Stability
    from weftlora.train.layer_search import Searched


def search(
    recipe: Annotated[str, typer.Argument(help="A recipe file or a built-in name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="adapter.steps=100")] = None,
    out: Annotated[str, typer.Option(help="Write the selection to this file.")] = "selection.json",
    seeds: Annotated[
        int,
        typer.Option(min=1, help="Search this many times, to see how far the selections agree; the first is written."),
    ] = 1,
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Also search on this many rows, to see how stable the selection is; may be repeated."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out even if it is not a selection.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Select the blocks to adapt, by a search on held-out training rows."""
    with output.working(as_json, quiet) as progress:
        with needs("train", "weftlora search"):
            from weftlora.runs.recipe import asked

            asked(recipe, overrides or [])
            from weftlora.train.layer_search import search_recipe

        found = search_recipe(
            recipe, *(overrides or []), seeds=seeds, rows=rows or (), out=out, overwrite=overwrite, progress=progress
        )
    output.show(found.record(), as_json, lambda: _shown(found))


def _shown(found: Searched) -> RenderableType:
    selection = found.selections[0]
    text = [f"layers: {list(selection.blocks)}  margin {selection.margin:.3g}"]
    if selection.near_ties:
        text.append(f"one more step could have turned: {', '.join(selection.near_ties)}")
    if selection.filled:
        text.append(f"not over the threshold, and added for min_layers: {', '.join(selection.filled)}")
    text += [
        _agreement(f"{len(found.seeds)} seeds", found.stability, "--seeds 5"),
        _agreement(f"{1 + len(found.by_rows)} sizes of the search set", found.stability_by_rows, "--rows N --rows M"),
    ]
    for rows, other in found.by_rows.items():
        text.append(f"  on {rows} rows: {list(other.blocks)}")
    cost = selection.record["cost_in_steps"]
    text += [
        f"cost: worth {cost:g} training steps, {cost / found.steps:.0%} of the recipe's {found.steps}; {selection.seconds:.1f} s",
        output.controls(selection),
        f"written: {found.path}  (adapter.layers={found.path} in any recipe)",
    ]
    return Group(table(found), *text)


def _agreement(what: str, stability: Stability | None, option: str) -> str:
    if stability is None:
        return f"how far another {'seed' if 'seeds' in what else 'search set'} agrees was not measured: {option}"
    return f"{what} agree with a Jaccard index of {stability.jaccard:.2f}; by chance {stability.chance:.2f}"


def table(found: Searched) -> Table:
    """A row per group of the first selection: α, α̂ and whether it is selected."""
    selection = found.selections[0]
    record = selection.record
    unlabelled = record["unlabelled_steps"] + record["unlabelled_inner_steps"]
    skipped = f"{record['skipped_steps'] + record['skipped_inner_steps']} skipped"
    skipped += f", {unlabelled} of them without a label" if unlabelled else ""
    frequency = None if found.stability is None else found.stability.frequency
    shown = output.table(
        *("", selection.granularity, "α", "α̂", "over threshold", "‖∇‖"),
        *([] if frequency is None else ["of all seeds"]),
        words=("", selection.granularity),
        title=f"{len(selection.chosen)} of {len(selection.candidates)} {selection.granularity}s",
        caption=f"{record['steps']} steps, {skipped} · validation loss {record['validation_loss']:.4g} · "
        f"sum of α {record['sum_alpha']:.2g} · largest α̂ {record['max_alpha_hat']:.3g}",
    )
    for i, c in enumerate(selection.candidates):
        mark = "+" if c.selected else ""
        numbers = [
            f"{c.alpha:.4f}",
            f"{c.alpha_hat:.3f}",
            f"{c.distance:+.4f}{' ?' if c.near else ''}",
            f"{c.gradient_norm:.3g}",
        ]
        shown.add_row(mark, c.name, *numbers, *([] if frequency is None else [f"{frequency[i]:.0%}"]))
    return shown
