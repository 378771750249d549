"""ALoRA on two processes over gloo: `two_allocating.py FOLDER`, see `pairing`."""

from __future__ import annotations

from typing import Any

import torch
from allocating import TOKENS, adam, alora, bare, controller, events, random_factors, ranks, scorer
from dashing import sites, tensors
from pairing import run_pair
from torch.nn.parallel import DistributedDataParallel

import weft
from weft.errors import WeftError

END = 6
CASES: dict[str, dict[str, Any]] = {
    "exact": {},
    "hydra": {"structure": weft.Hydra(heads=2)},
    "shortlist": {"score": "shortlist", "shortlist_factor": 2, "check": True},
    "random": {"score": "random"},
    "one_slot": {
        "target_modules": ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"],
        "r": 1,
        "move": 1,
        "max_rounds": 1,
    },
}


def run(fields: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """Steps that see the same 4 rows in all."""
    adapted = alora(**fields).double()
    model = DistributedDataParallel(adapted) if world > 1 else adapted
    optimizer = adam(adapted, eps=1e-5)
    for step in range(END):
        ids = TOKENS[4 * step : 4 * step + 4].chunk(world)[rank]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    told = [{k: v for k, v in e.items() if k != "seconds"} for e in events(adapted)]
    return {"tensors": tensors(adapted), "events": told, "ranks": ranks(adapted)}


def brackets(rank: int) -> dict[str, Any]:
    """The same model everywhere; how many slots this process scored."""
    model = alora().double()
    random_factors(model)
    slots, mine = controller(model)._live(), []
    s = scorer(model)
    real = s.exact
    s.exact = lambda ids, draw: (mine.append(len(ids)), real(ids, draw))[1]  # type: ignore[method-assign]
    return {"brackets": controller(model)._exact(slots, "a"), "mine": mine, "all": len(slots)}


def odd(rank: int) -> dict[str, Any]:
    """A process that cannot score; masks that differ."""
    found: dict[str, Any] = {}
    model = bare(first=1)
    held = [{"input_ids": TOKENS[0], "labels": TOKENS[0] if rank == 0 else torch.full_like(TOKENS[0], -100)}]
    weft.attach(model, validation=held)
    ids = TOKENS[:2]
    for name, prepare in {"failed": lambda m: m, "differ": _differ(rank)}.items():
        if name == "differ":
            model = prepare(bare(first=1, score="random"))
        optimizer = adam(model)
        try:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        except WeftError as error:
            found[name] = str(error)
    return found


def _differ(rank: int) -> Any:
    def made(model: Any) -> Any:
        if rank == 1:
            list(sites(model).values())[-1].mask[0] = 0
        return model

    return made


def worker(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {name: run(fields, rank, 2) for name, fields in CASES.items()}
    return {**out, "brackets": brackets(rank), "odd": odd(rank)}


if __name__ == "__main__":
    run_pair(worker)
