"""Paths as recipe files write them: `~`, `${ENV}`, relative to the recipe's folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from weftlora.errors import DataError

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def resolve_path(written: str, base_dir: str | os.PathLike[str] | None = None) -> Path:
    """`written` as an absolute path; relative ones start at `base_dir` (default: the working folder).

    Raises DataError when an environment variable in it is not set. Whether the file exists is not asked.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not (found := os.environ.get(name)):
            raise DataError(f"the path {written!r} needs the environment variable {name}, which is not set: export it.")
        return found

    path = Path(_VARIABLE.sub(value, written)).expanduser()
    return Path(os.path.normpath(Path(base_dir or ".").absolute() / path))
