"""The version of weftlora, for whatever is written into files."""

__version__ = "0.1.0.dev0"
