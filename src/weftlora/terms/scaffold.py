"""A new term to fill in: its file, its claims test, its page, and the package that offers it."""

from __future__ import annotations

import contextlib
import importlib.util
import keyword
import os
import re
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from weftlora.errors import ConfigError, RunError, suggest
from weftlora.records import Record
from weftlora.terms.axes import AXES

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_FILES = frozenset({"setup", "conftest"})
"""Names of files that setuptools and pytest run by themselves."""


@dataclass(frozen=True)
class Scaffold(Record):
    """What was written."""

    name: str
    axis: str
    folder: str
    files: tuple[str, ...]


def new_term(name: str, axis: str, folder: str | Path | None = None) -> Scaffold:
    """Write the files of a term called `name` into a folder, by default one of that name here.

    They work as they are: the term can be named in a config once its package is installed (`pip install -e FOLDER`), and keeps the
    contract (`weftlora.testing.check_term`). Its equation, its claim and its page are yours to fill in, and its tests fail until
    they are.

    Raises:
        ConfigError: a name that no term can have, or no such axis.
        RunError: one of the files is there already (nothing is written), or the folder cannot be written to.
    """
    if axis not in AXES:
        raise ConfigError(f"there is no axis {axis!r}: {suggest(str(axis), AXES)}")
    _check_name(name, axis)
    place = Path(name if folder is None else folder)
    files = {
        f"{name}.py": f"{axis}.py.txt",
        f"test_{name}.py": "test.py.txt",
        f"{name}.md": "card.md.txt",
        "pyproject.toml": "pyproject.toml.txt",
    }
    if there := [file for file in files if os.path.lexists(place / file)]:
        raise RunError(f"{place / there[0]} already exists: choose another name or another folder with --out.")
    texts = {file: _filled(_template(template), name, axis) for file, template in files.items()}
    made: list[Path] = []
    try:
        missing = [folder for folder in (place, *place.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        for file, text in texts.items():
            with (place / file).open("x", encoding="utf-8") as out:
                made.append(place / file)
                out.write(text)
    except OSError as error:
        for path in reversed(made):  # a full disk leaves nothing half-written
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        reason = (error.strerror or str(error)).lower()
        raise RunError(f"cannot write into {place}: {reason}; choose another folder with --out.") from None
    return Scaffold(name, axis, str(place), tuple(files))


def _check_name(name: str, axis: str) -> None:
    """Refuse a name that configs, Python, pip or the term's own file could not have. Raises ConfigError."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} is not a name of a term: use words of small letters and digits with _ between them, beginning with a letter, "
            "such as top2."
        )
    cls = _class_of(name)
    if taken := [own for own, kinds in AXES.items() if name in kinds]:
        raise ConfigError(f"{name!r} is a term of weftlora's on the axis {taken[0]}: choose another name.")
    if name == "none":
        raise ConfigError("'none' means in a config that there is nothing on an axis: choose another name.")
    if name in _FILES:
        raise ConfigError(f"{name}.py is a file that setuptools or pytest runs by itself: choose another name.")
    spec = importlib.util.find_spec(name)
    if name in sys.stdlib_module_names or (spec is not None and spec.origin is not None):  # a folder is no module
        raise ConfigError(
            f"{name!r} is a module that Python has here already, and {name}.py would take its place: choose another name."
        )
    if cls != "NewTerm" and re.search(rf"\b{cls}\b", _template(f"{axis}.py.txt")):
        raise ConfigError(
            f"{name!r} would be the class {cls}, and a file of a {axis} uses that name for something else: choose another."
        )


def _template(file: str) -> str:
    return (resources.files("weftlora") / "assets" / "new_term" / file).read_text(encoding="utf-8")


def _class_of(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _filled(text: str, name: str, axis: str) -> str:
    cls = _class_of(name)
    package = name.replace("_", "-").strip("-")
    text = text.replace("weftlora-new-term", f"weftlora-{package}")
    return text.replace("NewTerm", cls).replace("new_term", name).replace("AXIS", axis)
