"""Two processes: the same scores, plan and masks as one process with the same rows; what goes wrong on one ends both."""

from __future__ import annotations

import pytest
import torch
from pairing import both_of
from two_allocating import CASES, COUNTS, brackets, run

pytestmark = pytest.mark.sharded


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
    """Even shares, uneven ones, and an empty one that waits for nobody."""
    alone = brackets(0)["brackets"]
    for result in both:
        for count in COUNTS:
            torch.testing.assert_close(result["brackets"]["brackets"][count], alone[count], rtol=0, atol=1e-12)
            assert torch.equal(result["brackets"]["brackets"][count], both[0]["brackets"]["brackets"][count])
    assert [result["brackets"]["mine"] for result in both] == [[14, 2, 1], [14, 1, 0]]


def test_a_process_without_a_slot_to_score_waits_for_nobody(both: list) -> None:
    """Two modules of one slot, one of them in each process, or none at all: the run ended."""
    assert [e["slots"] for e in both[0]["one_slot"]["events"]] == [2]


def test_a_module_without_slots_keeps_no_process_waiting(both: list) -> None:
    for result in both:
        assert result["rank 0"]["live"] == []
        for name, value in result["rank 0"]["tensors"].items():
            assert torch.equal(value, both[0]["rank 0"]["tensors"][name]), name


def test_the_way_of_scoring_is_the_main_processs(both: list) -> None:
    assert [result["way"] for result in both] == [
        ["exact (auto)"] * 3,
        ["taylor (auto)", "exact (auto)", "exact (auto)"],
    ]


def test_a_failure_on_one_process_ends_both(both: list) -> None:
    assert "failed on process 1: " in both[0]["odd"]["failed"]
    assert "ignored" in both[1]["odd"]["failed"]


def test_rows_that_differ_are_seen_before_slots_are_scored_on_them(both: list) -> None:
    for result in both:
        (reason,) = result["odd"]["rows clipped"]
        assert "the validation rows that rank slots are scored on differ between the processes" in reason
        assert "rows" not in result["odd"], "training is worth more than a round"


def test_masks_that_differ_are_seen_before_a_round(both: list) -> None:
    for result in both:
        assert "rank masks differ between the processes" in result["odd"]["differ"]
        assert result["odd"]["differ told"] == 0


def test_masks_that_differ_are_seen_right_after_the_decision(both: list) -> None:
    for result in both:
        assert "rank masks differ between the processes" in result["odd"]["after"]
        assert result["odd"]["after told"] == 0
