"""`weftlora directions` and `weftlora heads`: what adapters do along core directions; how many heads a file's rows suggest."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weftlora.cli import output
from weftlora.cli.options import Json, Out, Overwrite, Quiet, TrustTerms
from weftlora.data.paths import locate
from weftlora.extras import needs
from weftlora.runs.run import check_source

if TYPE_CHECKING:
    from weftlora.data.suggest_heads import HeadSuggestion
    from weftlora.inspection.core_directions import AdapterDirections, DirectionsReport, Hits, Overlap, SiteDirections


CHOSEN = {"launched": "launched", "switched": "those that A and B started along"}
"""What the directions in the table are, by phase."""


def directions(
    model: Annotated[str, typer.Argument(help="The base model's folder; alone, a run or adapter folder.")],
    adapter: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Run or adapter folders; several are compared.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare with a later adapter, or a model fine-tuned in full: what should have been predicted."
        ),
    ] = None,
    count: Annotated[int, typer.Option("--directions", min=1, help="Predict this many directions.")] = 8,
    full: Annotated[bool, typer.Option("--full", help="Keep σ and change rate of every direction.")] = False,
    seed: Annotated[int, typer.Option(help="Set the seed of the random directions used as a control.")] = 0,
    cache: Annotated[str | None, typer.Option(help="Keep decompositions in this folder; or set WEFT_CACHE.")] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Which directions of the frozen weights adapters move, and how well they predict where training goes."""
    for folder in adapter or [model]:
        check_source(Path(folder))
    if adapter:
        locate(model, Path.cwd())
    with output.working(as_json, quiet) as progress:
        from weftlora.inspection.directions import directions as call

        place = output.check_out(out, "a record of directions", ("adapters", "overlaps"), overwrite)
        report = call(
            model,
            list(adapter or []) or None,
            against=against,
            directions=count,
            full=full,
            seed=seed,
            cache=cache,
            progress=progress,
        )
        output.keep(report.record(), place)
    output.show(report.record(), as_json, lambda: Group(*tables(report)))


def tables(report: DirectionsReport) -> list[Table]:
    """Per adapter its sites, its means and, where it was kept, the spectra; then what adapters share."""
    found = []
    for adapter in report.adapters:
        found.append(site_table(adapter, report.directions))
        if hits := adapter.mean_hits():
            found.append(hits_table(adapter, hits, report))
        found += [spectrum_table(site) for site in adapter.sites if site.spectrum is not None]
    return found + [overlap_table(overlap) for overlap in report.overlaps]


def site_table(adapter: AdapterDirections, count: int) -> Table:
    """A row per site, and the means."""
    judged = any(site.hits is not None for site in adapter.sites)
    launched = adapter.phase == "launched"
    common = _common([site.site for site in adapter.sites])
    table = output.table(
        *("site", "of", "directions", "δ", *_columns(adapter, judged)),
        words=("site", "directions"),
        title=f"{adapter.adapter} · {adapter.phase} · {count} directions",
        caption=f"modules in {common or 'the model'} · directions: {CHOSEN.get(adapter.phase, 'of largest δ')}, best first, "
        "0 is the largest σ · δ: largest change rate · "
        + ("Dash: Σ|d| with its slots / without, on these directions · " if launched else "")
        + "LoRA: ‖ΔW‖ / ‖U_ΔᵀWV_Δ‖",
    )
    for site in adapter.sites:
        chosen, largest = " ".join(map(str, site.predicted)), f"{site.rate[0]:.2g}" if site.rate else ""
        name = site.site.removeprefix(f"{common}.") if common else site.site
        table.add_row(name, str(site.able), chosen, largest, *_numbers(adapter, site, judged))
    hits = adapter.mean_hits()
    means = [f"{hits['predicted'].recall:.2f}", f"{hits['predicted'].accuracy:.2f}"] if hits else []
    means += [_number(adapter.mean_total_over_lora())] if adapter.phase == "launched" else []
    table.add_section()
    table.add_row("mean", "", "", "", *means, _number(adapter.mean_factor()))
    return table


def hits_table(adapter: AdapterDirections, hits: dict[str, Hits], report: DirectionsReport) -> Table:
    """The prediction beside its controls, means over the sites."""
    s = report.directions
    columns = ("chosen by", f"recall: true {(s + 1) // 2} in {s}", f"accuracy: {s} in true {2 * s}")
    table = output.table(*columns, words=columns, title=f"{adapter.adapter} against {report.against}")
    names = {
        "predicted": "the adapter",
        "top": "largest σ",
        "bottom": "smallest σ",
        "random": f"at random (seed {report.seed})",
        "chance": "at random, on average",
    }
    for kind, name in names.items():
        table.add_row(name, f"{hits[kind].recall:.3f}", f"{hits[kind].accuracy:.3f}")
    return table


