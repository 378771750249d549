"""Decompositions of frozen weights: timed, and kept in a folder where there is one to keep them in.

A decomposition depends on W alone, not on training, so runs that launch directions on the same base can share it. The key
is the SHA-256 of W's bytes, dtype and shape. Nothing is written unless a folder is named: by `weftlora.attach(model, cache=...)`,
or by WEFT_CACHE in the environment. Kept are fp64 values, so a run with the cache is bit for bit the run without it.

One file per weight, [small, k] + [k] numbers: 134 MB where the smaller side of W is 4096. It carries its key and a
checksum of its content; a file that is damaged, foreign or of another format is computed anew and replaced.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weftlora import linalg
from weftlora.errors import ModelError

logger = logging.getLogger(__name__)

FORMAT = "weft-spectrum-1"
CACHE = "WEFT_CACHE"
WORTH_SAYING = 1.0  # seconds


@dataclass(frozen=True)
class Decomposer:
    """Spectra of weights, looked up in `cache` (None: in the folder that WEFT_CACHE names, if it names one)."""

    cache: Path | None = None

    def __call__(self, name: str, w_oi: Tensor) -> linalg.Spectrum:
        """The spectrum of W [out, in] of module `name`, on W's device.

        Raises:
            ModelError: W has values that are not finite.
        """
        started = time.perf_counter()
        if not torch.isfinite(w_oi).all():
            raise ModelError(f"the weight of {name} has values that are not finite: give a complete base model.")
        folder = self.cache or (Path(os.environ[CACHE]) if os.environ.get(CACHE) else None)
        if folder is None:
            found, how = linalg.spectrum(w_oi), "decomposed"
        else:
            found, how = _through(folder, w_oi)
        seconds = time.perf_counter() - started
        level = logging.INFO if seconds >= WORTH_SAYING else logging.DEBUG
        logger.log(level, "%s %s: %s in %.2f s", name, list(w_oi.shape), how, seconds)
        return found


def weight_key(w_oi: Tensor) -> str:
    """SHA-256 of the bytes, dtype and shape of a weight, in hexadecimal."""
    found = hashlib.sha256(f"{w_oi.dtype} {tuple(w_oi.shape)} ".encode())
    found.update(_bytes(w_oi))
    return found.hexdigest()


def load(path: Path, key: str) -> linalg.Spectrum | None:
    """The spectrum kept in `path` for the weight of this key; None if it is absent, damaged, foreign or of another format."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            sigma, side = file.get_tensor("sigma"), file.get_tensor("side")
        if about.get("format") == FORMAT and about.get("key") == key and about.get("content") == _checksum(sigma, side):
            return linalg.Spectrum(sigma, side, about["tall"] == "yes")
        reason = "it was not made from this weight, or was changed since"
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error)
    logger.warning("%s is computed anew and replaced: %s", path, reason)
    return None


def save(path: Path, key: str, found: linalg.Spectrum) -> None:
    """Write beside `path`, force it to disk, rename it into place; what cannot be written is a warning, not an error."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    tensors = {"sigma": found.sigma.cpu().contiguous(), "side": found.side.cpu().contiguous()}
    about = {"format": FORMAT, "key": key, "tall": "yes" if found.tall else "no", "content": _checksum(**tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=about)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        warnings.warn(
            f"the decomposition of a weight cannot be kept in {path.parent} ({error}): every run computes it.",
            stacklevel=2,
        )


def _through(folder: Path, w_oi: Tensor) -> tuple[linalg.Spectrum, str]:
    key = weight_key(w_oi)
    path = folder / f"{key}.safetensors"
    if (kept := load(path, key)) is not None:
        there = linalg.Spectrum(kept.sigma.to(w_oi.device), kept.side.to(w_oi.device), kept.tall)
        return there, "read from the cache"
    found = linalg.spectrum(w_oi)
    save(path, key, found)
    return found, "decomposed and kept"


def _checksum(sigma: Tensor, side: Tensor) -> str:
    found = hashlib.sha256(_bytes(sigma))
    found.update(_bytes(side))
    return found.hexdigest()


def _bytes(t: Tensor) -> memoryview:
    return t.detach().cpu().contiguous().view(torch.uint8).numpy().data
