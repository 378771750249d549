"""One tree of errors. A message says what was given, why it fails and what to do, in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from weftlora.foreign_text import shortened, visible
from weftlora.redaction import redacted


class WeftError(Exception):
    """Base of every error weftlora raises on purpose; the command line prints it as one line and exits 1.

    Its message is fit to be shown: no secret is in it, control characters are written out, and a huge value is cut.
    """

    def __init__(self, *given: object) -> None:
        super().__init__(
            *(shortened(visible(redacted(each), lines=True)) if isinstance(each, str) else each for each in given)
        )


class ConfigError(WeftError, ValueError):
    """A setting cannot work."""


class CombinationError(ConfigError):
    """Two choices that do not go together (see `weftlora.adapter.compat`)."""


class TargetError(WeftError, ValueError):
    """A module that cannot be adapted, or a target that matches nothing."""


class MergeError(WeftError, ValueError):
    """An adapter that has no weight-space form, or a merge in a state that does not allow it."""


class AdapterError(WeftError, ValueError):
    """A saved adapter that cannot be used: newer format, wrong base, missing or malformed files."""


class DataError(WeftError, ValueError):
    """A data file that is missing or a row that cannot be used; names file and line."""


class ModelError(WeftError, ValueError):
    """A base model that is missing, incomplete, or made for another task."""


class RunError(WeftError, RuntimeError):
    """A run folder that cannot be written, resumed or read."""


class DivergedError(RunError):
    """A training whose losses or scores are no numbers any more."""


class MissingExtraError(WeftError, ImportError):
    """A package that the call needs is in an extra that is not installed; says the `pip install` line."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest valid one, or all of them.

    >>> suggest("lora_alpa", ["r", "lora_alpha"])
    "did you mean 'lora_alpha'?"
    """
    names = sorted(valid)
    folded = {valid_name.lower(): valid_name for valid_name in names}
    if near := get_close_matches(name.lower(), folded, n=1, cutoff=0.6):
        return f"did you mean {folded[near[0]]!r}?"
    return f"use one of {', '.join(names)}."


def unknown_key(name: str, valid: Iterable[str], where: str) -> ConfigError:
    """The error for a key that `where` does not have."""
    return ConfigError(f"{where} has no key {name!r}: {suggest(name, valid)}")
