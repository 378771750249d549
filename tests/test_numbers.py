from __future__ import annotations

import math
from typing import Any

import pytest

from weftlora.numbers import is_number, is_whole


@pytest.mark.parametrize(
    ("value", "whole", "number"), [(3, True, True), (-1, True, True), (0.5, False, True), (math.inf, False, True)]
)
def test_numbers(value: Any, whole: bool, number: bool) -> None:
    assert (is_whole(value), is_number(value)) == (whole, number)


@pytest.mark.parametrize("value", [True, False, "3", None, [3]])
def test_what_is_no_number(value: Any) -> None:
    assert not is_whole(value)
    assert not is_number(value)


def test_the_least() -> None:
    assert is_whole(2, 2)
    assert not is_whole(1, 2)
