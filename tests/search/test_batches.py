"""Splits that are disjoint in content, and an order that is a function of seed and position."""

from __future__ import annotations

import pytest
import torch

from weftlora.errors import DataError
from weftlora.search.batches import Cycle, digest, split, stack
from weftlora.terms.layers.search import Search


def rows(count: int, start: int = 0) -> list[dict]:
    return [{"input_ids": [i, i + 1], "labels": [i]} for i in range(start, start + count)]


def test_train_and_validation_are_disjoint_and_seeded():
    data, search = rows(50), Search(val_size=10)
    one = split(data, None, search, seed=3)
    assert set(one.train).isdisjoint(one.validation)
    assert sorted(one.train + one.validation) == list(range(50))
    assert one == split(data, None, search, seed=3)
    assert one != split(data, None, search, seed=4)


def test_copies_of_validation_rows_do_not_stay_in_the_training_part():
    data = rows(20) * 2
    found = split(data, None, Search(val_size=10), seed=0)
    held = {digest(data[i]) for i in found.validation}
    assert not [i for i in found.train if digest(data[i]) in held]
    assert found.repeated == 40 - 10 - len(found.train) > 0


def test_given_validation_rows_that_are_training_rows_are_refused():
    with pytest.raises(DataError, match="2 of the 20 training rows"):
        split(rows(20), rows(5, start=18), Search(), seed=0)


def test_at_most_max_search_samples_rows_are_used():
    found = split(rows(50), None, Search(val_size=5, max_search_samples=20), seed=0)
    assert (len(found.train), len(found.validation)) == (15, 5)


@pytest.mark.parametrize("count", [0, 200])
def test_too_few_rows_are_refused(count: int):
    with pytest.raises(DataError, match="val_size=200"):
        split(rows(count), None, Search(), seed=0)


def test_equal_rows_have_equal_digests_whatever_holds_their_numbers():
    assert digest({"x": torch.tensor([1, 2]), "y": 3}) == digest({"y": 3, "x": [1, 2]})
    assert digest({"x": [1, 2]}) != digest({"x": [1, 3]})


def test_a_cycle_is_a_function_of_its_position():
    whole, parts = Cycle(7, seed=1), Cycle(7, seed=1)
    taken = whole.take(20)
    assert sorted(taken[:7]) == sorted(taken[7:14]) == list(range(7))
    assert taken[:7] != taken[7:14]
    parts.take(9)
    later = Cycle(7, seed=1)
    later.position = parts.position
    assert later.take(11) == taken[9:]
    # A saved search has the position alone: with another order it would go on, in a later weftlora, over rows it has had.
    orders = [torch.randperm(7, generator=torch.Generator().manual_seed(1_000_003 + turn)) for turn in range(3)]
    assert taken == torch.cat(orders)[:20].tolist()


def test_rows_of_unequal_lengths_need_a_collate():
    with pytest.raises(DataError, match="give collate"):
        stack([{"x": [1]}, {"x": [1, 2]}])
