"""The committed timing of ALoRA's scores: what its card says, and the targets of its design."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_committed_scores_reach_their_targets() -> None:
    found = json.loads((ROOT / "bench" / "scores.json").read_text())
    card = (ROOT / "docs" / "methods" / "alora.md").read_text()
    assert found["model"]["layers"] == 12
    for name, target in found["targets"].items():
        rounds = [a / b for a, b in zip(found["seconds"]["loop"], found["seconds"][name], strict=True)]
        assert rounds == found["ratio"][name]
        assert len(rounds) == found["rounds"] >= 5
        assert statistics.median(rounds) >= target
        assert f"{statistics.median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})" in card
    assert found["same_cut"]
    assert found["error_fp32"] <= 1e-5
    assert found["error_fp64"] <= 1e-6
