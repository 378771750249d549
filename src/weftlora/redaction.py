"""Tokens, keys and passwords: known by the name of a setting, by their own form, or as the value of a variable of the environment.

What weftlora writes or shows goes through `redacted`, which puts MASK in their place.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import Any

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
    return _redacted(value, sorted(_of_environment(), key=len, reverse=True))


def _redacted(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        for secret in known:
            value = value.replace(secret, MASK)
        return _QUERY.sub(rf"\1{MASK}", _USER.sub(rf"\1{MASK}@", _FORMS.sub(MASK, value)))
    if isinstance(value, dict):
        return {
            _redacted(key, known): MASK if _is_set(key, inner) else _redacted(inner, known)
            for key, inner in value.items()
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


def _of_environment() -> set[str]:
    """The values of secret variables; a path, such as that of a file of credentials, is none."""
    named = {value for name, value in os.environ.items() if len(value) >= _LEAST and is_secret_name(name)}
    return {value for value in named if not os.path.isabs(value)}
