"""Paths as people write them: `~`, `${ENV}`, relative to the recipe's folder; and where the path of a model leads."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from weftlora.disk.files import check_regular
from weftlora.errors import ConfigError, DataError, ModelError
from weftlora.foreign_json import from_json
from weftlora.foreign_text import shortened

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def checked_path(written: str) -> str:
    """`written`, if a file could be called so. Raises ConfigError."""
    if "\0" in written:
        raise ConfigError(f"the path {written!r} holds a NUL, which no path can: write it again.")
    try:
        os.fsencode(written)
    except UnicodeEncodeError:
        raise ConfigError(f"the path {written!r} holds half a character, which no path can: write it again.") from None
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
    check_regular(folder, ModelError)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{str(folder)!r} is no model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")) and (old := sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])):
        raise ModelError(
            f"{str(folder)!r} has its weights in {old[0].name}, a pickle, which can run code as it is read and is not opened: "
            "if you trust it, load it once with AutoModelForCausalLM.from_pretrained(FOLDER), or the class of your model, and call "
            "its save_pretrained(NEW_FOLDER), which writes safetensors."
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{str(folder)!r} has a config but no weights: put its *.safetensors files there.")
    if missing := sorted(name for name in _sharded(folder) if not (folder / name).is_file()):
        raise ModelError(f"{str(folder)!r} lacks {missing[0]}, one of its weights files: copy it there.")
    return str(folder.resolve())


def _sharded(folder: Path) -> set[str]:
    """The weights files that a folder's index names. Raises ModelError where it is damaged, or names a file elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        names = {str(name) for name in from_json(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{str(index)!r} is damaged: copy it again.") from None
    for name in names:
        if Path(name).name != name or "\0" in name or len(name.encode("utf-8", "replace")) > 255:
            raise ModelError(
                f"{str(index)!r} names the file {name!r}, which does not lie beside it: copy the model again."
            )
    return names


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
