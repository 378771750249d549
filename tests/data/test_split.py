import pytest
from hypothesis import given
from hypothesis import strategies as st

from weftlora.data.loading import carve, sample
from weftlora.errors import DataError

KEYS = st.lists(st.sampled_from("abcdefghijkl"), min_size=2, max_size=40).filter(lambda keys: len(set(keys)) > 1)


@given(keys=KEYS, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 5), shuffle=st.randoms())
def test_every_row_is_on_one_side_and_copies_stay_together(keys, fraction, seed, shuffle):
    train, held = carve(keys, fraction, seed)
    assert sorted(train + held) == list(range(len(keys)))
    assert train
    assert held
    assert {keys[index] for index in train}.isdisjoint(keys[index] for index in held)
    shuffled = list(keys)
    shuffle.shuffle(shuffled)
    again = carve(shuffled, fraction, seed)[1]
    assert {shuffled[index] for index in again} == {keys[index] for index in held}


def test_the_split_has_the_size_asked_for_and_depends_on_the_seed():
    keys = [str(number) for number in range(200)]
    first, other = carve(keys, 0.1, 0), carve(keys, 0.1, 1)
    assert len(first[1]) == len(other[1]) == 20
    assert first[1] != other[1]
    assert first == carve(keys, 0.1, 0)


def test_the_split_is_the_same_in_every_process():
    assert carve(list("abcdefghij"), 0.3, 0)[1] == [2, 3, 5]  # the least SHA-256 of "0\0a" … "0\0j"


def test_a_large_group_does_not_swamp_the_validation_split():
    keys = ["same"] * 90 + [str(number) for number in range(10)]
    assert len(carve(keys, 0.1, 0)[1]) <= 10


def test_equal_rows_cannot_be_split():
    with pytest.raises(DataError, match="takes two that differ"):
        carve(["a", "a"], 0.5, 0)


def test_a_limit_draws_with_the_seed_and_keeps_the_order():
    drawn = sample(100, 10, 0)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn == sample(100, 10, 0) != sample(100, 10, 1)
    assert sample(3, None, 0) == sample(3, 5, 0) == [0, 1, 2]
