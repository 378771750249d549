"""The commands `train`, `eval`, `generate`, `chat`, `recipes` and `doctor`, the list of all, and their way from the shell and back.

What a command does is in the library; here it is called and shown. Whatever the user can put right ends as one sentence and exit
code 1.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from weftlora.cli import bench, output
from weftlora.cli.auto import auto
from weftlora.cli.compare import compare, report
from weftlora.cli.data import data, look
from weftlora.cli.directions import directions, heads
from weftlora.cli.export import export, push
from weftlora.cli.inspect import inspect
from weftlora.cli.new_term import new_term
from weftlora.cli.options import Json, Quiet, TrustTerms
from weftlora.cli.search import search
from weftlora.errors import ConfigError, WeftError
from weftlora.foreign_text import shortened, visible
from weftlora.redaction import redacted
from weftlora.runs.run import check_source
from weftlora.version import __version__

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
app.command()(auto)
app.command()(export)
app.command()(push)
app.command()(inspect)
app.command()(report)
app.command()(heads)
app.command()(data)
app.command("new-term")(new_term)

Base = Annotated[
    str | None, typer.Option(help="Give the place of the base model, if it is not where the run found it.")
]


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, a built-in name (see `weftlora recipes`) or a run folder.")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="train.lr=1e-3")] = None,
    out: Annotated[str | None, typer.Option(help="Write the run to this folder; short for out=....")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Train a complete run for longer: a higher train.steps, in a new run.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, time and memory as `weftlora data` does, and train nothing.")
    ] = False,
    no_verify_base: Annotated[
        bool, typer.Option("--no-verify-base", help="Do not read the base's weights to identify them.")
    ] = False,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter and write a run folder."""
    given = [*(overrides or []), *([f"out={out}"] if out else [])]
    if dry_run:
        look(recipe, given, True, 3, as_json, quiet)
        return
    with output.working(as_json, quiet) as progress:
        from weftlora.train import train as call

        run = call(
            recipe,
            *given,
            resume=resume,
            extend=extend,
            overwrite=overwrite,
            verify_base=not no_verify_base,
            progress=progress,
        )
    output.show(run.record(), as_json, lambda: output.run_summary(run))


@app.command("eval")
def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            help="A run folder, an adapter folder or a model, with data.test=FILE; with --adapter none also a recipe."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="data.test=more.jsonl")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Measure on test or validation rows; by default test, or validation where there are no test rows."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure only this many rows, the first ones, and write nothing.")
    ] = None,
    adapter: Annotated[str, typer.Option(help="Measure the trained adapter, or none: the frozen base.")] = "trained",
    base: Base = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Take this many rows at a time.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generate at most this many tokens per answer.")
    ] = None,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a run, or its frozen base, on held-out rows; or an adapter folder or a model, on rows that you name."""
    with output.working(as_json, quiet) as progress:
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


System = Annotated[
    str | None,
    typer.Option(help="Put this system message before the prompt, for a run that was trained on conversations."),
]


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="A run or adapter folder, or a model as it is before training.")],
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt, or as JSON the columns of a prompt template; - reads it from stdin."),
    ] = None,
    system: System = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Continue this conversation, a JSON file of messages (and tools), instead of a prompt."
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the model the text as it is.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Set the seed of sampling, for a temperature above 0.")] = 0,
    base: Base = None,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt with a trained adapter, or with a model as it is before training.

    What the run was trained on decides what the prompt becomes: the user's turn in the chat template, the prompt template filled in,
    or the text as it stands.
    """
    if (prompt is None) == (messages is None):
        raise ConfigError("give one prompt: a text, - for stdin, or --messages FILE.")
    with output.calling(as_json, quiet=True):
        from weftlora.train import generate as call

        given, tools = _read_messages(messages) if messages else (sys.stdin.read() if prompt == "-" else prompt, None)
        answer = call(
            run,
            given or "",
            system=system,
            tools=tools,
            raw=raw,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            base=base,
        )
    output.show(answer.record(), as_json, lambda: answer.text)


