"""`make demo` runs to its table; with two steps, the table is all there is to see."""

from __future__ import annotations

import sys

import demo


def test_demo_measures_the_base_and_every_method(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--steps", "2", "--rows", "8"])
    demo.main()
    shown = capsys.readouterr().out
    for name in ("none", "LoRA", "HydraLoRA", "Tied-LoRA", "exact match"):
        assert name in shown
    for recipe in demo.METHODS:
        assert (tmp_path / recipe / "eval-test.json").is_file()
