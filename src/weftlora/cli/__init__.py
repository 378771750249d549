"""The `weftlora` command. Each command is a few lines over a library call; nothing heavy loads before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from weftlora.errors import MissingExtraError
from weftlora.extras import needs


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `weftlora` with `arguments` (the shell's by default) and leave with its exit code; see `weftlora.cli.entry`."""
    try:
        with needs("cli", "the command weftlora"):
            from weftlora.cli import entry
    except MissingExtraError as error:
        sys.stderr.write(f"weftlora: {error}\n")
        sys.exit(1)
    entry.main(arguments)


__all__ = ["main"]
