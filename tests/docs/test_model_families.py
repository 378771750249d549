"""The scripts behind the tables of model families and of peft's documentation see what is wrong."""

from __future__ import annotations

import model_families
import peft_examples
import pytest

import weftlora
from weftlora.adapted.layer import WeftLinear


@pytest.mark.slow
def test_a_family_passes_every_check_and_a_wrong_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_families.built("gpt_neox", "GPTNeoXForCausalLM")
    assert sum(p.numel() for p in base.parameters()) < 60_000
    given = model_families.inputs_of(base, "causal")
    recipes = model_families.recipes(base)
    found = model_families.cell(base, given, recipes["lora"])
    assert [found[check] for check in model_families.CHECKS] == [True] * 6
    assert found["modules"] == 8
    assert "no exact export" in model_families.cell(base, given, recipes["hydralora"])["export"]
    moved = WeftLinear.forward
    monkeypatch.setattr(WeftLinear, "forward", lambda layer, x: moved(layer, x) + 0.1)
    assert "changes the model" in model_families.cell(base, given, recipes["lora"])["attach"]


def test_an_example_of_peft_runs_with_one_line_changed() -> None:
    changed = peft_examples.changed()
    assert changed["LoraConfig"] is weftlora.WeftConfig
    assert peft_examples.ran("ranks_and_layers")["outcome"] == changed["ran"]("ranks_and_layers")["outcome"] == "runs"
