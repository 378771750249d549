"""`weftlora heads`: how many heads the rows of a file suggest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weftlora.cli import output
from weftlora.extras import needs

if TYPE_CHECKING:
    from weftlora.report.heads import HeadSuggestion

BAR = 30
"""Characters of the longest bar."""


def heads(
    data: Annotated[str, typer.Argument(help="A data file, a recipe file (its data section), or demo.")],
    largest: Annotated[int, typer.Option(min=3, help="The largest number tried.")] = 10,
    rows: Annotated[int, typer.Option(min=10, help="Draw so many rows of a larger file.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw and of k-means.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")] = False,
) -> None:
    """Suggest a number of heads for HydraLoRA from the clusters of the training rows."""
    with output.calling(as_json, quiet=True), needs("train", "weftlora heads"):
        from weftlora.data import DataConfig, texts
        from weftlora.train.recipe import Recipe

        recipe = Recipe.read(data) if Path(data).suffix in (".yaml", ".yml") else None
        config = DataConfig(train=data) if recipe is None else recipe.data
        base_dir = None if recipe is None else recipe.base_dir
        config.check_files(base_dir)
        held = texts(config, base_dir=base_dir)
        from weftlora.report.heads import suggest_heads

        found = suggest_heads(held, largest=largest, rows=rows, seed=seed)
    output.show(found.record(), as_json, lambda: shown(found))


def shown(found: HeadSuggestion) -> RenderableType:
    """The suggestion and the curve it was read from."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("k", "SSE", "", "bend"):
        table.add_column(column, justify="left" if not column else "right")
    span = found.sse[0] - found.sse[-1]
    for k, (sse, bend) in enumerate(zip(found.sse, found.bend, strict=True), 1):
        bar = "█" * round(BAR * (sse - found.sse[-1]) / span) if span > 0 else ""
        mark = " ← elbow" if k == found.heads and found.clear else ""
        table.add_row(str(k), f"{sse:.4g}", Text(bar + mark, style="bold" if mark else ""), f"{bend:.3f}")
    sizes = f"clusters at {found.heads}: {', '.join(f'{size:,}' for size in found.sizes)} texts"
    return Group(Text(str(found), style="bold"), Text(), table, Text(sizes, style="dim"))
