"""Whose code a config that comes from a folder may run: the packages of terms that the user trusts. Nothing is loaded to ask."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from weftlora.errors import ConfigError

VARIABLE = "WEFT_TRUST_TERMS"

_trusted: set[str] = set()
_of_folder: ContextVar[bool] = ContextVar("weftlora_of_folder", default=False)


def trust_terms(*packages: str) -> None:
    """Let configs from folders import the terms of these packages, for the rest of this process.

    Importing a package runs its code, so name those whose code you would run. What your own config names needs no such word.

    Raises:
        ConfigError: something that is no name of a package.

    >>> trust_terms("a-package-of-terms")
    """
    for package in packages:
        if not isinstance(package, str) or not package.strip():
            raise ConfigError(f"trust_terms({package!r}): give the name of a package, as pip knows it.")
        _trusted.add(normal(package))


def is_trusted(package: str) -> bool:
    """Whether configs from folders may import the terms of this package."""
    named = re.split(r"[\s,]+", os.environ.get(VARIABLE, ""))
    return normal(package) in _trusted | {normal(name) for name in named if name}


def how_to_trust(package: str) -> str:
    """What to type, as the end of a sentence."""
    return f"call weftlora.trust_terms({package!r}), add --trust-terms {package} to the command, or set {VARIABLE}={package}"


@contextmanager
def from_folder() -> Iterator[None]:
    """While a config that was read from a folder is made: foreign terms in it need trust."""
    token = _of_folder.set(True)
    try:
        yield
    finally:
        _of_folder.reset(token)


def is_of_folder() -> bool:
    """Whether what is made now was read from a folder."""
    return _of_folder.get()


def normal(package: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", package.strip()).lower()