def spectrum_table(site: SiteDirections) -> Table:
    """Every core direction of one site."""
    spectrum = site.spectrum
    columns = ("index", "σ", "δ", *(["true δ"] if spectrum is not None and spectrum.true_rate is not None else []))
    table = output.table(*columns, words=columns, title=site.site)
    if spectrum is None:
        return table
    for k, (sigma, rate) in enumerate(zip(spectrum.sigma, spectrum.rate, strict=True)):
        true = [] if spectrum.true_rate is None else [f"{spectrum.true_rate[k]:.4g}"]
        table.add_row(str(k), f"{sigma:.4g}", f"{rate:.4g}", *true)
    return table


def overlap_table(overlap: Overlap) -> Table:
    """Rank against rank: at how many sites two adapters predict the same direction."""
    table = output.table(
        *("rank", *map(str, range(1, len(overlap.grid) + 1))),
        title=f"{overlap.adapters[0]} (rows) and {overlap.adapters[1]}: modules with the same direction",
        caption=f"{overlap.shared:.2f} of {len(overlap.grid)} shared per module over {overlap.sites} modules; "
        f"by chance {overlap.chance:.2f}",
    )
    for rank, row in enumerate(overlap.grid, 1):
        table.add_row(str(rank), *(str(count or "·") for count in row))
    return table


def _common(names: list[str]) -> str:
    """The dotted name that all of these begin with."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts))


def _columns(adapter: AdapterDirections, judged: bool) -> list[str]:
    return [*(["recall", "accuracy"] if judged else []), *(["Dash"] if adapter.phase == "launched" else []), "LoRA"]


def _numbers(adapter: AdapterDirections, site: SiteDirections, judged: bool) -> list[str]:
    own = site.hits["predicted"] if site.hits is not None else None
    values = (None, None) if own is None else (own.recall, own.accuracy)
    hits = [_number(value) for value in values] if judged else []
    dash = [_number(site.amplification.total_over_lora)] if adapter.phase == "launched" else []
    return [*hits, *dash, _number(site.amplification.factor)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


BAR = 30
"""Characters of the longest bar."""


def heads(
    data: Annotated[str, typer.Argument(help="A data file, a recipe file (its data section), or demo.")],
    largest: Annotated[int, typer.Option(min=3, help="Try up to this many heads.")] = 10,
    rows: Annotated[int, typer.Option(min=10, help="Draw this many rows of a larger file.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Set the seed of the draw and of k-means.")] = 0,
    as_json: Json = False,
) -> None:
    """Suggest a number of heads for HydraLoRA from the clusters of the training rows."""
    with output.calling(as_json, quiet=True), needs("train", "weftlora heads"):
        from weftlora.data import DataConfig, texts
        from weftlora.runs.recipe import Recipe

        recipe = Recipe.read(data) if Path(data).suffix in (".yaml", ".yml") else None
        config = DataConfig(train=data) if recipe is None else recipe.data
        base_dir = None if recipe is None else recipe.base_dir
        config.check_files(base_dir)
        held = texts(config, base_dir=base_dir)
        from weftlora.data.suggest_heads import suggest_heads

        found = suggest_heads(held, largest=largest, rows=rows, seed=seed)
    output.show(found.record(), as_json, lambda: shown(found))


def shown(found: HeadSuggestion) -> RenderableType:
    """The suggestion and the curve it was read from."""
    table = output.table("k", "SSE", "", "bend", words=("",), look="bare")
    span = found.sse[0] - found.sse[-1]
    for k, (sse, bend) in enumerate(zip(found.sse, found.bend, strict=True), 1):
        bar = "█" * round(BAR * (sse - found.sse[-1]) / span) if span > 0 else ""
        mark = " ← elbow" if k == found.heads and found.clear else ""
        table.add_row(str(k), f"{sse:.4g}", Text(bar + mark, style="bold" if mark else ""), f"{bend:.3f}")
    sizes = f"clusters at {found.heads}: {', '.join(f'{size:,}' for size in found.sizes)} texts"
    return Group(Text(str(found), style="bold"), Text(), table, Text(sizes, style="dim"))
