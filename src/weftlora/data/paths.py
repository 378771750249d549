"""Paths as recipe files write them: `~`, `${ENV}`, relative to the recipe's folder."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from weftlora.errors import DataError, ModelError

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


def locate(path: str, base_dir: Path) -> str:
    """The folder behind `path` (absolute), or `path` itself where it can only be a hub id. Raises ModelError."""
    if path == "demo":
        from weftlora.data.demo import demo_model_path

        return str(demo_model_path())
    folder = _in_package(path) if path.startswith(_PACKAGE) else resolve_path(path, base_dir)
    if not folder.exists():
        if Path(path).is_absolute() or path.startswith((".", "~", "$")) or path.count("/") > 1:
            raise ModelError(f"there is no model folder {str(folder)!r}.")
        return path
    if not (folder / "config.json").is_file():
        raise ModelError(f"{str(folder)!r} is no model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{str(folder)!r} has a config but no weights: put its *.safetensors files there.")
    return str(folder.resolve())


_PACKAGE = "package:"


def _in_package(path: str) -> Path:
    """The folder that `package:NAME/FOLDER` means: a model that an installed Python package carries."""
    name, _, inside = path.removeprefix(_PACKAGE).partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"the model {path!r} needs the Python package {name!r}, which is not installed: pip install it."
        )
    return Path(found.submodule_search_locations[0]) / inside
