"""What a buffer says, without waiting for its device every time it is asked.

State lives in buffers, so that it is saved and loaded with the adapter; reading one from a GPU waits for all that the GPU
was given to do. What was read is therefore remembered together with the tensor and the version of it that it was read from, and
read again where either has changed: by a load, a move, or anybody's in-place operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Remembered(Generic[T]):
    """Remembers what `look` found in one tensor. A copy starts without a memory: it has a tensor of its own to read."""

    def __init__(self, look: Callable[[Tensor], T]) -> None:
        self._look = look
        self._held: tuple[Tensor, int, T] | None = None

    def read(self, tensor: Tensor) -> T:
        """What `look` finds in `tensor`, from memory if nobody has touched it since."""
        held = self._held
        if held is None or tensor is not held[0] or tensor.is_inference() or tensor._version != held[1]:
            return self.keep(tensor, self._look(tensor))
        return held[2]

    def keep(self, tensor: Tensor, value: T) -> T:
        """Remember that `value` is what `tensor` says now."""
        version = (
            -1 if tensor.is_inference() else tensor._version
        )  # a tensor of inference mode does not count its changes
        self._held = tensor, version, value
        return value

    def __reduce__(self) -> tuple[type[Remembered[Any]], tuple[Callable[[Tensor], T]]]:
        return Remembered, (self._look,)
