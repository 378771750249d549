"""docs/real-runs.md is what the committed evidence says, and that evidence is complete."""

from __future__ import annotations

import json
from pathlib import Path

import alora_runs
import compared
import flexora_runs
import layer_cost
import pytest
import real_runs
import scoring_cost
import search_accuracy

from claims import SOURCES
from weftlora import WeftConfig
from weftlora.compare.methods import contenders
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Method, Outcome

ROOT = Path(__file__).parents[2]
RANKS = {"a.0.q": 6, "a.1.q": 0, "b": 4}


def test_the_page_is_a_function_of_the_evidence() -> None:
    assert (ROOT / "docs" / "real-runs.md").read_text() == real_runs.report()


@pytest.mark.parametrize("name", ["real-runs", "dash-runs", "alora-runs"])
def test_the_committed_runs_are_those_of_the_recipes(name: str) -> None:
    saved = compared.saved(name)
    files = SOURCES[name].recipes or {task: f"alora-{task}" for task in ("demo", "e2e", "sst2")}
    assert [task["task"] for task in saved["tasks"]] == list(files)
    for task in saved["tasks"]:
        recipe = CompareRecipe.read(compared.FOLDER / f"{files[task['task']]}.yaml")
        cells: dict[tuple[str, int], list[int]] = {}
        for run in task["runs"]:
            cells.setdefault((run.get("variant") or run["method"], run["r"]), []).append(run["seed"])
            if len(recipe.all_rates) > 1 or run.get("variant") in ("adalora", "final"):
                continue
            assert [run["lr"]] == recipe.all_rates, run
        assert all(seeds == recipe.all_seeds for seeds in cells.values())
        wanted = [each for each in contenders(recipe.methods) if not each.frozen]
        if name == "real-runs":  # the budget chooses their ranks
            assert {method for method, _ in cells} == {each.name for each in wanted}
            continue
        more = {("final", 4), ("adalora", 4)} if name == "alora-runs" else set()
        called = {(each.name.partition(", r = ")[0], each.section.get("r", recipe.budget.r)) for each in wanted}
        assert cells.keys() == called | more


def test_a_record_becomes_a_row_per_run() -> None:
    methods = [
        Method("dash, r = 2", {"recipe": "lora_dash", "r": 2}, rank=2, alpha=4, parameters=9, lr=0.1),
        Method("none", {"recipe": "none"}),
    ]
    figures = {"trained": 11.0, "train_seconds": 1.5}
    outcomes = [
        Outcome("dash, r = 2", 1, "a", "complete", {"loss": 2.0, "bleu": 3.0}, {"mill": {"loss": 2.5}}, figures),
        Outcome("dash, r = 2", 0, "b", "complete", {"loss": 1.0}, {}, figures),
        Outcome("dash, r = 2", 2, "c", "diverged"),
        Outcome("none", 0, "d", "complete", {"loss": 4.0}),
    ]
    record = {"metric": "loss", "methods": list(map(vars, methods)), "outcomes": list(map(vars, outcomes))}
    first, second = compared.rows(record)
    assert (first["variant"], first["r"], first["lr"], first["seed"], first["test"]) == ("dash", 2, 0.1, 0, 1.0)
    assert (second["trainable"], second["test_domains"]) == (11, {"mill": 2.5})
    assert compared.base_score(record) == 4.0


def test_moving_ranks_stay_on_the_budget_of_lora() -> None:
    for task in compared.saved("alora-runs")["tasks"]:
        for run in task["runs"]:
            if run["variant"] in (*alora_runs.MOVING, "adalora"):
                assert sum(run["ranks"].values()) == alora_runs.RANK * len(run["ranks"]), run["variant"]
            if run["variant"] in alora_runs.MOVING:
                assert len(run["rounds"]) == 8


def test_final_is_a_config_at_the_ranks_that_were_found() -> None:
    from weftlora.runs.adapter import adapter_config

    recipe = CompareRecipe.read(alora_runs.final_recipe("demo", 3, RANKS))
    (method,) = contenders(recipe.methods)
    config = adapter_config(method.sized(4, 8))
    assert isinstance(config, WeftConfig)
    assert (recipe.seeds, config.r) == ([3], 4)
    assert config.rank_pattern == {"a\\.0\\.q": 6}
    assert config.alpha_pattern == {"a\\.0\\.q": 12}  # the scale α/r of every module stays 2
    assert set(config.exclude_modules or ()) == {"a.1.q"}


def test_every_selection_and_control_of_flexora_has_five_paired_seeds() -> None:
    saved = compared.saved("flexora-runs")
    assert [task["task"] for task in saved["tasks"]] == list(flexora_runs.KINDS)
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
    config = adapter_config(flexora_runs.search_section("demo", kind, 3)["adapter"])
    assert config is not None
    assert (config.r, config.lora_alpha) == (4, 8)
    assert (config.layers.granularity, config.layers.inner_lr) == (granularity, share * 0.01)


def test_longer_pays_the_search_in_steps_and_the_same_layers_are_one_run() -> None:
    steps = compared.recipe("flexora-demo")["train"]["steps"]
    names = ("flexora", "all", "first", "last", "norm", *flexora_runs.RANDOM)
    layers = {key: [0] for key in names} | {"all": [0, 1], "last": [1]}
    found = {"kind": "block", "seed": 3, "cost_in_steps": 60.0, "layers": layers}
    assert flexora_runs.layers_of(found, "longer") == [0, 1]
    made = flexora_runs.comparisons("demo", [found, found | {"kind": "block-slow"}])
    assert list(made) == [steps, steps + 60]
    assert [each["layers"] for each in made[steps]["methods"]] == [[0, 1], [0], [1]]
    assert [each["layers"] for each in made[steps + 60]["methods"]] == [[0, 1]]
    for length, content in made.items():
        recipe = CompareRecipe.read(content)
        assert (recipe.train.steps, recipe.seeds) == (length, [3])
        assert [each.sized(4, 8)["r"] for each in contenders(recipe.methods)] == [4] * len(recipe.methods)


def test_what_half_of_the_blocks_cost_is_on_flexoras_card_as_it_was_measured() -> None:
    saved = json.loads(layer_cost.RESULTS.read_text())
    card = (ROOT / "docs" / "methods" / "flexora.md").read_text()
    assert "\n".join(layer_cost.table(saved["cases"])) in card
    assert {len(case["seconds"]) for case in saved["cases"].values()} == {saved["rounds"]} == {9}


def test_the_tables_of_flexoras_card_are_the_committed_figures() -> None:
    lines = search_accuracy.tables(json.loads(search_accuracy.RESULTS.read_text()))
    card = (ROOT / "docs" / "methods" / "flexora.md").read_text().splitlines()
    assert [line for line in lines if line not in card] == []


def test_what_scoring_costs_is_on_aloras_card_as_it_was_measured_and_within_its_bound() -> None:
    saved = json.loads(scoring_cost.RESULTS.read_text())
    card = (ROOT / "docs" / "methods" / "alora.md").read_text()
    assert "\n".join(scoring_cost.table(saved)) in card
    assert {case["slots"] for case in saved["cases"]} >= {112, 10752}
    assert all(case["share"] <= 0.1 for case in saved["cases"])
