"""The number in a scalar buffer, without waiting for its device at every step.

State lives in buffers, so that it is saved and loaded with the adapter; reading one from a GPU waits for all that the GPU
was given to do. A value is therefore remembered together with the tensor and the version of it that it was read from, and
read again where either has changed: by a load, a move, or anybody's in-place operation.
"""

from __future__ import annotations

from torch import Tensor


class Known:
    """Remembers the value of one scalar tensor."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version = -1
        self._value = 0

    def read(self, tensor: Tensor) -> int:
        """The value of `tensor`, from memory if nobody has touched it since."""
        if tensor is not self._tensor or tensor.is_inference() or tensor._version != self._version:
            self.keep(tensor, int(tensor))
        return self._value

    def keep(self, tensor: Tensor, value: int) -> None:
        """Remember that `tensor` holds `value` now."""
        self._tensor, self._value = tensor, value
        self._version = -1 if tensor.is_inference() else tensor._version
