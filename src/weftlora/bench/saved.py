"""Bytes that a forward keeps for its backward: distinct storages seen by saved-tensor hooks, weights left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import Tensor


def saved_bytes(loss: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes of all storages that `loss()` saves for backward, each once, without those of `weights`.

    A storage counts in full even if only a view of it is saved, as it is kept alive in full. `backward` cannot be run.
    """
    own = {t.untyped_storage().data_ptr() for t in weights}
    seen: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given to a second one

    def pack(t: Tensor) -> None:  # returning t itself would tie tensor and graph into a cycle that is never freed
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, _no_backward):
        loss()
    return sum(storage.nbytes() for storage in seen.values())


def _no_backward(_: None) -> NoReturn:
    raise RuntimeError("a graph whose saved tensors were only counted has no backward")
