"""Paths as recipe files write them: `~`, `${ENV}`, relative to the recipe's folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from weftlora.errors import ConfigError, DataError
from weftlora.foreign import shortened

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def checked_path(written: str) -> str:
    """`written`, if a file could be called so. Raises ConfigError."""
    if "\0" in written:
        raise ConfigError(f"the path {written!r} holds a NUL, which no path can: write it again.")
    if (longest := max(len(os.fsencode(part)) for part in written.split("/"))) > 255 or len(
        os.fsencode(written)
    ) > 4000:
        raise ConfigError(
            f"the path {shortened(repr(written), 120)} has a name of {longest} bytes, and 255 can be had: shorten it."
        )
    if written.startswith("~"):
        try:
            Path(written).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"the path {written!r} names a user that this machine does not have: write it out."
            ) from None
    return written


def resolve_path(written: str, base_dir: str | os.PathLike[str] | None = None) -> Path:
    """`written` as an absolute path; relative ones start at `base_dir` (default: the working folder).

    Raises DataError when an environment variable in it is not set. Whether the file exists is not asked.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not (found := os.environ.get(name)):
            raise DataError(f"the path {written!r} needs the environment variable {name}, which is not set: export it.")
        return found

    path = Path(checked_path(_VARIABLE.sub(value, written))).expanduser()
    return Path(os.path.normpath(Path(base_dir or ".").absolute() / path))
