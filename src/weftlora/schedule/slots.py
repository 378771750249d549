"""Taking rank slots of a site away and making new ones, with what optimisers keep about them.

    prune    A_i = 0, B_i = 0, their moments 0, mask 0           nothing of a dead slot moves again: its gradient is exactly 0
    make     A_i given, B_i = 0, mask 1                          the function stays what it is
             first moments 0; second moments the mean of the surviving slots' of the same tensor

With β = 0.9, 0.999 and the step count that all slots of a tensor share, a second moment of 0 would give a new slot first steps
of 2.5 to 4.6 times the learning rate; seeded, they are a tenth of it and grow to it. A site without survivors counts its steps
from 0 again, which is exact. What belongs to surviving slots is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weftlora.errors import ConfigError
from weftlora.schedule import clock
from weftlora.site import Site
from weftlora.terms.structure import SlotFirst

FIRST = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})
SECOND = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})


def by_slot(site: Site) -> list[tuple[nn.Parameter, SlotFirst]]:
    """The parameters that have a part per slot, A first, and how to see a tensor of their shape with the slots first (a view)."""
    return site.structure.by_slot()


def cost(site: Site) -> int:
    """How many trained numbers one slot of the site has."""
    return sum(view(p).numel() for p, view in by_slot(site)) // by_slot(site)[0][0].shape[0]


def silent(site: Site, slots: Sequence[int]) -> list[bool]:
    """Which of the slots contribute exactly nothing: B is 0, and no router reads them."""
    parts = [view(p.detach())[list(slots)].flatten(1) for p, view in by_slot(site)[1:]]
    return (torch.cat(parts, 1) == 0).all(1).tolist() if slots else []


def check_sliceable(sites: Sequence[Site]) -> None:
    """Raise `ConfigError`, naming the optimiser, if what it keeps about A or B is not known to lie slot by slot."""
    for site in sites:
        for parameter, _ in by_slot(site):
            for optimizer, name, value in _kept(parameter):
                if name not in FIRST | SECOND or type(value) is not Tensor or value.shape != parameter.shape:
                    raise ConfigError(
                        f"{type(optimizer).__name__} keeps {name!r} ({type(value).__name__} {list(value.shape)}) about a matrix "
                        f"{list(parameter.shape)}, which does not fall into rank slots, so slots cannot move: train with AdamW, "
                        "Adam or SGD (not an 8-bit or factored optimiser), or use ranks=Uniform()."
                    )


@torch.no_grad()
def move(site: Site, pruned: Sequence[int], made: Sequence[int], rows: Sequence[Tensor], birth: int) -> None:
    """Take slots away and make others, in this order.

    Args:
        rows: the new row of A [in] of each slot in `made`.
        birth: number of the round, kept for the new slots.
    """
    mask, births, score = (getattr(site, name) for name in ("mask", "birth", "score"))
    survivors = sorted(set(site.live()) - set(pruned))
    changed = [*pruned, *made]
    for parameter, view in by_slot(site):
        view(parameter)[changed] = 0
        if parameter.grad is not None:
            view(parameter.grad)[changed] = 0
        for optimizer, name, value in _kept(parameter):
            seed = view(value)[survivors].mean(0) if survivors and name in SECOND else 0
            view(value)[pruned] = 0
            view(value)[made] = seed
            if made and not survivors:
                _count_anew(optimizer.state[parameter])
    a = by_slot(site)[0][0]
    for slot, row in zip(made, rows, strict=True):
        a[slot] = row.to(a)
    for buffer, gone, new in ((mask, 0, 1), (births, 0, birth), (score, 0, 0)):
        buffer[pruned] = gone
        buffer[made] = new
    if site.start is not None:  # its frozen twins are of the slots that were
        site.start.clear(changed)


def _kept(parameter: nn.Parameter) -> Iterator[tuple[Optimizer, str, Tensor]]:
    """What optimisers keep about `parameter` that is more than one number."""
    for optimizer in clock.owners(parameter):
        if parameter in optimizer.state:
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    yield optimizer, name, value


def _count_anew(state: dict[str, Any]) -> None:
    if isinstance(step := state.get("step"), Tensor):
        step.zero_()
    elif step is not None:
        state["step"] = 0
    if isinstance(product := state.get("mu_product"), Tensor):  # NAdam's running product
        product.fill_(1)
