"""What a call found, as plain data: the one way in which results are shown by `--json`, kept in files and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

from weftlora.errors import RunError
from weftlora.settings import is_number


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
        """What the content of a file has of the fields; what else is in it is left. Raises RunError where it is of a newer format."""
        written = content.get("format", 0)
        if is_number(written) and written > (cls.format_version or 0):
            raise RunError(f"{file} was written by a newer weftlora: update weftlora to read it.")
        names = {item.name for item in dataclasses.fields(cast(Any, cls))}
        return {name: value for name, value in content.items() if name in names}
