"""From the shell to a command and back: one sentence and exit code 1 for whatever the user can put right."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Sequence

import typer

from weftlora.cli.commands import app
from weftlora.errors import WeftError
from weftlora.foreign import shortened, visible
from weftlora.redaction import redacted

INTERRUPTED = 130
"""What Typer makes of Ctrl-C, as shells do."""

_OF_A_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES}
"""What the operating system has against a name that was given."""
_UsageError = typer.BadParameter.__base__
"""Typer's base of wrong options and arguments; it has moved between Typer's and click's modules."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `weftlora` with `arguments` (the shell's by default) and leave with its exit code.

    0: done. 1: something in the input cannot work; one sentence on stderr says what. 130: interrupted. 143: told to end (SIGTERM).
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(given, prog_name="weftlora", standalone_mode=False)
    except WeftError as error:
        sys.exit(_say(str(error)))
    except OSError as error:
        if error.errno not in _OF_A_PATH:
            raise
        sys.exit(_say(f"{error.filename!r} cannot be a file or folder here: {str(error.strerror).lower()}."))
    except Exception as error:
        if isinstance(error, ValueError) and "embedded null byte" in str(error):
            sys.exit(_say("a path holds a NUL, which no path can: write it again."))
        if _UsageError is None or not isinstance(error, _UsageError):
            raise
        sys.exit(_say(f"{error.format_message()} See `weftlora --help`."))  # type: ignore[attr-defined]
    if code == INTERRUPTED:
        _say(
            "interrupted; `weftlora train ... --resume` continues a run, and `weftlora compare`, given again, a comparison."
        )
    sys.exit(code if isinstance(code, int) else 0)


def _terminated(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that a run says that it was interrupted and an export takes away what is unfinished."""
    raise SystemExit(128 + number)


def _say(sentence: str) -> int:
    sys.stderr.write(f"weftlora: {shortened(visible(redacted(' '.join(sentence.split()))))}\n")
    return 1
