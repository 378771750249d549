"""`weftlora bench`: speed and memory of a training step and of a launch, beside the exactness of what was measured."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Group
from rich.table import Table

from weftlora.cli import output
from weftlora.cli.options import Json, Out, Overwrite, Quiet
from weftlora.errors import RunError

if TYPE_CHECKING:
    from weftlora.bench import CaseResult, LaunchBench, Spread, StepBench
    from weftlora.bench.peft_board import PeftBoard
    from weftlora.progress import Progress

    Bench = TypeVar("Bench", StepBench, LaunchBench, PeftBoard)

VERDICTS = {"aim": "aim reached", "must": "reached", "missed": "missed", "": ""}

Threads = Annotated[int, typer.Option(help="Give torch this many threads.")]
Clock = Annotated[str, typer.Option(help="Measure CPU time of the process, or wall time (only on an idle machine).")]
Seed = Annotated[int, typer.Option(help="Set the seed of the inputs and of the order.")]
Tiny = Annotated[bool, typer.Option("--quick", help="Run tiny sizes, to see that everything works.")]

app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed and memory."""


@app.command()
def step(
    hidden: Annotated[int, typer.Option(help="Set the width of the Llama-type model, a multiple of 64.")] = 768,
    layers: Annotated[int | None, typer.Option(help="Set its number of blocks; 4, or 8 with --all.")] = None,
    vocab: Annotated[int, typer.Option(help="Set the size of its vocabulary.")] = 2048,
    batch: Annotated[int, typer.Option(help="Take this many sequences per step.")] = 4,
    seq: Annotated[int, typer.Option(help="Take this many tokens per sequence.")] = 256,
    experts: Annotated[int, typer.Option(help="Put this many experts in the place of every MLP; 0 for none.")] = 0,
    rounds: Annotated[
        int, typer.Option(help="Set the number of interleaved rounds; 7 or more for figures to publish.")
    ] = 9,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Measure on a base in fp32 or bf16; may be repeated. Default: both.")
    ] = None,
    dropout: Annotated[
        list[float] | None, typer.Option(help="Set lora_dropout; may be repeated. Default: 0 and 0.05.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure peft:lora, lora, hydralora, tied_lora, lora_dash, alora, flexora; may be repeated. Default: all."
        ),
    ] = None,
    table: Annotated[
        bool,
        typer.Option("--all", help="Measure the project's whole table, compiled blocks too (a quarter of an hour)."),
    ] = False,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[@RANK]=MODULE:FUNCTION",
            help="Measure layers of your own: function(base, r, dropout) returns the model to train; may be repeated.",
        ),
    ] = None,
    threads: Threads = 1,
    clock: Clock = "cpu",
    seed: Seed = 0,
    quick: Tiny = False,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A training step of every structure against the frozen base's step and stock peft LoRA.

    Each round steps every case once in a fresh random order; a figure is the median over rounds of the ratio to the frozen
    base's step of the same round. Exit code 1 if a gradient of weftlora disagrees with the reference kernel.
    """
    if case:
        sys.path.insert(0, os.getcwd())  # MODULE may be a file beside the user
    lists: dict[str, Any] = {"dtypes": dtype, "dropouts": dropout, "kinds": only, "own_cases": case}

    def measure(progress: Progress) -> StepBench:
        from weftlora.bench import Shape
        from weftlora.bench import step as call

        return call(
            Shape(hidden, layers or (8 if table else 4), vocab, batch, seq, experts),
            table=table,
            rounds=rounds,
            threads=threads,
            clock=clock,  # type: ignore[arg-type]  # the library refuses what is no clock
            seed=seed,
            quick=quick,
            progress=progress,
            **{name: values for name, values in lists.items() if values},
        )

    result = _measured(measure, tables, ("cases", "setting"), out, overwrite, as_json, quiet)
    if wrong := [f"{r.case} on a {r.dtype} base" for r in result.cases if r.exact is False]:
        raise RunError(
            f"the gradients of {', '.join(wrong)} are not those of the reference kernel, so these speeds do not count: "
            "fix the kernel first."
        )


@app.command()
def launch(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTxIN@ROUNDS", help="Launch on a weight of this shape; may be repeated. Default: 768 to 4096."
        ),
    ] = None,
    layers: Annotated[int, typer.Option(help="Launch on a Llama-type model of this many blocks; 0 leaves it out.")] = 4,
    hidden: Annotated[int, typer.Option(help="Set its width, a multiple of 64.")] = 768,
    rounds: Annotated[int, typer.Option(help="Set the number of rounds on the model.")] = 3,
    r: Annotated[int, typer.Option("--r", help="Set the rank of ΔW.")] = 8,
    directions: Annotated[int, typer.Option(help="Launch this many directions per module.")] = 8,
    threads: Threads = 1,
    clock: Clock = "cpu",
    seed: Seed = 0,
    quick: Tiny = False,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The launch of LoRA-Dash against the published way: a full SVD and dense products inside a forward pass.

    Per weight and for all modules of a model, both ways on the same weights in random order; a ratio is the median over rounds.
    """

    def measure(progress: Progress) -> LaunchBench:
        from weftlora.bench import launch as call

        return call(
            **({"shapes": shape} if shape else {}),
            layers=layers,
            hidden=hidden,
            rounds=rounds,
            r=r,
            directions=directions,
            threads=threads,
            clock=clock,  # type: ignore[arg-type]  # the library refuses what is no clock
            seed=seed,
            quick=quick,
            progress=progress,
        )

    _measured(measure, lambda found: [launch_table(found)], ("directions", "results"), out, overwrite, as_json, quiet)


