"""`weftlora bench step` from the shell's side."""

import json
import sys

import pytest

from weftlora.cli import main

QUICK = ["bench", "step", "--quick", "--dtype", "fp32", "--dropout", "0", "--only", "lora"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leave:
        main([*QUICK, *arguments])
    return int(leave.value.code or 0)


def test_json_and_file_hold_the_same_record(tmp_path, capsys: pytest.CaptureFixture[str]):
    assert run("--json", "--out", str(tmp_path / "step.json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "step.json").read_text())
    assert printed["exact"] is True
    assert {row["label"] for row in printed["cases"]} == {"floor", "lora r=8 p=0 fp32", "lora r=16 p=0 fp32"}


def test_the_table_names_cases_and_spread(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert run("-q") == 0
    shown = capsys.readouterr().out
    assert "lora r=16 p=0 fp32" in shown
    assert "1.000 [1.000, 1.000]" in shown


def test_what_is_not_exact_exits_with_1_and_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("weftlora.bench.rounds.TOLERANCE", {"fp32": -1.0})
    assert run("--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["exact"] is False
    assert "lora r=8 p=0 fp32 on a fp32 base" in shown.err


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("weftlora.bench.step", None)  # calling it would fail
    assert run("--out", str(tmp_path / "missing" / "step.json")) == 1
    assert "missing" in capsys.readouterr().err


def test_a_wrong_word_is_one_sentence(capsys: pytest.CaptureFixture[str]):
    assert run("--only", "hydralor") == 1
    assert "did you mean 'hydralora'" in capsys.readouterr().err


def test_a_module_beside_the_user_is_found(
    tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "beside_me.py").write_text("def same(base, r, p):\n    return base\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run("--json", "--case", "same@4=beside_me:same") == 0
    row = json.loads(capsys.readouterr().out)["cases"][-1]
    assert row["label"] == "same r=4 p=0 fp32"
    assert row["saved_ratio"] == 1.0  # it is the floor
    assert row["exact"] is None
