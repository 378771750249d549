"""What a run's base is, by content: its weights, its config, its tokenizer.

    config, tokenizer    digests of their files, taken at once
    weights              SHA-256 of every weights file, by the cheapest proof there is: the name that the hub's cache gives a file,
                         which is its SHA-256; else what was found the last time for the same file (path, inode, size and time of
                         change), from the user's own cache; else the file is read, in the background, while the first steps run

A folder that was made of a GGUF file is known by that file: weights, config and tokenizer are all in it. What is in the
folder is held against what was written there.

Two folders with equal files are one base, wherever they lie. The fingerprint of the weights in memory (`weftlora.runs.base_model`)
says at once that a base is another; this says that it is the same to the last value.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig

from weftlora.disk.files import file_digest, file_stamp, read_json, user_cache
from weftlora.disk.ownership import temporary
from weftlora.errors import AdapterError, ModelError, RunError, WeftError
from weftlora.records import Record

_BLOB = re.compile(r"[0-9a-f]{64}")
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|.*\.model|chat_template.*"
)
_NOT_ITS = {
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "auto_map",
    "_attn_implementation",
    "use_cache",
}
"""Keys of a config that say how and from where it was loaded, not what it computes."""
NOT_VERIFIED = "not verified"


def folder_of(source: str) -> Path | None:
    """The folder that a base was loaded from: itself, or what the hub's cache has of it."""
    if Path(source).is_dir():
        return Path(source)
    found = try_to_load_from_cache(source, "config.json")
    return Path(found).parent if isinstance(found, str) else None


ORIGIN = "gguf.json"
"""In a folder that was made of a GGUF file: which, and what came of it."""


@dataclass(frozen=True)
class Origin(Record):
    """The GGUF file that a folder was made of."""

    format_version: ClassVar[int | None] = 2
    file: str
    """Its name."""
    sha256: str
    architecture: str
    """As llama.cpp calls it."""
    types: dict[str, int]
    """Tensors of each type: Q4_1, F32, ..."""
    weights: dict[str, str]
    """SHA-256 of every weights file that was made."""
    files: dict[str, str]
    """SHA-256 of every other one: config, tokenizer, chat template."""
    versions: dict[str, str]


def origin_of(source: str) -> Origin | None:
    """What a folder was made of; None where it was made of no GGUF file, by another version, or not to its end."""
    file = Path(source) / ORIGIN
    if not os.path.isfile(file):  # a name from a file may be no path at all, which is no error here
        return None
    try:
        content = read_json(file)
        origin = Origin(**Origin.fields_in(content, file)) if content.get("format") == Origin.format_version else None
    except (RunError, TypeError):
        return None
    names = () if origin is None else (*origin.files, *origin.weights)
    there = all(Path(name).name == name and (Path(source) / name).is_file() for name in names)  # none leads elsewhere
    return origin if there else None


def _unchanged(source: str) -> Origin | None:
    """What a folder was made of, where its config and tokenizer are those that were made."""
    origin = origin_of(source)
    if origin is None or any(digest(Path(source) / name) != known for name, known in origin.files.items()):
        return None
    return origin


def quantised(source: str) -> dict[str, Any]:
    """What a run's record says of a base that came from a quantised file; empty for others."""
    origin = origin_of(source)
    if origin is None:
        return {}
    return {"quantised": {key: getattr(origin, key) for key in ("file", "sha256", "architecture", "types")}}


def config_digest(settings: PretrainedConfig, source: str) -> str:
    """Digest of all in a config that decides what the model computes; of a GGUF file its own."""
    if (origin := _unchanged(source)) is not None:
        return origin.sha256[:16]
    content = {key: value for key, value in settings.to_dict().items() if key not in _NOT_ITS}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokenizer_digest(source: str) -> str:
    """Digest of a base's tokenizer files, of a GGUF file its own; empty where they cannot be found."""
    if (origin := _unchanged(source)) is not None:
        return origin.sha256[:16]
    folder = folder_of(source)
    files = (
        [] if folder is None else sorted(p for p in folder.iterdir() if _TOKENIZER.fullmatch(p.name) and p.is_file())
    )
    whole = hashlib.sha256()
    for path in files:
        whole.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:16] if files else ""


def weights_of(source: str) -> dict[str, str]:
    """SHA-256 of every weights file of a base, of the GGUF file that it was made of; empty where they cannot be found.

    Raises:
        ModelError: the weights that were made of a GGUF file have been changed since.
    """
    folder = folder_of(source)
    if folder is not None and (origin := origin_of(source)) is not None:
        if changed := [name for name, known in origin.weights.items() if digest(folder / name) != known]:
            raise ModelError(f"{folder / changed[0]} was changed since it was made of {origin.file}: delete {folder}.")
        return {origin.file: origin.sha256}
    return {} if folder is None else {path.name: digest(path) for path in sorted(folder.glob("*.safetensors"))}


def digest(path: Path) -> str:
    """SHA-256 of a file, read only if nobody has."""
    real = path.resolve()
    if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
        return real.name
    known = _known(real)
    with contextlib.suppress(OSError):
        if _BLOB.fullmatch(found := known.read_text(encoding="ascii", errors="replace")):
            return found
    found = file_digest(real)
    if known == _known(real):  # it has not changed while it was read
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
            known.parent.mkdir(parents=True, exist_ok=True)
            partial = temporary(known)
            partial.write_text(found, encoding="ascii")
            partial.replace(known)
    return found


def _known(real: Path) -> Path:
    """Where the digest of a file is kept: in the user's own cache, under what would change with the file."""
    key = "\0".join(map(str, (real, *file_stamp(real))))
    return user_cache("hashes") / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Weights:
    """The weights of a base, looked at in the background and compared with those that an adapter was trained on."""

    def __init__(self, source: str, expected: Mapping[str, str] | None, adapter: str) -> None:
        self.source, self.expected, self.adapter = source, expected, adapter
        self.found: dict[str, str] = {}
        self.problem: Exception | None = None
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        try:
            self.found = weights_of(self.source)
        except Exception as error:
            self.problem = error

    def verified(self) -> dict[str, str]:
        """The digests by file, once they are known.

        Raises:
            AdapterError: they are not those that are expected, or cannot be read any more.
        """
        self.thread.join()
        if self.problem is not None:
            if isinstance(self.problem, WeftError):
                raise self.problem
            raise AdapterError(
                f"the weights of {self.source} cannot be read any more: {self.problem}."
            ) from self.problem
        check_weights(self.expected, self.found, self.adapter, self.source)
        return self.found


def check_weights(expected: Mapping[str, str] | None, found: Mapping[str, str], adapter: str, source: str) -> None:
    """Refuse other weights; where one side is not known there is nothing to compare. Raises AdapterError."""
    if expected and found and sorted(expected.values()) != sorted(found.values()):
        changed = next((name for name in found if found[name] != expected.get(name)), "")
        raise AdapterError(
            f"the adapter {adapter} was trained on other weights than those of {source} ({changed} differs): give the base it was "
            "trained on."
        )


def check_files(base: Mapping[str, Any], settings: PretrainedConfig, source: str, adapter: str) -> None:
    """Refuse another config or tokenizer than those that a run's record names. Raises AdapterError."""
    for what, known, found in (
        ("config", base.get("config"), config_digest(settings, source)),
        ("tokenizer", base.get("tokenizer"), tokenizer_digest(source)),
    ):
        if known and found and known != found:
            raise AdapterError(
                f"the adapter {adapter} was trained with another {what} than that of {source}: give the base it was trained on."
            )
