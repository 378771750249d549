"""What a call found, as plain data: the one way in which results are shown by `--json`, kept in files and read back."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from weftlora.errors import RunError
from weftlora.foreign_text import shortened
from weftlora.settings import is_number, is_whole


class Record:
    """Base of the dataclasses that calls give back. One that lies in files, where an older weftlora may read it, has a format."""

    format_version: ClassVar[int | None] = None

    def record(self) -> dict[str, Any]:
        """This as plain data, as `--json` shows it and files keep it."""
        fields = dataclasses.asdict(cast(Any, self))
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
        return plain if self.format_version is None else {"format": self.format_version, **plain}

    @classmethod
    def fields_in(cls, content: Mapping[str, Any], file: Path) -> dict[str, Any]:
        """What the content of a file has of the fields; what else is in it is left.

        Raises:
            RunError: it is of a newer format, or a value is of another type than the field.
        """
        written = content.get("format", 0)
        if is_number(written) and written > (cls.format_version or 0):
            raise RunError(f"{file} was written by a newer weftlora: update weftlora to read it.")
        hints = _hints(cast(Any, cls))
        found = {item.name: content[item.name] for item in dataclasses.fields(cast(Any, cls)) if item.name in content}
        for name, value in found.items():
            if (wrong := _misfit(value, hints[name], name)) is not None:
                raise RunError(f"{file} is damaged: {wrong}.")
        return found


def check_kinds(
    content: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], file: Path, needed: bool = False
) -> None:
    """Refuse a record with values of other types than these, by their names with dots; numbers are never true or false.

    Args:
        needed: whether all of them must be there.

    Raises:
        RunError: names the file, and the first value that is wrong.
    """
    for key, kind in kinds.items():
        value: Any = content
        for part in key.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            if needed:
                raise RunError(f"{file} is damaged: it has no {key}.")
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, NUMBER)):
            raise RunError(f"{file} is damaged: {key} is {shortened(repr(value), 80)}.")


NUMBER = (int, float)
_MISSING = object()


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _misfit(value: Any, hint: Any, name: str) -> str | None:
    """What in a value out of JSON is of another type than `hint`, in words; None where it fits."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return None
    if origin in (Union, types.UnionType):
        found = [_misfit(value, each, name) for each in inner]
        return None if None in found else next(found_one for found_one in found if found_one is not None)
    if origin is dict and isinstance(value, dict):
        return next((wrong for key, v in value.items() if (wrong := _misfit(v, inner[1], f"{name}.{key}"))), None)
    if origin is list and isinstance(value, list):
        return next((wrong for n, v in enumerate(value) if (wrong := _misfit(v, inner[0], f"{name}.{n}"))), None)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = _hints(cast(type, hint))
        return next((wrong for k, v in value.items() if (wrong := _misfit(v, hints.get(k, Any), f"{name}.{k}"))), None)
    if origin is None and not dataclasses.is_dataclass(hint) and _is(value, hint):
        return None
    if origin is Literal and isinstance(value, (str, int, bool, type(None))) and value in inner:
        return None
    return f"{name} is {shortened(repr(value), 80)}"


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return is_number(value)
    if kind is int:
        return is_whole(value)
    return isinstance(value, str if kind is Path else kind)
