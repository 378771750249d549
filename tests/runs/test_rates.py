from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from weftlora.runs.rates import ENCODER, rate


def settings(kind: str = "llama", width: int | None = 2000) -> Any:
    made = SimpleNamespace(model_type=kind, hidden_size=width)
    made.get_text_config = lambda: made
    return made


def test_the_published_formula_and_its_two_fits() -> None:
    assert rate("lora", settings(width=2000)).lr == 5e-4
    assert rate("lora", settings(width=4096)).lr == pytest.approx(5e-4 * (2000 / 4096) ** 0.781, rel=0.02)
    assert rate("lora", settings("qwen3", 4096)).lr == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775, rel=0.02)
    assert rate("lora", settings("gemma3", 4096)).lr == rate("lora", settings(width=4096)).lr


def test_a_wider_model_has_no_higher_rate_and_all_are_bounded() -> None:
    found = [rate("lora", settings(width=width)).lr for width in (2, 64, 576, 2048, 16384, 10**6)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (1e-2, 1e-4)


def test_encoders_and_methods_have_their_own() -> None:
    assert rate("lora", settings("bert", 384), encoder=True).lr == ENCODER
    tied = rate("tied_lora", settings())
    assert tied.lr == 1e-3
    assert "2 times LoRA's" in tied.why


def test_it_says_where_it_is_from() -> None:
    said = rate("lora", settings(width=576))
    assert said.why == "for lora at hidden size 576 (LoRA Without Regret)"
    assert rate(None, settings(width=None)).lr == 5e-4
