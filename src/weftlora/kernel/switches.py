"""What the fast path may do, for the whole process: from the environment at the start, and within a `with` block.

WEFT_REFERENCE=1    every site computes the equation in einsums, after its base layer
WEFT_GROUPS=0       no node spans several linears that read one input
WEFT_MLP=0          no node spans a gated MLP
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Switches:
    """`reference`: the plain equation everywhere. `groups`, `mlp`: nodes that span several linears."""

    reference: bool = False
    groups: bool = True
    mlp: bool = True


_current = Switches(
    reference=os.environ.get("WEFT_REFERENCE") == "1",
    groups=os.environ.get("WEFT_GROUPS") != "0",
    mlp=os.environ.get("WEFT_MLP") != "0",
)


def current() -> Switches:
    """The switches as they are now. Under `torch.jit.trace` the reference, as its files hold no Python functions."""
    return replace(_current, reference=True) if torch._C._get_tracing_state() is not None else _current


@contextmanager
def switched(**to: bool) -> Iterator[None]:
    """Within the block the switches named have these values; nested blocks and errors leave what was before."""
    global _current
    before, _current = _current, replace(_current, **to)
    try:
        yield
    finally:
        _current = before


def use_reference(on: bool = True) -> AbstractContextManager[None]:
    """Within the block every site computes with `reference` (or, with False, with the fast path)."""
    return switched(reference=on)
