"""The version of weftlora, for whatever is written into files: the one place; pyproject.toml reads it from here."""

__version__ = "0.1.0rc2"
