"""Sharded by FSDP2 in two processes: they decide and end as one process does, and no weight is whole on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import DTYPES, EVENT, METHODS, decisions, largest_difference, run_script

pytestmark = pytest.mark.sharded


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What one process came to, then what each of the two did."""
    folder = tmp_path_factory.mktemp("world")
    run_script("worlds.py", "2", str(folder), "fsdp2", "--kinds", "fp64", "--weigh")
    return [torch.load(folder / f"{name}.pt", weights_only=True) for name in ("alone", 0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_decide_and_end_as_one(name: str, world: list[dict[Any, Any]]) -> None:
    one, *two = (found[name, "fp64"] for found in world)
    for got in two:
        assert got["tensors"].keys() == one["tensors"].keys()
        assert decisions(got) == decisions(one)
        assert largest_difference(one, got) <= DTYPES["fp64"][1]
    for key, value in two[0]["tensors"].items():
        assert torch.equal(value, two[1]["tensors"][key]), key


LAUNCHES = {"lora_dash": 6, "lora_init": 4, "lora_tsd": 9}
"""Tensors of the adapter that are gathered per module: A, B and gains to rank by, and again for each launch."""
MODULES, WHOLE_W = 14, 48 * 32 * 8


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_sends_every_weight_to_one_process_and_nowhere_else(name: str, world: list[dict[Any, Any]]) -> None:
    each = [found[name, "fp64"] for found in world[1:]]
    assert [sum(pair) for pair in zip(*(found["sent"] for found in each), strict=True)] == [1] * MODULES
    assert [sum(found["sent"]) for found in each] == [MODULES // 2] * 2
    for found in each:
        assert found["gathered"] < 32 * 32, "no base weight is gathered on all"
        launch = found["steps"][EVENT - 1]
        assert launch["largest"] == WHOLE_W, "nothing larger than one W is made"
        assert launch["messages"] == {
            "all_gather_into_tensor": MODULES * LAUNCHES[name],
            "allgather": MODULES,  # where the parts of W are
            "send": MODULES // 2,
            "recv": MODULES // 2,
            "allreduce": MODULES // 2,  # whether the ranking of these two, one for each, failed anywhere
            "broadcast": MODULES * 6,  # the largest σ and how many are chosen; index, σ, rate, up and down of these
        }


def test_a_round_scores_every_row_on_one_process_and_gathers_no_weight(world: list[dict[Any, Any]]) -> None:
    one, other = (found["alora", "fp64"] for found in world[1:])
    assert one["scored"] == other["scored"] == [2, 2], "of the four rows of each round"
    assert [step["messages"] for step in one["steps"]] == [step["messages"] for step in other["steps"]]
    for found in (one, other):
        assert not found["sent"]
        assert found["gathered"] < 32 * 32, "only forwards gather the base, unit by unit"
        for step in (EVENT, EVENT + 2):
            messages = found["steps"][step - 1]["messages"]
            assert (messages["allreduce"], messages["broadcast"]) == (8, 6)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "flexora"])
def test_a_step_without_an_event_sends_nothing(name: str, world: list[dict[Any, Any]]) -> None:
    for found in (found[name, "fp64"] for found in world[1:]):
        events = {event["step"] for event in found["events"]}
        for number, step in enumerate(found["steps"], 1):
            if number not in events | {
                1
            }:  # at the first, all agree on the adapter, and what will be scored is looked at
                assert step["messages"] == {}
