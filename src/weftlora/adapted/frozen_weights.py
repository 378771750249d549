"""Frozen weights one matrix at a time: read out of a checkpoint folder, and decomposed, each once where a folder keeps the result.

    matrix          a single weight of a folder by its module's name: never the whole model
    decomposition   one side of the thin SVD in fp64, timed; 134 MB where the smaller side of W is 4096

A matrix from a folder is what directions are ranked on where the base in memory is quantised (its noise owns the small end of the
spectrum, where task-specific directions lie), and what a model that was fine-tuned in full is compared with.

A decomposition depends on W alone, not on training, so runs that launch directions on the same base can share it. Nothing is
written unless a folder is named: by `weftlora.attach(model, cache=...)`, or by WEFT_CACHE in the environment. The key is the SHA-256
of W's bytes, dtype and shape; a file carries its key and a checksum of its content, and one that is damaged, foreign or of another
format is computed again and replaced. A run with the cache is bit for bit the run without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from weftlora import change_rates
from weftlora.adapted.layer import WeftLinear
from weftlora.adapted.quantised import distance, is_quantised
from weftlora.disk.files import check_regular
from weftlora.errors import ModelError

logger = logging.getLogger(__name__)

FORMAT = "weft-spectrum-1"
CACHE = "WEFT_CACHE"
WORTH_SAYING = 1.0  # seconds


@dataclass(frozen=True)
class Decomposer:
    """Spectra of weights, looked up in `cache` (None: in the folder that WEFT_CACHE names, if it names one)."""

    cache: Path | None = None

    def __call__(self, name: str, w_oi: Tensor) -> change_rates.Spectrum:
        """The spectrum of W [out, in] of module `name`, on W's device.

        Raises:
            ModelError: W has values that are not finite.
        """
        started = time.perf_counter()
        if not torch.isfinite(w_oi).all():
            raise ModelError(f"the weight of {name} has values that are not finite: give a complete base model.")
        folder = self.cache or (Path(os.environ[CACHE]) if os.environ.get(CACHE) else None)
        if folder is None:
            found, how = change_rates.spectrum(w_oi), "decomposed"
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


def load(path: Path, key: str, shape: tuple[int, int]) -> change_rates.Spectrum | None:
    """The spectrum kept in `path` for the W [out, in] of this key; None if it is absent, damaged, foreign or of another format."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            sigma, side = file.get_tensor("sigma"), file.get_tensor("side")
        known = about.get("format") == FORMAT and about.get("key") == key and _fits(sigma, side, shape)
        if known and about.get("content") == _checksum(sigma, side):
            return change_rates.Spectrum(sigma, side, shape[1] <= shape[0])
        reason = "it was not made from this weight, or was changed since"
    except (OSError, SafetensorError, ValueError) as error:
        reason = str(error)
    logger.warning("%s is computed again and replaced: %s", path, reason)
    return None


def _fits(sigma: Tensor, side: Tensor, shape: tuple[int, int]) -> bool:
    """Whether these can be the spectrum of a W [out, in]: fp64 of its sizes, finite, σ descending and not below 0."""
    least = min(shape)
    formed = sigma.shape == (least,) and side.shape == (least, least) and sigma.dtype == side.dtype == torch.float64
    return formed and bool(
        side.isfinite().all() and sigma.isfinite().all() and (sigma.diff() <= 0).all() and (sigma >= 0).all()
    )


def save(path: Path, key: str, found: change_rates.Spectrum) -> None:
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


def _through(folder: Path, w_oi: Tensor) -> tuple[change_rates.Spectrum, str]:
    key = weight_key(w_oi)
    path = folder / f"{key}.safetensors"
    if (kept := load(path, key, (w_oi.shape[0], w_oi.shape[1]))) is not None:
        there = change_rates.Spectrum(kept.sigma.to(w_oi.device), kept.side.to(w_oi.device), kept.tall)
        return there, "read from the cache"
    found = change_rates.spectrum(w_oi)
    save(path, key, found)
    return found, "decomposed and kept"


