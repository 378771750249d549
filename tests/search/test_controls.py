"""The selections without a search that a result is held against."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from searching import searched

from weftlora.search import Candidate, Selection


def test_controls_have_the_size_of_the_selection_and_are_seeded():
    _, selection = searched()
    found = selection.controls(draws=3, seed=1)
    assert list(found) == ["all", "random 1", "random 2", "random 3", "first", "last", "gradient norm"]
    assert found["all"].blocks == (0, 1, 2, 3)
    assert {len(only.blocks) for name, only in found.items() if name != "all"} == {2}
    assert (found["first"].blocks, found["last"].blocks) == ((0, 1), (2, 3))
    assert found == selection.controls(draws=3, seed=1)
    assert all(c.gradient_norm > 0 for c in selection.candidates)


def of_size(n: int, chosen: set[int]) -> Selection:
    """A selection of these groups out of n, made by hand."""
    groups = [Candidate(f"b.{i}", i, (f"b.{i}.up",), 0.0, 1.0, 0.0, i in chosen, False, False, i) for i in range(n)]
    return Selection(tuple(groups), "block", {}, {}, {})


@pytest.mark.parametrize(("n", "chosen"), [(4, {0}), (4, {1, 2}), (3, {0, 2}), (6, {5, 1, 3}), (8, set(range(7)))])
def test_random_controls_differ_from_the_selection_and_from_each_other_as_far_as_there_are_enough(n: int, chosen: set):
    selection = of_size(n, chosen)
    others = {c for c in combinations(range(n), len(chosen)) if set(c) != chosen}
    assert selection.others == len(others)
    for seed in range(20):
        for draws in (1, 3, 5):
            found = selection.controls(draws, seed)
            drawn = [only.blocks for name, only in found.items() if name.startswith("random")]
            assert len(drawn) == len(set(drawn)) == min(draws, len(others))
            assert set(drawn) <= others
            assert found == selection.controls(draws, seed)


def test_the_gradient_norm_control_takes_the_largest():
    assert of_size(5, {0, 1}).controls()["gradient norm"].blocks == (3, 4)


def test_fewer_draws_are_the_first_of_more_and_every_other_selection_is_as_likely():
    selection = of_size(5, {0, 1})
    names = ["random 1", "random 2"]
    for seed in range(5):
        few, many = selection.controls(2, seed), selection.controls(6, seed)
        assert [few[name] for name in names] == [many[name] for name in names]
    seen = Counter(selection.controls(1, seed)["random 1"].blocks for seed in range(900))
    assert len(seen) == 9
    assert max(seen.values()) < 2 * min(seen.values())
