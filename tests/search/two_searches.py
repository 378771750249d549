"""Searches on two processes over gloo, see `pairing`: each writes α after every step, θ at the end, and what was selected."""

from __future__ import annotations

from typing import Any

import torch
from pairing import run_pair
from searching import adapted, make, planted, stack

import weft

CASES: dict[str, dict[str, Any]] = {
    "direct": {},
    "unrolled_fd": {"hypergrad": "unrolled_fd", "inner_steps": 2, "fd_step": 1e-4},
    "unrolled_exact": {"hypergrad": "unrolled_exact", "inner_steps": 2},
    "tied_tl6": {},
    "tied_AB": {},
}
STRUCTURES = {"tied_tl6": {"structure": weft.Tied()}, "tied_AB": {"structure": weft.Tied(train="tl5")}}


def searched(name: str, seed: int) -> tuple[list[list[float]], list[torch.Tensor], list[Any]]:
    """α after every step, θ at the end, and what was selected; `seed` is of the adapter's start."""
    settings = weft.Search(outer_batches=3, val_size=12, steps=5, alpha_lr=0.05, **CASES[name])
    model = adapted(stack(3), settings, seed, **STRUCTURES.get(name, {}))
    search = make(model, planted(stack(3), {1}, 40), accumulation=3, batch_size=2)
    blocks = list(search.run().blocks)
    return [row["alpha"] for row in search.history], [p.detach() for p in search.passes.params], blocks


def worker(rank: int) -> dict[str, Any]:
    return {name: searched(name, seed=1 + rank) for name in CASES}


if __name__ == "__main__":
    run_pair(worker)
