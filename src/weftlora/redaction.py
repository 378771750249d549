"""Tokens, keys and passwords: known by the name of a setting, by their own form, or as the value of a variable of the environment.

What weftlora writes or shows goes through `redacted`, which puts MASK in their place.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import Any, ClassVar

MASK = "[secret]"

_ALONE = {"token", "password", "passwd", "passphrase", "secret", "credential", "credentials", "apikey"}
"""A name that is, or ends in, one of these words is of a secret, unless the word before says otherwise."""
_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("account", "key"), ("auth", "key")}
_NO_SECRET = {
    *(
        "eos",
        "bos",
        "pad",
        "unk",
        "sep",
        "cls",
        "mask",
        "image",
        "audio",
        "video",
        "special",
        "start",
        "end",
        "first",
        "last",
    ),
    *(
        "per",
        "max",
        "min",
        "num",
        "decoder",
        "forced",
        "stop",
        "think",
        "next",
        "new",
        "by",
        "a",
        "the",
        "each",
        "every",
    ),
}
"""Words before `token` that make it one of a text."""
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")

_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
)
_USER = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/@?#]+@")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|key|password|passwd|secret|signature|sig|credential)=)[^\s&#'\"]+", re.IGNORECASE
)
_SHORTEST = 6
"""Characters of the shortest text that may hold a secret: ?key=x."""
_LEAST = 8
"""Characters from which on the value of a variable is masked wherever it stands: shorter ones would be found in words."""


@functools.cache
def is_secret_name(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret.

    >>> [name for name in ("hub_token", "HF_TOKEN", "eos_token", "apiKey", "tokens", "wandb_api_key") if is_secret_name(name)]
    ['hub_token', 'HF_TOKEN', 'apiKey', 'wandb_api_key']
    """
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _NO_SECRET
    return words[-1] in _ALONE or (before, words[-1]) in _PAIRS


def redacted(value: Any) -> Any:
    """`value` with MASK in place of every secret in it: plain data, or a text."""
    return _redacted(value, _of_environment())


def _redacted(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        if len(value) < _SHORTEST:
            return value
        for secret in known:
            value = value.replace(secret, MASK)
        value = _FORMS.sub(MASK, value)
        if "://" in value:
            value = _USER.sub(rf"\1{MASK}@", value)
        return _QUERY.sub(rf"\1{MASK}", value) if "=" in value else value
    if isinstance(value, dict):
        named = ((key, _redacted(key, known), inner) for key, inner in value.items())
        return {
            name: MASK if _is_set(key, inner) or _is_set(name, inner) else _redacted(inner, known)
            for key, name, inner in named
        }
    if isinstance(value, (list, tuple)):
        return [_redacted(inner, known) for inner in value]
    return value


def _is_set(key: Any, value: Any) -> bool:
    """Whether `value` is a secret because of the name of its setting; true, false and nothing give nothing away."""
    return isinstance(key, str) and is_secret_name(key) and isinstance(value, (str, bytes)) and bool(value)


def secrets_in(value: Any, where: str) -> Iterator[str]:
    """The names, with dots, of the settings in `value` that are secrets."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if _is_set(key, inner):
                yield f"{where}.{key}"
            else:
                yield from secrets_in(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from secrets_in(inner, where)
    elif isinstance(value, str) and redacted(value) != value:
        yield where


def _of_environment() -> list[str]:
    """The values of secret variables, the longest first; a path, such as that of a file of credentials, is none."""
    if _Seen.of != (
        now := vars(os.environ)["_data"]
    ):  # to compare it takes a microsecond, to read it half a millisecond
        named = {value for name, value in os.environ.items() if len(value) >= _LEAST and is_secret_name(name)}
        _Seen.of, _Seen.secrets = dict(now), sorted((v for v in named if not os.path.isabs(v)), key=len, reverse=True)
    return _Seen.secrets


class _Seen:
    """The environment when it was last read, and the secrets in it."""

    of: ClassVar[dict[Any, Any] | None] = None
    secrets: ClassVar[list[str]] = []
