"""The `weftlora` command. Each command is a few lines over a library call; nothing heavy loads before it is needed."""

from weftlora.cli.entry import main

__all__ = ["main"]
