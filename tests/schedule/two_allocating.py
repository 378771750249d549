"""ALoRA on two processes over gloo: `two_allocating.py FOLDER`, see `pairing`."""

from __future__ import annotations

from typing import Any

import torch
from allocating import TOKENS, adam, alora, bare, controller, events, random_factors, ranks, scorer
from dashing import sites, tensors
from pairing import run_pair
from torch.nn.parallel import DistributedDataParallel

import weftlora
from weftlora.errors import WeftError
from weftlora.schedule import rank_slots as surgery

END = 6
CASES: dict[str, dict[str, Any]] = {
    "exact": {},
    "hydra": {"structure": weftlora.Hydra(heads=2)},
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
    """The same model everywhere, some numbers of slots; how many of them this process scored."""
    model = alora().double()
    random_factors(model)
    slots = controller(model).scoring.live()
    mine: list[int] = []
    s = scorer(model)
    real = s.exact
    s.exact = lambda ids, draw, **more: (mine.append(len(ids)), real(ids, draw, **more))[1]  # type: ignore[method-assign]
    found = {count: controller(model).scoring.exact(slots[:count], "a") for count in COUNTS}
    return {"brackets": found, "mine": mine}


COUNTS = (28, 3, 1)
"""Slots to score: even shares of two processes, uneven ones, and one that is empty."""


def odd(rank: int) -> dict[str, Any]:
    """A process that cannot score; other rows; masks that differ before a round; masks that differ after it."""
    nothing = {"input_ids": TOKENS[0], "labels": torch.full_like(TOKENS[0], -100)}
    given = {
        "failed": ({}, [{"input_ids": TOKENS[0], "labels": TOKENS[0]} if rank == 0 else nothing]),
        "rows": ({}, [{"input_ids": TOKENS[rank], "labels": TOKENS[rank]}]),
        "differ": ({"score": "random"}, None),
        "after": ({"score": "random", "max_rounds": 1}, None),
    }
    found: dict[str, Any] = {}
    for name, (fields, held) in given.items():
        model = bare(first=1, **fields)
        if held is not None:
            weftlora.attach(model, validation=held)
        random_factors(model)
        last = list(sites(model).values())[-1]
        if name == "differ" and rank == 1:
            last.mask[0] = 0
        if name == "after" and rank == 1:
            _wake_all_slots(controller(model), last)
        optimizer = adam(model)
        try:
            model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss.backward()
            optimizer.step()
        except WeftError as error:
            found[name] = str(error)
        found[f"{name} told"] = len(events(model))
        found[f"{name} clipped"] = [reason for event in events(model) for reason in event["clipped"]]
    return found


def _wake_all_slots(its: Any, site: Any) -> None:
    """What is applied here is not what was decided."""
    real = its._apply
    its._apply = lambda *given: (real(*given), site.mask.fill_(1))


def without_a_slot(rank: int) -> dict[str, Any]:
    """A module at rank 0 in a wrapper that waits for the gradient of every parameter."""
    model = bare(max_rounds=0)
    first = next(iter(sites(model).values()))
    surgery.move(first, [0, 1], [], [], 1)
    wrapped, optimizer = DistributedDataParallel(model, find_unused_parameters=False), adam(model)
    for step in range(3):
        ids = TOKENS[4 * step : 4 * step + 4].chunk(2)[rank]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"tensors": tensors(model), "live": first.live()}


def decided(rank: int) -> list[str]:
    """The way of scoring that a process would come to by its own counts, and that it has after its first step."""
    model = bare(score="auto", max_rounds=1, move=1)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS[:4]]
    weftlora.attach(model, validation=rows, total_steps=8, tokens_per_step=(1e7, 1.0)[rank])
    alone = controller(model).choice.score
    model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss.backward()
    adam(model).step()
    return [alone, controller(model).choice.score, model.peft_config["default"].ranks.score]


def worker(rank: int) -> dict[str, Any]:
    out: dict[str, Any] = {name: run(fields, rank, 2) for name, fields in CASES.items()}
    return {**out, "brackets": brackets(rank), "odd": odd(rank), "rank 0": without_a_slot(rank), "way": decided(rank)}


if __name__ == "__main__":
    run_pair(worker)
