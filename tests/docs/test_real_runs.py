"""docs/real-runs.md is what the committed evidence says, and that evidence is complete."""

from __future__ import annotations

import json
from pathlib import Path

import dash_runs
import pytest
import real_runs

ROOT = Path(__file__).parents[2]


def test_the_page_is_a_function_of_the_evidence() -> None:
    results = json.loads((ROOT / "evidence" / "real-runs.json").read_text())
    assert (ROOT / "docs" / "real-runs.md").read_text() == real_runs.report(results)


def test_every_cell_has_five_paired_seeds() -> None:
    saved = json.loads(dash_runs.RESULTS.read_text())
    assert [task["task"] for task in saved["tasks"]] == list(dash_runs.KINDS)
    for task in saved["tasks"]:
        cells: dict[tuple[str, int], list[int]] = {}
        for run in task["runs"]:
            cells.setdefault((run["variant"], run["r"]), []).append(run["seed"])
        assert all(seeds == list(range(5)) for seeds in cells.values())
        assert len({run["lr"] for run in task["runs"] if run["variant"] in dash_runs.LINEAR}) <= 1
        if "linear" in dash_runs.KINDS[task["task"]]:
            assert {(v, r) for v in ("lora", "dash", "random", "top") for r in dash_runs.RANKS} <= cells.keys()


@pytest.mark.parametrize("variant", [*dash_runs.LINEAR, *dash_runs.ROUTED])
def test_a_variant_is_a_config_that_works(variant: str) -> None:
    from weft.train.adapter import adapter_config

    config = adapter_config(dash_runs.adapter(variant, 4, seed=3))
    assert config is not None
    assert (config.r, config.lora_alpha) == (4, 8)
    assert (config.boost is None) == (variant in ("lora", "hydra"))
