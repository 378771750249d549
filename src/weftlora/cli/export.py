"""`weftlora export`: out of weftlora, as a stock LoRA folder or as merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group, RenderableType

from weftlora.cli import output
from weftlora.cli.options import Json, TrustTerms
from weftlora.errors import ConfigError
from weftlora.runs.run import check_source

if TYPE_CHECKING:
    from weftlora.export import LoraExport, Merge

SHOWN = 12
"""How many sites the table of a merge shows: those that lose most."""


def export(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder or an adapter folder.")],
    to: Annotated[
        Literal["lora", "merged"],
        typer.Option(help="Write a stock LoRA, or the base with the update merged into its weights."),
    ] = "lora",
    out: Annotated[
        Path | None, typer.Option(help="Write to this new folder; by default lora or merged in the run folder.")
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Use one rank for all modules, without patterns.")] = False,
    server_ranks: Annotated[
        bool, typer.Option("--server-ranks", help="Use one rank, the next of 8, 16, 32, 64, 128, 256, 320, 512.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Store float32, bfloat16 or float16; dequantises a quantised base.")
    ] = None,
    approximate: Annotated[
        str | None, typer.Option(help="Approximate HydraLoRA with fixed gates (mean-gate); needs --data.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Measure the mean gates on these rows.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Use this many of them.")] = 256,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Merge even if rounding loses more than a tenth.")
    ] = False,
    original: Annotated[
        str | None, typer.Option(help="Merge into this checkpoint instead of a quantised base.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Give the place of the base model, if it is not where the run found it.")
    ] = None,
    base_name: Annotated[
        str | None, typer.Option(help="Name the base like this in the folder, such as by a hub id.")
    ] = None,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="Skip the comparison with the live adapter; for models that do not fit into memory twice.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing on stderr.")] = False,
) -> None:
    """Write an adapter that loads without `import weftlora`, and prove it.

    As a stock LoRA folder, or as the base with the update in its weights.
    """
    lora_only = {
        "--uniform": uniform,
        "--server-ranks": server_ranks,
        "--approximate": approximate,
        "--data": data,
        "--base-name": base_name,
    }
    foreign = lora_only if to == "merged" else {"--accept-loss": accept_loss, "--original": original}
    if given := [name for name, value in foreign.items() if value]:
        raise ConfigError(
            f"{given[0]} means nothing with --to {to}: leave it out, or use --to {'lora' if to == 'merged' else 'merged'}."
        )
    check_source(Path(source))
    place = out or _place(Path(source), to)
    with output.calling(as_json, quiet):
        from weftlora.export import export_lora, merge

        found: LoraExport | Merge
        common = {"verify": not no_verify, "base": base, "overwrite": overwrite}
        if to == "merged":
            found = merge(source, place, dtype, accept_loss=accept_loss, original=original, **common)  # type: ignore[arg-type]
        else:
            found = export_lora(
                source,
                place,
                uniform=uniform,
                server_ranks=server_ranks,
                dtype=dtype,
                approximate=approximate,
                data=data,
                rows=rows,
                base_name=base_name,
                **common,  # type: ignore[arg-type]
            )
    output.show(found.record(), as_json, lambda: shown(found))


def push(
    source: Annotated[str, typer.Argument(metavar="FOLDER", help="A run folder, an adapter folder or an export.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    base_name: Annotated[
        str | None, typer.Option(help="Give the hub id of the base, where the adapter names a folder of this machine.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    message: Annotated[str, typer.Option(help="Give the commit this message.")] = "Upload with weftlora",
    as_json: Json = False,
) -> None:
    """Put an adapter or an export onto the hub, with your own login (HF_TOKEN)."""
    if not Path(source).is_dir():
        check_source(Path(source))
    with output.calling(as_json, quiet=True):
        from weftlora.export import push as call

        found = call(source, repo, base_name=base_name, private=not public, message=message)
    output.show(found.record(), as_json, lambda: f"{found.url}: {', '.join(found.files)}")


def _place(source: Path, to: str) -> Path:
    """RUN/lora for a run, ADAPTER-lora beside a bare adapter folder."""
    if (source / "run.json").is_file():
        return source / to
    named = source if source.name not in ("", "..") else source.resolve()
    return named.with_name(f"{named.name}-{to}")


def shown(found: LoraExport | Merge) -> RenderableType:
    """What was written and how well."""
    from weftlora.export import LoraExport

    return lora_text(found) if isinstance(found, LoraExport) else merge_text(found)


def lora_text(found: LoraExport) -> str:
    """A line on what was written, one on the proof, and what an approximation or a narrower dtype costs."""
    ranks = sorted(set(found.ranks.values()))
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    gone = f", {len(found.left_out)} modules without a live slot left out" if found.left_out else ""
    lines = [
        f"{found.folder}: stock LoRA, {found.layout}, rank {span} at {len(found.ranks)} modules{gone}, {found.dtype}"
    ]
    if found.proof is None:
        lines.append("not verified")
    else:
        proof = found.proof
        lines.append(
            f"largest logit difference from the live adapter: {proof.error:.2g} of the largest logit (allowed "
            f"{proof.tolerance:g}), by stock peft without weftlora, on {proof.inputs}"
        )
    if (rounding := found.rounding) is not None:
        after = "" if rounding.error is None else f"; largest logit difference {rounding.error:.2g}"
        lines.append(f"rounding to {rounding.dtype} loses {rounding.lost:.3%} of the update{after}")
    if (fixed := found.approximation) is not None:
        lines.append(
            f"mean gates over {fixed.gates}: largest logit difference from the live adapter {fixed.error:.2g} of the largest "
            f"logit; {fixed.lost:.1%} of the adapter's change of the logits is lost"
        )
        losses = {"live": fixed.loss_live, "mean gate": fixed.loss_fixed, "no adapter": fixed.loss_base}
        if known := [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]:
            lines.append(f"loss: {', '.join(known)}")
    return "\n".join(lines)


def merge_text(found: Merge) -> RenderableType:
    """The sites that lose most to rounding, and what is lost in all."""
    chosen = sorted(found.sites, key=lambda site: -site.lost)[:SHOWN]
    table = output.table(
        *("module", "‖ΔW‖", "lost", "lost if 4-bit"),
        title=f"{found.folder}: merged, {found.dtype}",
        caption="lost: ‖ΔW that rounding leaves − ΔW‖ / ‖ΔW‖; above 100 % the noise of rounding is larger than the update · "
        "4-bit: if these weights are quantised to NF4",
    )
    for site in chosen:
        table.add_row(site.site, f"{site.norm:.3g}", f"{site.lost:.2%}", f"{site.lost_nf4:.1%}")
    table.add_section()
    table.add_row(f"all {len(found.sites)} modules", "", f"{found.lost:.2%}", f"{found.lost_nf4:.1%}")
    last = "not verified"
    if found.proof is not None and found.lost_logits is not None:
        last = (
            f"largest logit difference from the live adapter: {found.proof.error:.2g} of the largest logit, "
            f"{found.lost_logits:.2%} of the adapter's change of the logits, by stock transformers without weftlora, on "
            f"{found.proof.inputs}"
        )
    if found.lost_logits_nf4 is not None:
        last += f"\nif 4-bit: {found.lost_logits_nf4:.1%} of the adapter's change of the logits would be lost"
    return Group(table, last + ("\na loss above the limit was accepted" if found.accepted else ""))