def _checksum(sigma: Tensor, side: Tensor) -> str:
    found = hashlib.sha256(_bytes(sigma))
    found.update(_bytes(side))
    return found.hexdigest()


def _bytes(t: Tensor) -> memoryview:
    return t.detach().cpu().contiguous().view(torch.uint8).numpy().data


FAR = 0.7
"""‖W in memory − W in the file‖ / ‖W in the file‖ above which the file is of another model; four bits leave about 0.1."""


class Checkpoint:
    """The weights in the safetensors files of a folder.

    Raises:
        ModelError: no such folder, no safetensors files in it, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        check_regular(self.folder, ModelError)
        files = sorted(p for p in self.folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
        if not files:
            raise ModelError(f"{folder} has no model weights: give a folder with the *.safetensors files of a model.")
        self.where: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    self.where.update(dict.fromkeys(file.keys(), path))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read: {error}.") from None

    def key(self, module: str) -> str:
        """The name of the weight of `module` in the files, which may lack or add the name of the whole model in front.

        Raises:
            ModelError: no weight of that name, or several.
        """
        wanted = f"{module}.weight"
        if wanted in self.where:
            return wanted
        near = [key for key in self.where if wanted.endswith(f".{key}") or key.endswith(f".{wanted}")]
        if len(near) != 1:
            found = f"several ({', '.join(sorted(near)[:3])})" if near else "none"
            raise ModelError(
                f"{self.folder} should have one weight for {module}, but has {found}: give the folder of this very "
                "model, not quantised."
            )
        return near[0]

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of the weight of `module` as it is stored; nothing but the file's header is read."""
        key = self.key(module)
        with safe_open(self.where[key], "pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def read(self, module: str) -> Tensor:
        """The weight of `module` as it is stored, on the CPU."""
        key = self.key(module)
        with safe_open(self.where[key], "pt") as file:
            return cast(Tensor, file.get_tensor(key))


@dataclass(frozen=True)
class OriginalWeight:
    """Reads W [out, in] of one adapted module from a checkpoint, on the device of the module.

    Raises:
        ModelError: the checkpoint has no such matrix.
    """

    layer: WeftLinear
    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        base = self.layer.get_base_layer()
        as_stored = isinstance(base, Conv1D) or self.layer.reading is not None
        wanted = tuple(cast(Tensor, base.weight).shape) if as_stored else (base.out_features, base.in_features)
        found = self.checkpoint.shape(self.layer.module_name)
        if found != wanted and not (is_quantised(base) and found == wanted[::-1]):
            raise ModelError(
                f"{self.layer.module_name} is {list(found)} in {self.checkpoint.folder} and {list(wanted)} in the model: give "
                "the checkpoint that this base was made from."
            )

    def __call__(self) -> Tensor:
        """W [out, in] in the checkpoint's dtype.

        Raises:
            ModelError: it is not near the W in memory, so it is another model's.
        """
        base = self.layer.get_base_layer()
        stored = self.checkpoint.read(self.layer.module_name)
        if self.layer.reading is None and is_quantised(base):
            # by what the layer computes; a quantised layer in a Conv1D's place is [out, in], and the checkpoint is not
            near = [(distance(base, w), w) for w in (stored, stored.T)]
            far, w = min(near, key=lambda each: each[0])
            w = w.to(next(chain(base.parameters(), base.buffers())).device)  # GPTQ keeps buffers alone
        else:
            here = self.layer.base_matrix()
            stored = stored.to(here.device)
            w = stored.T if isinstance(base, Conv1D) else stored
            w = w if self.layer.reading is None else self.layer.reading.matrix(stored)
            far = float(torch.dist(w.float(), here.float()) / w.float().norm())
        if not far < FAR:
            raise ModelError(
                f"{self.layer.module_name} in {self.checkpoint.folder} differs from the weight in memory by {far:.0%}: give the "
                "checkpoint that this base was made from."
            )
        return w
