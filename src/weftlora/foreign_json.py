"""JSON that somebody else wrote, read so that it fails in one way only: with a ValueError that says why."""

from __future__ import annotations

import json
from typing import Any


def from_json(text: str, exact: bool = False) -> Any:
    """What a JSON text says.

    A whole number beyond 64 bits, which nothing of ours writes, is read as a float: nothing that counts with it can overflow.

    Args:
        exact: whole numbers of any length are what they are, for what is shown and not counted with.

    Raises:
        ValueError: no JSON, or nested too deep for a reader that calls itself.
    """
    try:
        return json.loads(text) if exact else json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 else float(digits)
