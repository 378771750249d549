from __future__ import annotations

import json
import sys

import pytest

from weftlora.cli import output
from weftlora.cli import output as display
from weftlora.train import Tick


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_ends_within_two_seconds_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with display.watching(True, clock) as progress:
        for step in range(1, 10):
            clock.now += 0.2
            progress(Tick("train", step, 9, 1.0, 100.0))
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with display.watching(True, clock) as progress:
        for step in range(31):
            progress(Tick("train", step, 60, 1.25, 2000.0))
            clock.now += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train 2/60  loss 1.2500  2,000 tokens/s  58 s left"
    assert [line.split()[1] for line in lines] == ["2/60", "12/60", "22/60"]


def test_time_left_counts_from_where_a_resumed_run_began(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with display.watching(True, clock) as progress:
        for step in (50, 51, 52):
            progress(Tick("train", step, 60))
            clock.now += 1.0
    assert capsys.readouterr().err == "train 52/60  8 s left\n"


def test_time_left_is_what_the_call_itself_says_where_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with display.watching(True, clock) as progress:
        for step in (1, 2, 3):
            progress(Tick("train", step, 60, seconds_left=1234.0))
            clock.now += 1.0
    assert capsys.readouterr().err == "train 3/60  21 min left\n"


def test_on_a_terminal_a_bar_with_loss_speed_and_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    clock = Clock()
    with display.watching(True, clock) as progress:
        progress(Tick("train", 1, 9))
        clock.now += 3.0
        progress(Tick("train", 2, 9, 1.25, 2000.0))
    shown = capsys.readouterr().err
    for part in ("train", "2/9", "loss 1.2500", "2,000 tokens/s"):
        assert part in shown


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with display.watching(False, clock) as progress:
        clock.now += 60
        progress(Tick("train", 1, 9))
    assert capsys.readouterr() == ("", "")


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.show({"loss": float("nan"), "all": [float("inf"), 1.5]}, True, str)
    assert json.loads(capsys.readouterr().out) == {"loss": None, "all": [None, 1.5]}


def test_our_warnings_are_lines_and_those_of_others_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    with output.calling(as_json=False, quiet=False):
        warnings.warn_explicit("two\nlines", UserWarning, "x.py", 1, module="weftlora.data.loading", registry={})
        warnings.warn_explicit("not ours", UserWarning, "x.py", 1, module="transformers.trainer", registry={})
        sys.stdout.write("stray\n")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "weftlora: warning: two lines\nstray\n"
