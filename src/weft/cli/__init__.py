"""The `weft` command. Each command is a few lines over a library call; nothing heavy loads before it is needed."""

from weft.cli.entry import main

__all__ = ["main"]
