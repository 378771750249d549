"""`make demo` runs to its table; with a few steps, the table is all there is to see."""

from __future__ import annotations

import json
import subprocess
import sys

import demo
import pytest

from weftlora.compare.plan import make
from weftlora.compare.recipe import CompareRecipe
from weftlora.runs.recipe import BUILTIN


def test_demo_compares_every_recipe_and_says_that_one_seed_decides_nothing(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    kept = [method for method in demo.METHODS if method in ("lora", "peft:lora", "none")]
    assert {m if isinstance(m, str) else m["recipe"] for m in demo.METHODS} == set(BUILTIN)
    monkeypatch.setattr(demo, "METHODS", kept)
    out = tmp_path / "out"
    given = ["--out", str(out), "--steps", "2", "--rows", "8", "--jobs", "0", "--report", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", ["demo.py", *given])
    demo.main()
    shown = capsys.readouterr().out
    for words in (
        "loss, n = 1",
        "one seed: no verdict",
        "the frozen base",
        "Equal trainable parameters",
        "The answer is",
    ):
        assert words in shown
    found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert {outcome["status"] for outcome in found["outcomes"]} == {"complete"}


def test_a_folder_that_is_taken_is_a_sentence(tmp_path):
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, demo.__file__, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "demo: " in ended.stderr
    assert "holds other files, such as mine.txt" in ended.stderr


def test_every_method_of_the_demo_can_be_trained():
    planned = make(CompareRecipe.read(demo.recipe("nowhere", steps=100, rows=8)))
    gaps = [method.budget_gap for method in planned.methods if method.budget_gap is not None]
    assert len(gaps) == len(BUILTIN) - 1
    assert max(map(abs, gaps)) < 0.06
