"""Searches on two processes over gloo, see `pairing`: each writes α after every step, θ at the end, and what was selected."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from pairing import run_pair
from searching import adapted, labelled_mse, make, mse, planted, stack, unlabelled

import weftlora
from weftlora.search.driver import LayerSearch

CASES: dict[str, dict[str, Any]] = {
    "direct": {},
    "unrolled_fd": {"hypergrad": "unrolled_fd", "inner_steps": 2, "fd_step": 1e-4},
    "unrolled_exact": {"hypergrad": "unrolled_exact", "inner_steps": 2},
    "tied_tl6": {},
    "tied_AB": {},
    "unlabelled": {},
}
STRUCTURES = {"tied_tl6": {"structure": weftlora.Tied()}, "tied_AB": {"structure": weftlora.Tied(train="tl5")}}


def searched(name: str, seed: int) -> tuple[list[list[float]], list[torch.Tensor], list[Any]]:
    """α after every step, θ at the end, and what was selected; `seed` is of the adapter's start."""
    settings = weftlora.Search(outer_batches=3, val_size=12, steps=5, alpha_lr=0.05, **CASES[name])
    model = adapted(stack(3), settings, seed, **STRUCTURES.get(name, {}))
    rows, loss = planted(stack(3), {1}, 40), mse
    if name == "unlabelled":  # some micro-batches of two rows, and some of a process's shares, have no label at all
        rows, loss = unlabelled(rows, [i for i in range(40) if i % 5 < 3]), labelled_mse
    search = make(model, rows, loss=loss, accumulation=3, batch_size=2)
    blocks = list(search.run().blocks)
    return [row["alpha"] for row in search.history], [p.detach() for p in search.passes.params], blocks


def identity(seed: int) -> LayerSearch:
    """A search whose θ and α are away from their starts, which validates on three micro-batches of two rows per step."""
    settings = weftlora.Search(outer_batches=3, val_size=12, steps=5)
    search = make(adapted(stack(3), settings, seed, moved=0.3), planted(stack(3), {1}, 40), batch_size=2)
    with torch.no_grad():
        search.alpha.copy_(torch.tensor([0.3, -0.5, 0.1]))
    search.gates.write(settings.gates(search.alpha.detach()))
    for site in search.gates.sites:
        site.awaits_search = False
    return search


def resumed(rank: int) -> dict[str, Any]:
    """α of a search with dropout, and of one that is saved after two steps and continued by processes in another state."""

    def fresh() -> LayerSearch:
        torch.manual_seed(50 + rank)
        search = weftlora.Search(outer_batches=3, val_size=12, steps=5, alpha_lr=0.05)
        model = adapted(stack(3), search, lora_dropout=0.3)
        found = make(model, planted(stack(3), {1}, 40), accumulation=4, batch_size=2)
        torch.manual_seed(100 + rank)
        return found

    path = f"{sys.argv[1]}/search.pt"
    whole, first = fresh(), fresh()
    whole.run()
    torch.manual_seed(100 + rank)
    first.step()
    first.step()
    first.save(path)
    dist.barrier()
    second = fresh()
    torch.manual_seed(7)
    second.load(path)
    second.run()
    return {name: [row["alpha"] for row in s.history] for name, s in (("whole", whole), ("resumed", second))}


def failing(rank: int) -> dict[str, Any]:
    """One process cannot compute a loss: what the error on each is."""
    model = adapted(stack(3), weftlora.Search(outer_batches=2, val_size=12, steps=2))
    found = make(model, planted(stack(3), {1}, 40), accumulation=2)

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if rank == 1:
            raise ValueError("no loss here")
        return mse(model, batch)

    found.passes._loss = loss
    try:
        found.step()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def worker(rank: int) -> dict[str, Any]:
    cases = {name: searched(name, seed=1 + rank) for name in CASES}
    first, passed = identity(seed=1 + rank), []
    first.passes._loss = lambda model, batch: (passed.append(1), mse(model, batch))[1]
    gradient = first.hypergradient()[1]
    apart = identity(seed=1)
    with torch.no_grad():
        apart.alpha.mul_(-1 if rank else 1)
    decided = list(apart.selection().blocks)
    return {
        **cases,
        "identity": gradient,
        "passed": len(passed),
        "decided": decided,
        "dropout": resumed(rank),
        "failing": failing(rank),
    }


if __name__ == "__main__":
    run_pair(worker)
