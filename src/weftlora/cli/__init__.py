"""The `weftlora` command. Each command is a few lines over a library call; nothing heavy loads before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from weftlora.errors import MissingExtraError
from weftlora.extras import needs

_ALSO = {
    **dict.fromkeys(("train", "eval", "generate", "search", "heads"), "train"),
    "compare": "compare",
    "report": "report",
    "auto": "auto",
}
"""Command → the extra that it needs beside `cli`; who has neither is told both at once."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `weftlora` with `arguments` (the shell's by default) and leave with its exit code; see `weftlora.cli.commands`."""
    command = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    also = [_ALSO[command]] if command in _ALSO else []
    try:
        with needs("cli", "the command weftlora", *also):
            from weftlora.cli import commands
        commands.main(arguments)
    except MissingExtraError as error:
        sys.stderr.write(f"weftlora: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:  # before Typer answers it: loading the command takes a moment, too
        sys.stderr.write("weftlora: interrupted.\n")
        sys.exit(130)


__all__ = ["main"]
