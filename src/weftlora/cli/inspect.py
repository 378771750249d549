"""`weftlora inspect`: what is inside an adapter, on the terminal, as JSON, or as a page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weftlora.cli import output
from weftlora.cli.options import Json, Quiet, TrustTerms
from weftlora.errors import RunError
from weftlora.runs.run import check_source

if TYPE_CHECKING:
    from weftlora.inspection.record import Inspection, Routers
    from weftlora.report.inspection.elements import Grid

WIDTH = 78
"""Characters that tables keep to."""
MOST = 12
"""Sites in the table of directions."""


def inspect(
    adapter: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder or an adapter folder.")],
    html: Annotated[
        Path | None, typer.Option(help="Write a page with charts to this file; it needs no network.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Run the routers over these rows; a run has validation rows of its own.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare A and B with this run or adapter folder, such as a checkpoint.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Give the place of the base model, if it is not where the folder says.")
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Read only the adapter's files.")] = False,
    rows: Annotated[int, typer.Option(min=1, help="Run the routers over this many rows per domain.")] = 64,
    spectra: Annotated[int, typer.Option(min=0, help="Decompose W of this many modules for change rates.")] = 4,
    cache: Annotated[str | None, typer.Option(help="Keep decompositions in this folder; or set WEFT_CACHE.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --html even if it is not a page of weftlora.")
    ] = False,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look inside an adapter: sizes, ranks, layers, routers, heads, directions, what merges."""
    if base is not None and no_base:
        raise RunError(f"--base {base} and --no-base: give one of the two.")
    check_source(Path(adapter))
    with output.working(as_json, quiet) as progress:
        from weftlora.inspection.inspecting import inspect as call
        from weftlora.report.inspection.page import check_extra, write_page
        from weftlora.report.web import check_place

        if html is not None:
            check_extra()
            check_place(html, overwrite)  # before the work, not after
        found = call(
            adapter,
            base=False if no_base else base,
            data=data,
            against=against,
            rows=rows,
            spectra=spectra,
            cache=cache,
            progress=progress,
        )
        if html is not None:
            write_page(found, html, overwrite)
    output.show(found.record(), as_json, lambda: shown(found, html))


def shown(found: Inspection, html: Path | None = None) -> RenderableType:
    """Everything there is, most important first, within 80 columns."""
    from weftlora.report.inspection.elements import movement, settings_line

    what = f"{found.source}" + (f" · {found.trained_by}" if found.trained_by else "")
    head = [
        Text(what, style="bold"),
        Text(settings_line(found)),
        Text(f"base: {found.base or 'not read'}", style="dim"),
    ]
    parts: list[RenderableType] = [*head, Text()]
    parts += [_bullet(sentence) for sentence in found.verdict]
    title, moved = movement(found)
    parts += _section(f"{title} by block", _grid(moved, _share if "/" in title else _plain))
    parts += [*_ranks(found), *_layers(found), *_routers(found), *_against(found), *_directions(found), *_groups(found)]
    parts += [Text(), Text("left out", style="bold")] if found.left_out else []
    parts += [_bullet(sentence, "dim") for sentence in found.left_out]
    parts += [Text(), Text(f"written: {html}")] if html is not None else []
    return Group(*parts)


def _bullet(sentence: str, style: str = "") -> RenderableType:
    row = Table.grid(padding=(0, 1))
    row.add_row(Text("•", style=style), Text(sentence, style=style))
    return row


def _section(title: str, table: RenderableType, note: str = "") -> list[RenderableType]:
    """A table under its title; both may be wider than the table."""
    return [Text(), Text(title, style="bold"), table, *([Text(note, style="dim")] if note else [])]


