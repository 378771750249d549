"""Times: steps, fractions and epochs, and what is none."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import weftlora
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import ConfigError
from weftlora.settings import Epochs, check_time, is_number, is_whole, resolve, rounds


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


@pytest.mark.parametrize("time", [1, 100, 0.1, 0.999, Epochs(0.5), Epochs(3.0)])
def test_what_is_a_time(time) -> None:
    assert check_time(time, "here") == time


@pytest.mark.parametrize(
    "time", [0, -1, 1.0, 0.0, 1.5, 100.0, -0.1, True, False, None, "100", math.nan, math.inf, [1], {}, {"epoch": 1}]
)
def test_what_is_none_is_refused_with_the_place_and_the_ways_out(time) -> None:
    with pytest.raises(
        ConfigError, match=r"Dash\(after=...\): .* is not a time: use optimiser steps .*fraction.*epochs"
    ):
        weftlora.Dash(after=time)


@pytest.mark.parametrize("x", [0, -1, math.inf, math.nan, True, None, "1"])
def test_epochs_are_a_positive_number(x) -> None:
    with pytest.raises(ConfigError, match="not a time: use a positive number of passes"):
        weftlora.epochs(x)
    with pytest.raises(ConfigError):
        check_time({"epochs": x}, "here")


def test_what_a_time_means_in_steps() -> None:
    assert resolve(7, None, None) == 7
    assert resolve(0.25, None, 100) is None
    assert resolve(0.25, 100, None) == 25
    assert resolve(0.001, 100, None) == 1  # never before the first step
    assert resolve(0.25, 100, None, begins=60) == 70  # of the steps after it
    assert (resolve(7, 100, None, begins=60), resolve(weftlora.epochs(2), 100, 10, begins=60)) == (7, 20)
    assert rounds(0.5, 0.25, 2, 100, None, begins=60) == [80, 90]
    assert rounds(70, 0.25, 2, 100, None, begins=60) == [70, 80]
    assert resolve(weftlora.epochs(0.5), 1000, None) is None
    assert resolve(weftlora.epochs(0.5), None, 30) == 15
    assert resolve(weftlora.epochs(2), None, 12.5) == 25
    assert resolve(weftlora.epochs(0.001), None, 10) == 1


@pytest.mark.parametrize("time", [3, 0.25, weftlora.epochs(1.5)])
def test_a_time_survives_the_saved_form(time) -> None:
    config = weftlora.LoraDashConfig(after=time)
    saved = json.loads(json.dumps(config.to_dict()))
    assert WeftConfig(**saved).boost == weftlora.Dash(after=time)
