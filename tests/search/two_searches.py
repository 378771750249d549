"""Searches on two processes over gloo: `two_searches.py FOLDER` forks them after its imports and each writes RANK.pt."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist
from searching import adapted, make, planted, stack

import weft

CASES = {
    "direct": {},
    "unrolled_fd": {"hypergrad": "unrolled_fd", "inner_steps": 2, "fd_step": 1e-4},
    "unrolled_exact": {"hypergrad": "unrolled_exact", "inner_steps": 2},
    "tied_tl6": {},
    "tied_AB": {},
}
STRUCTURES = {"tied_tl6": {"structure": weft.Tied()}, "tied_AB": {"structure": weft.Tied(train="tl5")}}


def searched(name: str, seed: int) -> tuple[list[list[float]], list[torch.Tensor], list]:
    """α after every step, θ at the end, and what was selected; `seed` is of the adapter's start."""
    settings = weft.Search(outer_batches=3, val_size=12, steps=5, alpha_lr=0.05, **CASES[name])
    model = adapted(stack(3), settings, seed, **STRUCTURES.get(name, {}))
    search = make(model, planted(stack(3), {1}, 40), accumulation=3, batch_size=2)
    blocks = list(search.run().blocks)
    return [row["alpha"] for row in search.history], [p.detach() for p in search.passes.params], blocks


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save({name: searched(name, seed=1 + rank) for name in CASES}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: str) -> None:
    children = []
    for rank in (0, 1):
        if child := os.fork():
            children.append(child)
            continue
        try:
            worker(rank, folder)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
