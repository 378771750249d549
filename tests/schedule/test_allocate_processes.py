"""Two processes: the same scores, plan and masks as one process with the same rows; what goes wrong on one ends both."""

from __future__ import annotations

import pytest
import torch
from pairing import both_of
from two_allocating import CASES, brackets, run


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return both_of("two_allocating.py", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_both_hold_the_same_bytes_and_tell_the_same(name: str, both: list) -> None:
    one, other = (result[name] for result in both)
    assert one["events"] == other["events"]
    assert one["tensors"].keys() == other["tensors"].keys()
    for key, value in one["tensors"].items():
        assert torch.equal(value, other["tensors"][key]), key


@pytest.mark.parametrize("name", CASES)
def test_plan_and_weights_are_those_of_one_process(name: str, both: list) -> None:
    alone, two = run(CASES[name], 0, 1), both[0][name]
    for one, other in zip(alone["events"], two["events"], strict=True):
        assert [each[:2] for each in one["pruned"]] == [each[:2] for each in other["pruned"]]
        assert one["added"] == other["added"]
    assert alone["ranks"] == two["ranks"]
    for key, value in alone["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], value, rtol=0, atol=1e-6, msg=key)


def test_each_scores_its_share_and_the_scores_are_those_of_one(both: list) -> None:
    alone = brackets(0)
    for result in both:
        torch.testing.assert_close(result["brackets"]["brackets"], alone["brackets"], rtol=0, atol=1e-12)
    assert sum(n for result in both for n in result["brackets"]["mine"]) == alone["all"]
    assert all(result["brackets"]["mine"] == [alone["all"] // 2] for result in both)


def test_a_process_without_a_slot_to_score_waits_for_nobody(both: list) -> None:
    """Two modules of one slot, one of them in each process, or none at all: the run ended."""
    assert [e["slots"] for e in both[0]["one_slot"]["events"]] == [2]


def test_a_failure_on_one_process_ends_both(both: list) -> None:
    assert "failed on another process" in both[0]["odd"]["failed"]
    assert "ignored" in both[1]["odd"]["failed"]


def test_masks_that_differ_are_seen(both: list) -> None:
    for result in both:
        assert "rank masks differ between the processes" in result["odd"]["differ"]