@app.command()
def peft(
    folder: Annotated[Path, typer.Argument(help="Write experiments and results here.")],
    run: Annotated[
        str | None,
        typer.Option(
            metavar="full|reduced",
            help="Run them too: full is the protocol of peft's method comparison (a GPU, hours); reduced trains SmolLM2 on "
            "solutions of GSM8K (a CPU, minutes per method).",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="METHOD", help="Take this method; may be repeated. Default: all.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Train on this base instead: a folder, a GGUF file or a hub id.")
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Take this share of steps, evaluated rows and an answer's tokens.")
    ] = 1.0,
    train: Annotated[
        str | None, typer.Option(help="Train on the rows of this JSONL file, or of this hub data set.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="Score ranks and search layers on these.")] = None,
    test: Annotated[str | None, typer.Option(help="Measure answers on these.")] = None,
    texts: Annotated[str | None, typer.Option(help="Measure forgetting on these, rows with a text.")] = None,
    threads: Threads = 1,
    seed: Seed = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Our methods as experiments of peft's method comparison (MetaMathQA to GSM8K), and that comparison run on them.

    A result that is there is kept: what was stopped goes on. A run of anything less than the full protocol is marked `reduced`, and
    is no row of the board.
    """

    def measure(progress: Progress) -> PeftBoard:
        from weftlora.bench.peft_board import peft as call

        return call(
            folder,
            run=run,  # type: ignore[arg-type]  # the library refuses what is no form
            only=only or (),
            model=model,
            scale=scale,
            train=train,
            validation=validation,
            test=test,
            texts=texts,
            seed=seed,
            threads=threads,
            progress=progress,
        )

    found = _measured(measure, lambda it: [board_table(it)], ("experiments", "form"), out, overwrite, as_json, quiet)
    if failed := [each for each in found.experiments if each.failed]:
        raise RunError(f"{failed[0].name} did not end: {failed[0].failed}. Delete its result to try it again.")


def _measured(
    measure: Callable[[Progress], Bench],
    shown: Callable[[Bench], list[Table]],
    keys: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> Bench:
    """Measure, write the record to `out` and show it; `keys` are what such a record has."""
    place = output.check_out(out, "a record of this command", keys, overwrite)
    with output.working(as_json, quiet) as progress:
        result = measure(progress)
        output.keep(result.record(), place)
    output.show(result.record(), as_json, lambda: Group(*shown(result)))
    return result


def launch_table(result: LaunchBench) -> Table:
    """A row per weight, and one for the model."""
    table = output.table(
        *("W, out x in", "n", "modules", "weftlora s", "published s", "ratio", "agree"),
        title=f"The launch of LoRA-Dash · r = {result.r}, {result.directions} directions, {result.threads} thread(s), "
        f"{result.clock} time",
        caption="seconds: medians · ratio: median [quartiles] · agree: share of the directions that both choose",
    )
    for row in result.results:
        seconds = (f"{statistics.median(values):.3g}" for values in (row.seconds, row.published))
        table.add_row(row.what, str(row.rounds), str(row.sites), *seconds, _spread(row.ratio), f"{row.agreed:.1%}")
    return table


def board_table(result: PeftBoard) -> Table:
    """A row per experiment."""
    table = output.table(
        *(
            "experiment",
            "trainable",
            "train loss",
            "accuracy",
            "solution loss",
            "before",
            "forgetting",
            "file MiB",
            "s",
        ),
        title=f"peft's method comparison · {result.form or 'written, not run'} · {result.folder}",
        caption=f"reduced, no row of the board: {', '.join(result.less)} differ" if result.less else None,
    )

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in result.experiments:
        figures = (row.train_loss, row.accuracy, row.loss, row.loss_before, row.forgetting)
        size = None if row.file_bytes is None else row.file_bytes / 2**20
        table.add_row(
            row.name, shown(row.trainable, ","), *(shown(value, ".3f") for value in figures), shown(size, ".1f"),
            shown(row.seconds, ".0f"),
        )  # fmt: skip
    return table


def tables(result: StepBench) -> list[Table]:
    """The cases, and the targets if some could be judged."""
    return [step_table(result), *([targets_table(result)] if result.targets else [])]


def step_table(result: StepBench) -> Table:
    """A row per case."""
    setting, shape = result.setting, result.setting.shape
    table = output.table(
        *(
            "base",
            "case",
            "forward + backward",
            "with AdamW",
            "saved MiB",
            "/ floor",
            "gradient error",
            "linears by node",
        ),
        words=("base", "case", "linears by node"),
        title=f"A training step / the frozen base's · hidden {shape.hidden}, {shape.layers} layers, {shape.batch}×{shape.seq} "
        f"tokens, {setting.threads} thread(s), {setting.clock} time, n = {setting.rounds}",
        caption="r rank · p dropout · dtype of the adapter · median [quartiles] · gradients against the reference",
    )
    for row in result.cases:
        table.add_row(row.dtype, str(row.case), *_figures(row))
    return table


def targets_table(result: StepBench) -> Table:
    """A row per target."""
    columns = ("base", "target", "measured", "must", "aim", "")
    table = output.table(*columns, words=columns, title="Targets")
    for goal in result.targets:
        limits = ("" if limit is None else f"{limit:.2f}" for limit in (goal.must, goal.aim))
        table.add_row(goal.dtype, goal.name, _spread(goal.value), *limits, VERDICTS[goal.verdict])
    return table


def _figures(row: CaseResult) -> list[str]:
    error = ""
    if row.agreement is not None:
        error = f"{row.agreement.error:.1e}" + ("" if row.exact else " NOT EXACT")
    saved = [f"{row.saved_bytes / 2**20:.1f}", f"{row.saved_ratio:.2f}"]
    of = ", ".join(f"{count} {node}" for node, count in row.nodes.items())
    return [_spread(row.ratio), f"{row.ratio_adamw.median:.3f}", *saved, error, of]


def _spread(value: Spread) -> str:
    return f"{value.median:.3f} [{value.low:.3f}, {value.high:.3f}]"
