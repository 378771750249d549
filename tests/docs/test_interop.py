"""What docs/serving.md says of llama.cpp is what `make interop` found."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_counts_of_the_page_are_those_of_the_record() -> None:
    found = json.loads((ROOT / "evidence" / "interop.json").read_text(encoding="utf-8"))
    by_layout = {row["layout"]: row for row in found["results"]}
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    uniform, pattern = by_layout["uniform"], by_layout["pattern"]
    assert uniform["same_with"] == uniform["prompts"] == uniform["changed_by_adapter"]
    assert pattern["same_with"] < pattern["prompts"] == pattern["same_without"]
    assert (
        f"the same {uniform['tokens']} greedy tokens as transformers for {uniform['same_with']} of {uniform['prompts']}"
        in page
    )
    assert f"per-module ranks gave {pattern['same_with']} of {pattern['prompts']}" in page
    real = found["smollm2"]
    for what in ("dequantised", "quantised"):
        for how in ("with", "without"):
            assert f"{real[f'{what}_{how}_same']} of {real['prompts']}" in page
    assert real["dequantised_with_same"] == real["dequantised_without_same"] == real["prompts"]
    assert real["changed_by_adapter"] == real["prompts"]
    shares = [f"{100 * real[f'quantised_{how}_next_token']:.1f} %" for how in ("with", "without")]
    assert f"up to {real['tokens']} for each of {real['prompts']} questions" in page
    assert f"the same in {shares[0]} and {shares[1]} of the places" in page
    assert f"llama-cpp-python {found['versions']['llama-cpp-python']}" in page