def _read_messages(file: Path) -> tuple[str | list[dict[str, Any]] | None, list[Any] | None]:
    from weftlora.train.prompting import read_messages

    return read_messages(file, sys.stdin.read() if str(file) == "-" else None)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="A run or adapter folder, or a model as it is before training.")],
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Set the seed of sampling, for a temperature above 0.")] = 0,
    base: Base = None,
    trust_terms: TrustTerms = None,
) -> None:
    """Talk to a trained adapter, or to a model as it is before training, turn after turn.

    /new begins again and /exit leaves, as Ctrl-D does. Lines from a pipe are answered one after the other.
    """
    with output.calling(as_json=False, quiet=True):
        from weftlora.train import chat as call

        talk = call(run, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, base=base)
    asks = sys.stdin.isatty()
    if asks:
        kept = "what was said is remembered" if talk.remembers else "every prompt is answered by itself"
        sys.stderr.write(f"weftlora: {kept}; /new starts over, /exit leaves\n")
    while (line := output.next_line(asks)) is not None:
        if line.strip() in ("/exit", "/quit"):
            return
        if line.strip() == "/new":
            talk.forget()
        elif line.strip():
            with output.calling(as_json=False, quiet=True):
                answer = talk.say(line)
            output.say(answer.text)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe as a file to edit.")] = None,
    as_json: Json = False,
) -> None:
    """List the built-in recipes, or print one."""
    from weftlora.cli.recipes import catalogue, recipe_file, recipe_text

    with output.calling(as_json, quiet=True):
        record: Any = catalogue() if name is None else recipe_file(name)
    output.show(record, as_json, lambda: output.catalogue_table(record) if name is None else recipe_text(name, record))


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Argument(help="A run or adapter: also say which of its modules the fast path computes.")
    ] = None,
    trust_terms: TrustTerms = None,
    as_json: Json = False,
) -> None:
    """Say what weftlora finds on this machine, and what is missing or wrong."""
    if run is not None:
        check_source(run)
    with output.calling(as_json, quiet=True):
        from weftlora.cli.doctor import diagnose

        found = diagnose(Path.cwd(), run)
    output.show(found.record(), as_json, lambda: output.diagnosis_text(found))
    if found.problems:
        raise typer.Exit(1)


INTERRUPTED = 130
"""What Typer makes of Ctrl-C, as shells do."""

_OF_A_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES}
"""What the operating system has against a name that was given."""
_UsageError = typer.BadParameter.__base__
"""Typer's base of wrong options and arguments; it has moved between Typer's and click's modules."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `weftlora` with `arguments` (the shell's by default) and leave with its exit code.

    0: done. 1: something in the input cannot work; one sentence on stderr says what. 2: no such command, option or argument.
    130: interrupted. 143: told to end (SIGTERM). 129: the terminal was closed (SIGHUP).
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _open_streams()
    if threading.current_thread() is threading.main_thread():
        _spare_children()
        for number in _ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
                signal.signal(number, _terminated)
    try:
        code = app(given, prog_name="weftlora", standalone_mode=False)
        sys.stdout.flush()
    except WeftError as error:
        sys.exit(_say(str(error)))
    except BrokenPipeError:  # whoever read has read enough
        _show_nothing_more()
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno in _OF_A_STREAM:
            _show_nothing_more()
            sys.exit(_say(f"the output cannot be written: {str(error.strerror).lower()}."))
        if error.errno == errno.ENOENT and _is_nowhere():
            sys.exit(_say("the working folder was deleted: change to one that exists."))
        if error.errno not in _OF_A_PATH:
            raise
        sys.exit(_say(f"{error.filename!r} cannot be a file or folder here: {str(error.strerror).lower()}."))
    except Exception as error:
        if isinstance(error, MemoryError | RuntimeError) and (said := _out_of_memory(error)):
            sys.exit(_say(said))
        if isinstance(error, ValueError) and "embedded null byte" in str(error):
            sys.exit(_say("a path contains a NUL character, which no path can contain: write it again."))
        if _UsageError is None or not isinstance(error, _UsageError):
            raise
        sys.exit(_say(f"{error.format_message()} See `weftlora --help`.", 2))  # type: ignore[attr-defined]
    if code == INTERRUPTED:
        _say(
            "interrupted; `weftlora train ... --resume` continues a run, and `weftlora compare`, given again, a comparison."
        )
    sys.exit(code if isinstance(code, int) else 0)


def _out_of_memory(error: Exception) -> str:
    """What to say where there is not enough memory for what was asked; empty for other errors."""
    first = (str(error).strip().splitlines() or [""])[0]
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not known and "can't allocate memory" not in first and "not enough memory" not in first:
        return ""
    return (
        f"there is not enough memory ({shortened(first, 200).rstrip('.') or 'none is left'}): lower train.batch_size, data.max_length "
        "or the size of the adapter."
    )


_OF_A_STREAM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EBADF}
"""What the operating system has against writing to stdout, such as that the disk is full to which it goes."""


def _open_streams() -> None:
    """Streams that take every text: one that was closed takes it away, and one of few letters writes the others out."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _show_nothing_more() -> None:
    """What stdout still holds cannot be written, and must not be tried again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_nowhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


_ENDING = (signal.SIGTERM, signal.SIGHUP)


@functools.cache
def _spare_children() -> None:
    """Let processes that are forked from this one, such as those that encode rows, end by these signals as others do.

    Whoever made them waits until they have ended. The signals wait while one is forked: Python forgets those that come then.
    """
    masks: list[set[int]] = []

    def child() -> None:
        for number in _ENDING:
            if signal.getsignal(number) is _terminated:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    os.register_at_fork(
        before=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop()),
        after_in_child=child,
    )


def _terminated(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that a run says that it was interrupted and an export takes away what is unfinished."""
    raise SystemExit(128 + number)


def _say(sentence: str, code: int = 1) -> int:
    sys.stderr.write(f"weftlora: {shortened(visible(redacted(' '.join(sentence.split()))))}\n")
    return code
