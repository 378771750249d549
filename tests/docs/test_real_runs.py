"""docs/real-runs.md is what the committed evidence says, and that evidence is complete."""

from __future__ import annotations

import json
from pathlib import Path

import alora_runs
import dash_runs
import flexora_runs
import layer_cost
import pytest
import real_runs
import search_accuracy

ROOT = Path(__file__).parents[2]
RANKS = {"a.0.q": 6, "a.1.q": 0, "b": 4}


def test_the_page_is_a_function_of_the_evidence() -> None:
    results = json.loads((ROOT / "evidence" / "real-runs.json").read_text())
    assert (ROOT / "docs" / "real-runs.md").read_text() == real_runs.report(results)


def test_every_dash_cell_has_five_paired_seeds() -> None:
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


def test_every_moving_or_starting_variant_has_five_paired_seeds_and_shares_its_rate() -> None:
    saved = json.loads(alora_runs.RESULTS.read_text())
    assert [task["task"] for task in saved["tasks"]] == list(alora_runs.TASKS)
    for task in saved["tasks"]:
        cells: dict[str, list[int]] = {}
        rates: dict[str, set[float]] = {}
        for run in task["runs"]:
            cells.setdefault(run["variant"], []).append(run["seed"])
            rates.setdefault(alora_runs.tuned_with(run["variant"]), set()).add(run["lr"])
        left_out = alora_runs.LEFT_OUT.get(task["task"], ())
        assert cells == {v: list(range(5)) for v in alora_runs.VARIANTS if v not in left_out}
        assert all(len(each) == 1 for each in rates.values())


def test_moving_ranks_stay_on_the_budget_of_lora() -> None:
    for task in json.loads(alora_runs.RESULTS.read_text())["tasks"]:
        for run in task["runs"]:
            if run["variant"] in (*alora_runs.MOVING, "adalora"):
                assert sum(run["ranks"].values()) == alora_runs.RANK * len(run["ranks"]), run["variant"]
            if run["variant"] in alora_runs.MOVING:
                assert len(run["rounds"]) == 8


@pytest.mark.parametrize("variant", alora_runs.VARIANTS)
def test_a_moving_or_starting_variant_is_a_config_that_works(variant: str) -> None:
    from weftlora.runs.adapter import adapter_config

    config = adapter_config(alora_runs.adapter("demo", variant, seed=3, ranks=RANKS), total_steps=100)
    assert config is not None
    assert config.r == 4 or variant == "adalora"
    if variant == "final":
        assert config.rank_pattern == {"a\\.0\\.q": 6}
        assert config.alpha_pattern == {"a\\.0\\.q": 12}  # the scale α/r of every module stays 2
        assert set(config.exclude_modules) == {"a.1.q"}


@pytest.mark.parametrize("variant", [*dash_runs.LINEAR, *dash_runs.ROUTED])
def test_a_variant_is_a_config_that_works(variant: str) -> None:
    from weftlora.runs.adapter import adapter_config

    config = adapter_config(dash_runs.adapter(variant, 4, seed=3))
    assert config is not None
    assert (config.r, config.lora_alpha) == (4, 8)
    assert (config.boost is None) == (variant in ("lora", "hydra"))


def test_every_selection_and_control_of_flexora_has_five_paired_seeds() -> None:
    saved = json.loads(flexora_runs.RESULTS.read_text())
    assert [task["task"] for task in saved["tasks"]] == list(flexora_runs.TASKS)
    for task in saved["tasks"]:
        cells: dict[tuple[str, str], list[int]] = {}
        for run in task["runs"]:
            cells.setdefault((run["kind"], run["variant"]), []).append(run["seed"])
        kinds = flexora_runs.KINDS[task["task"]]
        assert cells == {(k, v): list(range(5)) for k in kinds for v in flexora_runs.VARIANTS}
        assert len({run["lr"] for run in task["runs"]}) == 1
        size = {(s["kind"], s["seed"]): len(s["layers"]["flexora"]) for s in task["searches"]}
        for run in task["runs"]:
            if run["variant"] not in ("all", "longer"):
                assert len(run["layers"]) == size[run["kind"], run["seed"]], run["variant"]


@pytest.mark.parametrize("kind", flexora_runs.SEARCHES)
def test_a_search_of_the_evidence_and_what_it_selects_are_configs_that_work(kind: str) -> None:
    from weftlora.runs.adapter import adapter_config

    granularity, share = flexora_runs.SEARCHES[kind]
    config = adapter_config(flexora_runs.SearchJob("demo", kind, 0.01, 3, "").recipe()["adapter"])
    assert config is not None
    assert (config.r, config.lora_alpha) == (4, 8)
    assert (config.layers.granularity, config.layers.inner_lr) == (granularity, share * 0.01)
    chosen = adapter_config(flexora_runs.job("demo", [0, 2], 0.01, 3, "runs").recipe["adapter"])
    assert chosen is not None
    assert (chosen.r, chosen.lora_alpha, chosen.layers.blocks) == (4, 8, (0, 2))


def test_longer_pays_the_search_in_steps_and_the_same_layers_are_one_run() -> None:
    spec = flexora_runs.TASKS["demo"]
    found = {"cost_in_steps": 60.0, "layers": {"flexora": [0], "all": [0, 1], "first": [0]}}
    assert flexora_runs.length(spec, found, "longer") == spec["train"]["steps"] + 60
    outs = {
        v: flexora_runs.job("demo", flexora_runs.layers_of(found, v), 0.01, 0, "r").out for v in ("flexora", "first")
    }
    assert outs["flexora"] == outs["first"]
    assert flexora_runs.layers_of(found, "longer") == [0, 1]
    longer = flexora_runs.job("demo", [0, 1], 0.01, 0, "r", 160)
    assert longer.recipe["train"]["steps"] == 160
    assert longer.out != flexora_runs.job("demo", [0, 1], 0.01, 0, "r").out


def test_what_half_of_the_blocks_cost_is_on_flexoras_card_as_it_was_measured() -> None:
    saved = json.loads(layer_cost.RESULTS.read_text())
    card = (ROOT / "docs" / "methods" / "flexora.md").read_text()
    assert "\n".join(layer_cost.table(saved["cases"])) in card
    assert {len(case["seconds"]) for case in saved["cases"].values()} == {saved["rounds"]} == {9}


def test_the_tables_of_flexoras_card_are_the_committed_figures() -> None:
    lines = search_accuracy.tables(json.loads(search_accuracy.RESULTS.read_text()))
    card = (ROOT / "docs" / "methods" / "flexora.md").read_text().splitlines()
    assert [line for line in lines if line not in card] == []