def _grid(grid: Grid, text: Callable[[float], str]) -> RenderableType:
    """Numbers by block and module, in as many tables as their names need; the largest third of the numbers stands out."""
    bold = sorted(grid.flat)[-max(1, len(grid.flat) // 3)] if grid.flat else 0.0
    tables: list[RenderableType] = []
    for part in grid.split(WIDTH):
        table = output.table("block", *part.modules, look="bare")
        for block, row in zip(part.blocks, part.values, strict=True):
            cells = [Text("") if v is None else Text(text(v), style="bold" if v >= bold and v > 0 else "") for v in row]
            table.add_row(block, *cells)
        tables += [Text(), table] if tables else [table]
    return Group(*tables)


def _share(value: float) -> str:
    return f"{value:.1%}" if value >= 0.0005 or value == 0 else f"{value:.0e}"


def _plain(value: float) -> str:
    return f"{value:.3g}"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _ranks(found: Inspection) -> list[RenderableType]:
    from weftlora.report.inspection.elements import grid

    ranks = grid(found, lambda site: site.rank)
    parts = _section("rank by block", _grid(ranks, lambda v: f"{v:.0f}")) if len(set(ranks.flat)) > 1 else []
    if found.history is None:
        return parts
    table = output.table("after step", "taken", "made", "mostly from", "mostly to", look="bare")
    for each in found.history.rounds:
        moves = _mostly([site for site, *_ in each.taken]), _mostly([site for site, _ in each.made])
        table.add_row(str(each.step), str(len(each.taken)), str(len(each.made)), *moves)
    return [*parts, *_section("ranks over time", table)]


def _mostly(sites: list[str]) -> str:
    """The kind of module that most of these are."""
    kinds = [site.rpartition(".")[2] for site in sites]
    most = max(sorted(set(kinds)), key=kinds.count, default="")
    return f"{most} ({kinds.count(most)})" if most else ""


def _layers(found: Inspection) -> list[RenderableType]:
    layers = found.layers
    if layers.margin is None:
        return []
    table = output.table(layers.granularity, "selected", "α", "α̂", "over threshold", look="bare")
    for c in layers.candidates:
        over = "" if c.distance is None else f"{c.distance:+.4f}{' ?' if c.near_tie else ''}"
        table.add_row(c.name, "+" if c.selected else "", _number(c.alpha, 4), _number(c.alpha_hat, 3), over)
    near = any(c.near_tie for c in layers.candidates)
    return _section(f"layers, {layers.source}", table, "?: one more step could have turned it" if near else "")


def _routers(found: Inspection) -> list[RenderableType]:
    from weftlora.report.inspection.elements import labels_of, sites_by_block

    if not found.heads:
        return []
    cosine = {head.site: head.mean for head in found.heads}
    used = {site.site: site.whole for site in found.routers.sites} if found.routers else {}
    table = output.table("block", *(["entropy", "balance", "top-1 share"] if used else []), "head cosine", look="bare")
    blocks = sites_by_block(cosine)
    labels = labels_of(blocks)
    for block, names in blocks.items():
        usage = [used[name] for name in names if name in used]
        numbers: list[list[float | None]] = [
            [u.entropy for u in usage],
            [u.balance for u in usage],
            [max(u.top1) for u in usage],
        ]
        own = [_number(_mean(values)) for values in [*(numbers if used else []), [cosine[name] for name in names]]]
        table.add_row(labels[block], *own)
    if found.routers is None:
        return _section("heads", table, "mean cosine between the B's of a module, over the block's modules")
    note = "means over the block's modules; entropy and balance: 1 is even; top-1: of the most used head"
    return [*_section(f"routers and heads, over {found.routers.source}", table, note), *_domains(found.routers)]


def _domains(routers: Routers) -> list[RenderableType]:
    if len(routers.domains) < 2:
        return []
    table = output.table("domain", "tokens", "entropy", "balance", "apart", look="bare")
    for domain in routers.domains:
        sites = [site for site in routers.sites if domain in site.domains]
        own = [site.domains[domain] for site in sites]
        numbers = [[u.entropy for u in own], [u.balance for u in own], [site.apart(domain) for site in sites]]
        tokens = f"{max((u.tokens for u in own), default=0):,}"
        table.add_row(domain, tokens, *(_number(_mean(values)) for values in numbers))
    note = "apart: how differently it uses the heads, from 0 (as all rows do) to 1 (entirely different ones)"
    if between := [each for each in routers.outputs if each.between_domains is not None]:
        share, chance = (_mean([getattr(each, name) for each in between]) for name in ("between_domains", "chance"))
        note += f"; of what a head's outputs differ by over rows, {share:.0%} lies between domains (by chance: {chance:.0%})"
    return _section("routers by domain", table, note)


def _against(found: Inspection) -> list[RenderableType]:
    if found.factor_comparison is None:
        return []
    sizes = [site.norm_ratio for site in found.factor_comparison.sites if site.norm_ratio is not None]
    if sizes:
        line = f"A has {min(sizes):.3f} to {max(sizes):.3f} times {found.factor_comparison.what}"
        return [Text(), Text(line, style="dim")]
    table = output.table("factor", "overlap", "by chance", "cosine", "moved", "largest angle", look="bare")
    for part in ("A", "B"):
        rows = [row for site in found.factor_comparison.sites if (row := site.A if part == "A" else site.B) is not None]
        angles = [max(row.angles) for row in rows if row.angles]
        means: list[list[float | None]] = [
            [r.overlap for r in rows],
            [r.chance for r in rows],
            [r.cosine for r in rows],
            [r.relative_change for r in rows],
        ]
        if rows:
            largest = f"{max(angles):.0f}°" if angles else ""
            table.add_row(part, *(_number(_mean(values), 3) for values in means), largest)
    return _section(
        f"beside {found.factor_comparison.what}",
        table,
        "means over the modules; overlap: mean cos² of the principal angles",
    )


def _directions(found: Inspection) -> list[RenderableType]:
    rows = [site for site in found.directions if site.chosen or site.rate]
    if not rows:
        return []
    table = output.table("site", "chosen", "largest δ now", "largest gain", look="bare")
    for site in rows[:MOST]:
        gains = [abs(c.gain) for c in site.chosen if c.gain is not None]
        rate = "" if not site.rate else f"{max(site.rate):.2g} at {site.rate.index(max(site.rate))}"
        name = ".".join(site.site.split(".")[-3:])
        chosen = " ".join(str(c.index) for c in site.chosen if c.index is not None) or "not told" * bool(site.chosen)
        table.add_row(name, chosen, rate, f"{max(gains):.2g}" if gains else "")
    more = f"; {len(rows) - MOST} more modules in --json and --html" if len(rows) > MOST else ""
    return _section("directions of W", table, f"0 is the direction of the largest σ{more}")


def _groups(found: Inspection) -> list[RenderableType]:
    if not found.groups:
        return []
    table = output.table("shared", "sites", "first", "numbers", "instead of", look="bare")
    for group in found.groups:
        first = group.sites[0]
        table.add_row(group.parts, str(len(group.sites)), first, f"{group.stored:,}", f"{group.untied:,}")
    return _section("tied groups", table)
