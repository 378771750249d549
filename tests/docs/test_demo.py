"""`make demo` runs to its table; with a few steps, the table is all there is to see."""

from __future__ import annotations

import json
import sys

import demo
import pytest

from weft.compare.plan import make
from weft.compare.recipe import CompareRecipe
from weft.train.builtin import BUILTIN


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
    for words in ("loss, n = 1", "one seed: no verdict", "the frozen base", "Equal trained numbers", "The answer is"):
        assert words in shown
    found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert {outcome["status"] for outcome in found["outcomes"]} == {"complete"}


def test_every_method_of_the_demo_can_be_trained():
    planned = make(CompareRecipe.read(demo.recipe("nowhere", steps=100, rows=8)))
    gaps = [method.budget_gap for method in planned.methods if method.budget_gap is not None]
    assert len(gaps) == len(BUILTIN) - 1
    assert max(map(abs, gaps)) < 0.06
