"""Sharded by FSDP2 in two processes: they decide and end as one process does, and no weight is whole on both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import DTYPES, METHODS, decisions, largest_difference, run_script

pytestmark = pytest.mark.sharded


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What one process came to, then what each of the two did."""
    folder = tmp_path_factory.mktemp("world")
    run_script("worlds.py", "2", str(folder), "fsdp2", "--kinds", "fp64")
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


@pytest.mark.parametrize("name", ["lora_dash", "lora_tsd"])
def test_a_weight_is_whole_on_one_process_and_nowhere_else(name: str, world: list[dict[Any, Any]]) -> None:
    sent = [found[name, "fp64"]["sent"] for found in world[1:]]
    assert [sum(pair) for pair in zip(*sent, strict=True)] == [1] * 14
    assert [sum(mine) for mine in sent] == [7, 7]
    for found in world[1:]:
        assert found[name, "fp64"]["gathered"] < 32 * 32, "no base weight is gathered on all"
