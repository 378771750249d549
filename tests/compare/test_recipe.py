"""A comparison's recipe: what it refuses, and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weftlora.compare.methods import contenders, drawn_blocks, seeded
from weftlora.compare.recipe import RATES, CompareRecipe
from weftlora.errors import ConfigError

PLAIN: dict[str, Any] = {"data": "demo", "methods": ["lora", "hydralora"], "out": "somewhere"}


def read(**more: Any) -> CompareRecipe:
    return CompareRecipe.read(PLAIN | more)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"metods": []}, "the comparison has no key 'metods': did you mean 'methods'"),
        ({"budget": {"equals": "steps"}}, "budget has no key 'equals': did you mean 'equal'"),
        ({"rates": {"value": [1e-3]}}, "rates has no key 'value': did you mean 'values'"),
        ({"train": {"stesp": 3}}, "train has no key 'stesp': did you mean 'steps'"),
        ({"rates": {"values": [1e-3, 0.0]}}, "which is not a learning rate"),
        ({"rates": {"values": [1e-3, 1e-3]}}, "names a rate twice"),
        ({"rates": {"values": [1e-3, 1.0000001e-3]}}, "names a rate twice"),
        ({"seeds": [2**32]}, "from 0 to"),
        ({"train": {"seed": 3}}, "give seeds instead"),
        ({"train": {"lr": 1e-3}, "rates": {"values": [1e-3]}}, "keep one of them"),
        ({"scale": "owm"}, "scale='owm' is not a scale"),
        ({"scale": 0}, "scale=0 is not a scale"),
        ({"seeds": 0}, "seeds=0: give how many"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"metric": "los"}, "metric"),
        ({"metric": "bleu", "answers": False}, "answers=false generates none"),
        ({"methods": []}, "methods"),
        ({"train": {"freeze_down": True}}, "freeze_down trains fewer parameters than the budget gives"),
        (
            {"methods": ["lora", "peft:lora"], "train": {"lora_plus_ratio": 16.0}},
            "16 is for weftlora's methods, and peft:lora",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(given: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        read(**given)


@pytest.mark.parametrize("key", ["data", "methods", "out"])
def test_what_is_missing_is_named(key: str):
    with pytest.raises(ConfigError, match=f"the comparison has no '{key}'"):
        CompareRecipe.read({name: value for name, value in PLAIN.items() if name != key})


def test_a_file_may_use_shorthands_and_overrides(tmp_path: Path):
    file = tmp_path / "compare.yaml"
    file.write_text("model: demo\ndata: demo\nmethods: [lora, none]\nseeds: 3\nout: x\n", encoding="utf-8")
    recipe = CompareRecipe.read(file, "budget.r=4", "data.test_limit=8", "rates.values=[1e-2, 1e-3]")
    assert (recipe.model.path, recipe.data.train, recipe.data.test_limit, recipe.budget.r) == ("demo", "demo", 8, 4)
    assert recipe.all_seeds == [0, 1, 2]
    assert recipe.all_rates == [1e-3, 1e-2]
    assert recipe.base_dir == tmp_path


def test_without_rates_or_a_rate_some_are_tried_and_with_one_it_is_used():
    assert read().all_rates == list(RATES)
    assert read(train={"lr": 0.5}).all_rates == [0.5]


def test_a_read_recipe_reads_the_same_again():
    recipe = read(train={"lr": 0.5}, seeds=[4, 7])
    assert CompareRecipe.read(recipe).model_dump() == recipe.model_dump()
    assert CompareRecipe.read(recipe).all_rates == [0.5]


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (["lora", "lora"], "'lora' and 'lora' would share a folder"),
        (
            [{"recipe": "lora", "name": "A b"}, {"recipe": "lora", "name": "a-b"}],
            "'A b' and 'a-b' would share a folder",
        ),
        (["hydralroa"], "did you mean 'hydralora'"),
        ([{"recipe": "lora", "heads": 3}], "adapter lora has no key 'heads', which is of hydralora: leave it out"),
        ([{"control": "random_layer"}], "did you mean 'random_layers'"),
        ([{"control": "random_layers", "layers": [0]}], "random_layers draws its blocks"),
        ([{"recipe": "hydralora", "structure": "tied"}], "chooses its own structure"),
        ([{"name": "nothing"}], "does not say what to train"),
        ([{"structure": "hydr"}], "did you mean 'hydra'"),
        ([{"recipe": "none", "r": 3}], "takes no fields"),
        ([{"recipe": "lora", "layers": "selection.json"}], "list the blocks"),
        ([{"control": "random_layers", "count": 0}], "cannot draw count=0"),
        ([{"control": "random_layers", "count": True}], "cannot draw count=True"),
        ([{"control": "random_layers", "recipe": "none"}], "recipe=none cannot be told which"),
        ([{"control": "random_layers", "recipe": "flexora"}], "recipe=flexora cannot be told which"),
        ([{"control": "random_layers", "recipe": "peft:lora"}], "recipe=peft:lora cannot be told which"),
        ([{"recipe": "lora", "name": "two\nlines"}], "is not a name of a method"),
        ([{"recipe": "lora", "name": ""}], "is not a name of a method"),
        ([{"recipe": "lora", "name": ["x"]}], "is not a name of a method"),
        ([{"recipe": "lora", "name": 61 * "x"}], "is not a name of a method"),
    ],
)
def test_a_method_that_cannot_be_is_refused_in_a_sentence(methods: list[Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        contenders(methods)


def test_methods_are_called_by_recipe_and_axes_unless_they_have_a_name():
    found = contenders(
        [
            "peft:lora",
            {"recipe": "lora", "structure": "hydra", "boost": {"dash": {"after": 3}}},
            {"recipe": "lora", "name": "x"},
        ]
    )
    assert [each.name for each in found] == ["peft:lora", "lora + hydra + dash", "x"]
    assert [each.slug for each in found] == ["peft-lora", "lora-hydra-dash", "x"]


def test_names_in_any_script_have_folders_of_their_own():
    found = contenders([{"recipe": "lora", "name": name} for name in ("été", "日本", "中国", "a/../b", "../..")])
    assert [each.slug for each in found] == ["été", "日本", "中国", "a-..-b", "method"]


def test_axes_go_on_top_of_a_recipe_that_leaves_them_open():
    [found] = contenders([{"recipe": "lora_dash", "after": 7, "structure": "hydra", "lora_dropout": 0.1}])
    assert found.section["boost"]["after"] == 7
    assert found.section["structure"]["kind"] == "hydra"
    assert found.section["lora_dropout"] == 0.1
    assert "recipe" not in found.section


def test_random_moves_is_alora_that_scores_at_random():
    [found] = contenders([{"control": "random_moves", "max_rounds": 3}])
    assert found.section == {"recipe": "alora", "max_rounds": 3, "score": "random"}


def test_what_is_drawn_is_drawn_anew_for_every_seed_unless_it_is_told_otherwise():
    assert seeded({"recipe": "alora", "score": "random"}, 4)["seed"] == 4
    assert seeded({"recipe": "alora", "seed": 1}, 4)["seed"] == 1
    assert seeded({"boost": {"kind": "dash", "select": "random"}}, 4)["boost"]["seed"] == 4
    assert seeded({"recipe": "lora"}, 4) == {"recipe": "lora"}
    draws = [drawn_blocks(range(12), 6, seed) for seed in range(4)]
    assert len({tuple(draw) for draw in draws}) == 4
    assert all(draw == sorted(set(draw)) and len(draw) == 6 for draw in draws)
    assert draws[0] == drawn_blocks(range(12), 6, 0)
