"""The commands. What they do is in `weftlora.train`; here it is called and shown."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from weftlora import __version__
from weftlora.cli import bench, output
from weftlora.cli.compare import compare
from weftlora.cli.directions import directions
from weftlora.cli.display import watching
from weftlora.cli.export import export
from weftlora.cli.heads import heads
from weftlora.cli.inspect import inspect
from weftlora.cli.report import report
from weftlora.cli.search import search
from weftlora.train.run import check_source

app = typer.Typer(
    name="weftlora",
    help="Fine-tune with adaptive low-rank adapters: train, evaluate, generate.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"weftlora {__version__}\n")
        raise typer.Exit


@app.callback()
def weftlora(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune with adaptive low-rank adapters: train, evaluate, generate."""


app.add_typer(bench.app, name="bench")
app.command()(directions)
app.command()(search)
app.command()(compare)
app.command()(export)
app.command()(inspect)
app.command()(report)
app.command()(heads)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Base = Annotated[str | None, typer.Option(help="Where the base model lies now, if not where the run found it.")]


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, a built-in name (see `weftlora recipes`) or a run folder.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="train.lr=1e-3")] = None,
    out: Annotated[str | None, typer.Option(help="The run folder; short for out=....")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter and write a run folder."""
    given = [*(overrides or []), *([f"out={out}"] if out else [])]
    with output.calling(as_json, quiet), watching(not (quiet or as_json)) as progress:
        from weftlora.train import train as call

        run = call(recipe, *given, resume=resume, overwrite=overwrite, progress=progress)
    output.show(run.record(), as_json, lambda: output.run_summary(run))


@app.command("eval")
def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder; with --adapter none also a recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="data.test=more.jsonl")
    ] = None,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Measure only the first rows; nothing is written.")] = None,
    adapter: Annotated[str, typer.Option(help="trained, or none for the frozen base.")] = "trained",
    base: Base = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows at a time.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Bound of the compared answers.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run, or its frozen base, on held-out rows."""
    with output.calling(as_json, quiet), watching(not (quiet or as_json)) as progress:
        from weftlora.train import evaluate as call

        evaluation = call(
            run,
            *(overrides or []),
            split=split,
            limit=limit,
            adapter=adapter,
            base=base,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    output.show(evaluation.record(), as_json, lambda: output.evaluation_table(evaluation))


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="A run folder or an adapter folder.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperature above 0.")] = 0,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt with a trained adapter."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with output.calling(as_json, quiet=True):
        from weftlora.train import generate as call

        answer = call(run, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, base=base)
    output.show(dataclasses.asdict(answer), as_json, lambda: answer.text)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe as a file to edit.")] = None,
    as_json: Json = False,
) -> None:
    """List the built-in recipes, or print one."""
    from weftlora.cli.catalogue import catalogue, recipe_file

    with output.calling(as_json, quiet=True):
        record: Any = catalogue() if name is None else recipe_file(name)
    output.show(record, as_json, lambda: output.catalogue_table(record) if name is None else output.yaml_text(record))


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Argument(help="A run or adapter: also say which of its linears the fast path computes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what weftlora finds on this machine, and what is missing."""
    if run is not None:
        check_source(run)
    with output.calling(as_json, quiet=True):
        from weftlora.cli.diagnosis import diagnose

        found = diagnose(Path.cwd(), run)
    output.show(found.record(), as_json, lambda: output.diagnosis_text(found))
    if found.problems:
        raise typer.Exit(1)
