"""Training on two processes over gloo: `two_processes.py FOLDER`, see `pairing`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from dashing import Net, batch, dash, init, loss_of, parameters, schedule, sites, steps, tensors
from pairing import run_pair
from torch.nn.parallel import DistributedDataParallel

import weftlora
from weftlora import change_rates
from weftlora.errors import WeftError

LAUNCH, END, ROWS = 3, 6, 8


class Three(Net):
    """Three linear modules, so that two processes have unequal shares."""

    def __init__(self) -> None:
        super().__init__()
        self.third = torch.nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(super().forward(x)))


def made(fields: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    given = {"target_modules": ["first", "second", "third"], **fields}
    return (dash if given.pop("dash", True) else init)(after=LAUNCH, net=Three, **given).to(dtype)


def train(model: torch.nn.Module, adapted: torch.nn.Module, rank: int, world: int, end: int = END) -> dict[str, Any]:
    """Steps that see the same 8 rows in all. The large ε keeps AdamW from blowing up the rounding of gradients near 0."""
    optimizer = torch.optim.AdamW(parameters(adapted), lr=1e-2, eps=1e-5)
    share = ROWS // world
    for step in range(end):
        optimizer.zero_grad()
        x = batch(step, ROWS)[rank * share : (rank + 1) * share]
        loss_of(model, x.to(next(adapted.parameters()).dtype)).backward()
        if step == LAUNCH and rank == 0:  # an evaluation on the main process only
            with torch.no_grad():
                adapted.eval()(batch(99).to(next(adapted.parameters()).dtype))
                adapted.train()
        optimizer.step()
        happened = schedule(adapted).events != [] and not schedule(adapted).pending()
        assert (steps(adapted), happened) == (step + 1, step + 1 >= LAUNCH)
    return tensors(adapted)


def counted() -> list[int]:
    calls: list[int] = []
    real = change_rates.spectrum
    change_rates.spectrum = lambda w, *a: (calls.append(w.shape[0]), real(w, *a))[1]  # type: ignore[assignment]
    return calls


CASES = {
    "plain": {},
    "tied": {"structure": weftlora.Tied(group="shape")},
    "hydra": {"structure": weftlora.Hydra(heads=3)},
    "freeze": {"pair": "freeze"},
    "drop": {"pair": "drop"},
    "init": {"dash": False},
    "tsd": {"start": weftlora.Directions(after=LAUNCH)},
}
DTYPES = {"fp32": (torch.float32, 1e-5), "fp64": (torch.float64, 1e-9)}


def worker(rank: int) -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    calls, out = counted(), {}
    for name, fields in CASES.items():
        for kind, (dtype, _) in DTYPES.items():
            calls.clear()
            adapted = made(fields, dtype)
            rests = "pair" in fields  # A and B have no gradient after the launch, which DDP has to be told
            model = DistributedDataParallel(adapted, find_unused_parameters=rests)
            trained = train(model, adapted, rank, 2)
            out[name, kind] = (trained, list(calls), [e["sites"] for e in schedule(adapted).events])
    out["odd"] = odd_cases(rank)
    return out


def odd_cases(rank: int) -> dict[str, Any]:
    """A site that did not move; values that are not finite; two adapters that launch in one step."""
    found: dict[str, Any] = {}
    adapted = made({}, torch.float32)
    sites(adapted)["second"].structure.B.requires_grad_(False)
    found["gap"] = train(DistributedDataParallel(adapted, find_unused_parameters=False), adapted, rank, 2)
    adapted = made({}, torch.float32)
    optimizer = torch.optim.SGD(parameters(adapted), lr=0.1)
    for p in parameters(adapted):
        p.grad = torch.ones_like(p)
    sites(adapted)["second"].structure.A.data[0, 0] = torch.nan  # the share of process 1
    try:
        for _ in range(LAUNCH):
            optimizer.step()
    except WeftError as error:
        found["error"] = str(error)
    adapted = made({}, torch.float32)
    adapted.add_adapter("other", adapted.peft_config["default"])
    adapted.base_model.set_adapter(["default", "other"])
    found["two"] = train(DistributedDataParallel(adapted, find_unused_parameters=False), adapted, rank, 2)
    return found


if __name__ == "__main__":
    run_pair(worker)
