"""What docs/performance.md says of training on a real model is what bench/real.json has."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_figures_of_the_page_are_those_of_the_record() -> None:
    found = json.loads((ROOT / "bench" / "real.json").read_text(encoding="utf-8"))
    page = re.sub(r"\s+", " ", (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    stock, ours = found["cases"]["stock"], found["cases"]["weftlora"]
    assert f"Medians of {len(stock['all'])} rounds of 5 steps" in page
    assert f"| `stock` | {stock['tokens_per_s']:.0f} | 1 | {stock['peak_rss'] / 2**30:.2f} GiB | 1 |" in page
    ratios = [
        f"{ours[f'{key}_ratio']:.2f} [{ours[f'{key}_range'][0]:.2f}, {ours[f'{key}_range'][1]:.2f}]"
        for key in ("tokens_per_s", "peak_rss")
    ]
    tokens, memory = f"{ours['tokens_per_s']:.0f}", f"{ours['peak_rss'] / 2**30:.2f} GiB"
    assert f"| `weftlora train lora` | {tokens} | {ratios[0]} | {memory} | {ratios[1]} |" in page
    assert ours["tokens_per_s_ratio"] >= 1.15
    assert ours["peak_rss_ratio"] <= 0.65


def test_the_page_of_experts_has_the_numbers_of_its_record() -> None:
    record = json.loads((ROOT / "bench" / "experts.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "experts.md").read_text(encoding="utf-8")
    assert record["command"] in page
    for case in record["cases"][1:]:
        ratio, kept = case["ratio"], case["saved_bytes"] / 2**20
        told = f"| {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] | {kept:.1f} | {case['trained']:,} |"
        assert told in page, case["case"]["kind"]
