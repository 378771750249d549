"""The definition: for every slot two full forward passes, one with it off and one with it alone. Slow and plain.

    last-in   L(M∖i) − L(M)        first-in   L(∅) − L({i})

The other ways of this package are held against it. Slots of a boost (Dash) belong to the base: they stay on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from weftlora.site import Site

SlotId = tuple[int, int]


def brackets(sites: Sequence[Site], slots: Sequence[SlotId], loss: Callable[[], Tensor]) -> Tensor:
    """[slots, 2, rows] fp64.

    Args:
        slots: (number of the site, slot).
        loss: one forward pass; [rows] fp64, which sum to the loss.
    """
    whole = loss()
    with only(sites, []):
        base = loss()
    found = torch.zeros(len(slots), 2, len(whole), dtype=torch.float64)
    live = [(m, slot) for m, site in enumerate(sites) for slot in site.live()]
    for n, each in enumerate(slots):
        with only(sites, [other for other in live if other != each]):
            found[n, 0] = (loss() - whole).cpu()
        with only(sites, [each]):
            found[n, 1] = (base - loss()).cpu()
    return found


@contextmanager
def only(sites: Sequence[Site], slots: Sequence[SlotId]) -> Iterator[None]:
    """These slots and no others, for the length of the block."""
    before = [cast(Tensor, site.mask) for site in sites]
    try:
        for m, site in enumerate(sites):
            site.mask = torch.zeros_like(before[m])
            site.mask[[slot for module, slot in slots if module == m]] = 1
        yield
    finally:
        for site, mask in zip(sites, before, strict=True):
            site.mask = mask
