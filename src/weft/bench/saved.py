"""Bytes that a forward keeps for its backward: distinct storages seen by saved-tensor hooks, weights left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(loss: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes of all storages that `loss()` saves for backward, each once, without those of `weights`.

    A storage counts in full even if only a view of it is saved, as it is kept alive in full. `backward` is not run.
    """
    own = {t.untyped_storage().data_ptr() for t in weights}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph = loss()  # held until counted: a freed storage's address could be given to the next one
        total = sum(seen.values())
    del graph
    return total
