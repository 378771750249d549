"""JSON of strangers fails in one way only."""

from __future__ import annotations

import json
import math

import pytest

from weftlora.foreign_json import from_json


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000, "", "nul", "[1,]"])
def test_what_is_no_json_or_nested_too_deep_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_json(text)


def test_all_else_is_what_json_says_but_for_numbers_beyond_64_bits() -> None:
    plain = {"a": [1, -(2**53), 1.5, None, True, "x"], "b": {"c": 123456789012345678}}
    assert from_json(json.dumps(plain)) == plain
    huge = from_json("[12345678901234567890, " + "9" * 400 + "]")
    assert huge == [12345678901234567890.0, math.inf]
    assert [type(number) for number in huge] == [float, float]
