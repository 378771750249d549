"""A GGUF file as a base: its header checked, its weights dequantised once, its tokenizer and chat template taken along.

    file.gguf  →  <user's cache>/models/<SHA-256 of the file>/
                      config.json  model.safetensors (bfloat16)  tokenizer.json  tokenizer_config.json  chat_template.jinja
                      gguf.json    what it was made of, and the digests of the files (`weftlora.runs.identity.Origin`)

What follows is a folder like any other. It is made by transformers, which knows the tensors' names and permutations of each
architecture; here is what comes before and after: a damaged header is refused before anything reads by its numbers, and the folder
is there whole or not at all, made by one process while others wait.

    header    "GGUF" version tensors keys        u32 · u64 · u64 after the magic, little endian
    keys      name type value                    a string is u64 and bytes, an array a type, u64 and values
    tensors   name dimensions type offset        the offset counts from the end of the header, aligned
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import logging
import mmap
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from weftlora.data.paths import DEQUANTISED, WORDS, check_gguf, is_packaged_file, packaged_file
from weftlora.disk.files import sync_folder, user_cache, write_folder, write_json, writing
from weftlora.disk.lock import beside, holding
from weftlora.errors import ModelError, RunError
from weftlora.extras import needs
from weftlora.host.versions import dequantising
from weftlora.runs.identity import ORIGIN, Origin, digest, origin_of
from weftlora.version import __version__

log = logging.getLogger(__name__)
WAIT = 1800.0
"""Seconds to wait for a process that dequantises the same file."""
DTYPE = torch.bfloat16


def dequantised(file: Path, path: str) -> Path:
    """The folder that was made of a GGUF file, made now if it is not there.

    Args:
        path: the model as it was written, for messages; of a file in a package also what its RECORD is looked up by.

    Raises:
        ModelError: a damaged file, an architecture or a type of tensor that cannot be read, another file than the RECORD of its
            package has, or a cache that cannot be written.
        MissingExtraError: the package `gguf` is not installed, and the file was not dequantised before.
    """
    check_gguf(file)
    found = digest(file)
    written = WORDS.get(path, path)
    if is_packaged_file(written) and (known := packaged_file(written)).path == file and known.digest != found:
        raise ModelError(
            f"the model {path!r} is not the file that its package was installed with (its SHA-256 is not that of the RECORD): install "
            "the package again, with pip's --force-reinstall."
        )
    cache = user_cache(DEQUANTISED)
    folder = cache / found
    if origin_of(str(folder)) is not None:
        return folder
    header = Header.read(file, path)
    header.check(path)
    with needs("gguf", f"the model {path!r}"):
        import gguf  # noqa: F401
    try:
        with writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
        with holding(cache, f"dequantising {file.name}", beside(folder), patience=WAIT):
            if origin_of(str(folder)) is None:  # nobody has made it meanwhile
                log.info("dequantising %s once into %s", file.name, folder)
                write_folder(folder, lambda new: _make(header, found, new, path), ours=lambda name: True)
                sync_folder(cache)
    except RunError as error:
        raise ModelError(
            f"the model {path!r} must be dequantised into {cache} once, which failed ({str(error).partition(';')[0]}): free "
            "space, or set XDG_CACHE_HOME to a folder that can be written."
        ) from error
    return folder


def _make(header: Header, found: str, new: Path, path: str) -> None:
    """Fill a folder with the model of a GGUF file. Raises ModelError."""
    file = header.file
    place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        with _quietly():
            settings = AutoConfig.from_pretrained(**place, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(**place, trust_remote_code=False)
            kind: Any = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
            _check_size(header, settings, kind)
            model, report = kind.from_pretrained(
                **place,
                config=settings,
                dtype=DTYPE,
                output_loading_info=True,
                trust_remote_code=False,
                **dequantising(),
            )
    except Exception as error:  # of a wrong key of the header transformers fails in its own way
        said = str(error).strip().splitlines() or [type(error).__name__]
        if "architecture" in said[0]:
            raise header.unknown(path) from None
        raise ModelError(
            f"the GGUF file {path!r} ({header.architecture}) cannot be dequantised: {said[0].rstrip('.')}; give another file, or the "
            "model as a folder with safetensors."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the GGUF file {path!r} lacks {len(missing)} tensors of its architecture {header.architecture!r}, the first is "
            f"{missing[0]!r}: copy it again, or give the model as a folder with safetensors."
        )
    with torch.device("meta"):
        plain = kind.from_config(_dense(model.config), dtype=DTYPE, trust_remote_code=False)
    plain.load_state_dict({name: tensor.to(DTYPE) for name, tensor in model.state_dict().items()}, assign=True)
    plain.tie_weights()
    if plain.can_generate():
        plain.generation_config = model.generation_config
    with _quietly():
        plain.save_pretrained(new)
        tokenizer.save_pretrained(new)
    made = {each.name: digest(each) for each in sorted(new.iterdir()) if each.is_file()}
    weights = {name: known for name, known in made.items() if name.endswith(".safetensors")}
    others = {name: known for name, known in made.items() if name not in weights}
    versions = {name: importlib.metadata.version(name) for name in ("gguf", "transformers")} | {"weftlora": __version__}
    origin = Origin(file.name, found, header.architecture, dict(header.types), weights, others, versions)
    write_json(new / ORIGIN, origin.record())


def _check_size(header: Header, settings: Any, kind: Any) -> None:
    """Refuse a header whose model is larger than its file can be, before anything of that size is made. Raises ValueError."""
    layers, tensors = int(getattr(settings, "num_hidden_layers", 0) or 0), sum(header.types.values())
    if layers > tensors:
        raise ValueError(f"its header speaks of {layers:,} layers, and it has {tensors:,} tensors")
    with torch.device("meta"):
        count = sum(
            p.numel() for p in kind.from_config(_dense(copy.deepcopy(settings)), trust_remote_code=False).parameters()
        )
    if count > MOST_PER_BYTE * (size := header.file.stat().st_size):
        raise ValueError(f"its header speaks of {count:,} parameters, which do not fit into its {size:,} bytes")


def _dense(settings: Any) -> Any:
    """The config without what says that the weights were quantised, with which it could not be saved."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(settings, name):
            delattr(settings, name)
    return settings


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars and advice of transformers, which are for those who load the file themselves."""
    loading = [logging.getLogger(name) for name in ("transformers.quantizers", "transformers.modeling_utils")]
    levels = [each.level for each in loading]
    for each in loading:
        each.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loading, levels, strict=True):
            each.setLevel(level)


# ---------------------------------------------------------------------- the header

VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values that are numbers, as `struct` calls them."""
_STRING, _ARRAY, _DEEPEST = 8, 9, 4
MOST_PER_BYTE = 8
"""Values of a tensor in a byte of the file, at one bit each; the smallest types of llama.cpp take 1.6."""
MOST_KEYS, MOST_TENSORS, MOST_DIMENSIONS = 10**5, 10**6, 8


