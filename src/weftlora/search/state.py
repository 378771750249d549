"""The state of a search between two of its outer steps: what the next one depends on, as tensors and plain values.

Random states are those of every process, because each draws its own dropout; everything else is the same on all.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from weftlora.errors import RunError
from weftlora.schedule import together
from weftlora.search.passes import Random

if TYPE_CHECKING:
    from weftlora.search.driver import LayerSearch


def taken(search: LayerSearch) -> dict[str, Any]:
    """The state; all processes call it together and get the same."""
    return {
        "alpha": search.alpha.detach().clone(),
        "alpha_optimizer": search.alpha_optimizer.state_dict(),
        "theta": {name: p.detach().clone() for name, p in search.named.items()},
        "inner": search.loop.state_dict(),
        "positions": {name: cycle.position for name, cycle in search.cycles.items()},
        "splits": _splits(search),
        "random": _random(search),
        "norms": search.norms.clone(),
        "done": search.done,
        "skipped": search.skipped,
        "unlabelled": search.unlabelled,
        "last_move": search.last_move,
        "seconds": search.seconds,
        "history": [dict(row) for row in search.history],
    }


def restore(search: LayerSearch, state: dict[str, Any]) -> None:
    """Continue from `taken`.

    Raises:
        RunError: it is of another model or other rows.
    """
    if state["theta"].keys() != search.named.keys() or len(state["alpha"]) != len(search.alpha):
        raise RunError("the saved search is of another adapter: resume it with the config that it was started with.")
    if state["splits"] != _splits(search):
        raise RunError(
            "the rows or the seed of the search have changed since it was saved: resume it on the same rows."
        )
    with torch.no_grad():
        search.alpha.copy_(state["alpha"])
        for name, p in search.named.items():
            p.copy_(state["theta"][name])
    search.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
    search.loop.load_state_dict(state["inner"])
    for name, cycle in search.cycles.items():
        cycle.position = state["positions"][name]
    search.norms = state["norms"].clone()
    for name in ("done", "skipped", "unlabelled", "last_move", "seconds"):
        setattr(search, name, state[name])
    search.history = [dict(row) for row in state["history"]]
    search.gates.write(search.search.gates(search.alpha.detach()))
    if len(state["random"]) == together.world():
        mine = state["random"][together.rank()]
        Random(mine["cpu"], mine["cuda"]).set()
    else:
        warnings.warn(
            f"the search was saved by {len(state['random'])} processes and goes on in {together.world()}: its rows are the same, "
            "its dropout is drawn anew.",
            stacklevel=3,
        )


def _splits(search: LayerSearch) -> dict[str, list[int]]:
    return {name: list(getattr(search.splits, name)) for name in ("train", "validation")}


def _random(search: LayerSearch) -> list[dict[str, Any]]:
    now, device = Random.now(), search.passes.device
    cpu, cuda = together.gathered(now.cpu, device), [together.gathered(state, device) for state in now.cuda]
    return [{"cpu": mine, "cuda": [each[rank] for each in cuda]} for rank, mine in enumerate(cpu)]