@dataclass(frozen=True)
class Header:
    """What is told of a GGUF file before its tensors are read."""

    file: Path
    settings: dict[str, Any]
    """The keys with a number or a text."""
    types: Counter[str]
    """How many tensors there are of each type, by the names that llama.cpp gives them."""

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.settings.get("general.architecture", "")) or "unknown"

    @classmethod
    def read(cls, file: Path, path: str) -> Header:
        """The header of a file. Raises ModelError where it is damaged."""
        try:
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
                return _Reader(held).header(file)
        except (struct.error, ValueError, OSError) as error:
            raise ModelError(f"the GGUF file {path!r} is damaged ({error}): copy it again.") from None

    def check(self, path: str) -> None:
        """Refuse what is no whole model. Raises ModelError."""
        kind, parts = self.settings.get("general.type", "model"), self.settings.get("split.count", 0)
        if kind != "model":
            raise ModelError(f"the GGUF file {path!r} holds {kind!r}, not a model: give the file of its base model.")
        if isinstance(parts, int) and parts > 1:
            raise ModelError(
                f"the GGUF file {path!r} is one of {parts} parts of a model: join them with llama-gguf-split --merge, and give that."
            )

    def unknown(self, path: str) -> ModelError:
        """The error for an architecture that transformers cannot read."""
        return ModelError(
            f"the GGUF file {path!r} has the architecture {self.architecture!r}, which transformers cannot read out of GGUF: give the "
            "model as a folder with safetensors."
        )


class _Reader:
    """Reads a header front to back; every length is held against what is left of the file."""

    def __init__(self, held: mmap.mmap) -> None:
        self.held, self.at, self.size = held, 4, len(held)

    def header(self, file: Path) -> Header:
        version = self.number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise ValueError(
                "its bytes are in the other order"
                if swapped
                else f"it has version {version}; versions 2 and 3 can be read"
            )
        tensors, keys = self.number("Q"), self.number("Q")
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise ValueError(f"it says that it has {tensors:,} tensors and {keys:,} keys")
        settings: dict[str, Any] = {}
        for _ in range(keys):
            name = self.text()
            if (value := self.value(self.number("I"), 0)) is not None:
                settings[name] = value
        types = Counter(self.tensor() for _ in range(tensors))
        if not tensors:
            raise ValueError("it has no tensors")
        if self.ends > self.size:
            raise ValueError(f"it ends after {self.size:,} bytes, and its tensors begin as late as {self.ends:,}")
        return Header(file, settings, types)

    ends = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise ValueError(f"it ends after {self.size:,} bytes, within its header")
        self.at += count
        return self.held[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int, depth: int) -> Any:
        """A number or a text; None of an array, which is passed over."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            length = self.number("Q")
            return self.take(length).decode("utf-8", "replace")
        if kind != _ARRAY or depth > _DEEPEST:
            raise ValueError(f"it has a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            self.take(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
            return None
        if count > self.size - self.at:  # each takes a byte at the least
            raise ValueError(f"it says that it has {count:,} values")
        for _ in range(count):
            self.value(inner, depth + 1)
        return None

    def tensor(self) -> str:
        """The name of the type of one tensor; its place must be in the file."""
        self.text()
        dimensions = self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"it has a tensor of {dimensions} dimensions")
        self.take(8 * dimensions)
        kind, offset = self.number("I"), self.number("Q")
        self.ends = max(self.ends, offset)
        return _type_name(kind)


def _type_name(kind: int) -> str:
    """What llama.cpp calls a type of tensors; the number where the package `gguf` is not there, or does not know it."""
    with contextlib.suppress(ImportError, ValueError):
        from gguf import GGMLQuantizationType

        return str(GGMLQuantizationType(kind).name)
    return f"type {kind}"
