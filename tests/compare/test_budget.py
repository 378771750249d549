"""Equal trainable parameters: as many as the solver says, counted on models that were really made, and as near as a rank can come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparing import recipe
from peft import AdaLoraConfig
from tiny_bases import write_rows

from weftlora.compare.budget import nearest_rank
from weftlora.compare.plan import Plan, make
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.results import with_rate
from weftlora.errors import ConfigError
from weftlora.runs.adapter import adapter_config
from weftlora.runs.recipe import Recipe
from weftlora.terms.layers.search import Search
from weftlora.train.costs import trained_numbers
from weftlora.train.prepare import prepare

METHODS = [
    "lora",
    {"recipe": "hydralora", "heads": 2},
    "tied_lora",
    {"recipe": "lora_dash", "after": 2, "directions": 3},
    {"recipe": "lora_init", "after": 2},
    {"recipe": "lora_tsd", "after": 2, "directions": 3},
    {"recipe": "alora", "rows": 4},
    {"recipe": "flexora", "steps": 2, "val_size": 8, "outer_batches": 2},
    {"recipe": "lora", "structure": "hydra", "boost": {"dash": {"after": 2}}, "name": "hydra + dash"},
    "random_layers",
    "random_moves",
    "peft:lora",
    "peft:adalora",
]


@pytest.fixture(scope="module")
def plan(bases: Path) -> Plan:
    return planned(bases, methods=[*METHODS, "none"], budget={"equal": "parameters", "r": 8}, train={"steps": 40})


def planned(top: Path, base: str = "llama", **more: Any) -> Plan:
    return make(CompareRecipe.read(recipe(top, base, **more)))


def trained(plan: Plan, name: str) -> int:
    """Trainable parameters of a run as it is prepared, with values: of moving ranks those in use, of a search what it selects."""
    job = plan.reported(plan.of(name), 1e-3)[0]
    adapter = dict(job.recipe["adapter"])
    config: Any = adapter_config(adapter, 40)
    if isinstance(getattr(config, "layers", None), Search):
        adapter = {"recipe": "lora", "r": adapter["r"], "layers": list(range(config.layers.top_k))}
    if isinstance(config, AdaLoraConfig):
        adapter |= {"init_r": adapter["target_r"]}
    model: Any = prepare(Recipe.read(job.recipe | {"adapter": adapter, "out": "nowhere"})).model
    if adapter.get("recipe") != "alora":
        return trained_numbers(model)
    sites = [module for module in model.modules() if hasattr(module, "weft_site")]
    factors = [layer.site("default").factors() for layer in sites]
    return sum(f.A.numel() + f.B.numel() for f in factors)


@pytest.mark.parametrize("name", [m if isinstance(m, str) else m.get("name", m["recipe"]) for m in METHODS])
def test_a_method_has_as_many_trained_numbers_as_the_plan_says(plan: Plan, name: str):
    method = plan.of(name)
    assert method.parameters == trained(plan, name)
    assert method.budget_gap == pytest.approx(method.parameters / plan.budget - 1)
    assert method.alpha == 2 * method.rank


def test_no_other_rank_comes_nearer(plan: Plan):
    """Numbers are affine in the rank here, so one rank more or less is a step whose size two methods tell."""
    lora, hydra = plan.of("lora"), plan.of("hydralora")
    assert (lora.rank, lora.budget_gap) == (8, 0)
    model = Recipe.read(plan.reported(hydra, 1e-3)[0].recipe | {"out": "nowhere"})
    for other in (hydra.rank - 1, hydra.rank + 1):
        changed = model.model_copy(update={"adapter": model.adapter | {"r": other}})
        assert abs(trained_numbers(prepare(changed).model) - plan.budget) >= abs(hydra.parameters - plan.budget)


def test_the_frozen_base_has_no_rank_and_no_budget(plan: Plan):
    none = plan.of("none")
    assert (none.rank, none.parameters, none.budget_gap) == (None, 0, None)


def test_layers_are_drawn_and_selected_as_many(plan: Plan):
    """Of the two blocks of the tiny base one, at twice the rank."""
    assert plan.of("flexora").adapter["top_k"] == 1
    assert plan.of("random_layers").adapter["layers"] == {"random": 1}
    assert plan.of("random_layers").rank == plan.of("flexora").rank == 16
    drawn = {tuple(job.recipe["adapter"]["layers"]) for job in plan.reported(plan.of("random_layers"), 1e-3)}
    assert drawn <= {(0,), (1,)}


def test_what_cannot_be_made_equal_says_so(bases: Path):
    plan = planned(bases, methods=["lora", {"recipe": "hydralora", "heads": 12}], budget={"r": 1})
    hydra = plan.of("hydralora")
    assert hydra.rank == 1
    assert hydra.budget_gap > 0.5
    assert f"Rank 1 gives {hydra.parameters:,} trainable parameters (+{hydra.budget_gap:.0%})" in hydra.note


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"methods": [{"recipe": "lora", "r": 4}]},
            "lora has r=4, and the budget of equal parameters chooses its rank",
        ),
        ({"methods": [{"recipe": "lora", "lora_alpha": 4}]}, "lora has lora_alpha=4, and scale=2 sets alpha for all"),
        (
            {"methods": [{"recipe": "flexora", "select": "above_mean"}]},
            "its trainable parameters are known only after the search",
        ),
        ({"methods": [{"recipe": "flexora", "granularity": "module"}]}, "selects modules, which differ in size"),
        ({"methods": [{"control": "random_layers", "count": 2}]}, "cannot draw 2 of 2 blocks"),
        ({"methods": ["lora", "flexora"], "budget": {"equal": "steps"}}, "give it steps"),
        (
            {"methods": [{"recipe": "flexora", "steps": 9, "val_size": 8}], "budget": {"equal": "steps"}},
            "lower its steps",
        ),
        ({"methods": ["lora_dash"]}, "the method lora_dash: .* 100"),
        ({"methods": ["lora", {"recipe": "lora", "boost": "dash"}]}, "the method lora [+] dash: .* 100"),
        ({"methods": ["none"]}, "trains nothing"),
        ({"baseline": "hydra"}, "did you mean 'hydralora'"),
        ({"metric": "accuracy"}, "cannot be measured on the task causal: use one of loss, exact_match, bleu"),
    ],
)
def test_what_has_no_budget_is_refused_before_anything_runs(bases: Path, given: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        planned(bases, **given)


def test_a_metric_that_no_answer_could_have_is_refused_before_anything_runs(bases: Path):
    rows = [{"prompt": f"{n}", "completion": "one two"} for n in range(8)]
    short = str(write_rows(bases / "short.jsonl", rows))
    given = {"train": short}
    with pytest.raises(
        ConfigError, match="metric=bleu finds nothing to count in the answers of the test rows, such as 'one two'"
    ):
        planned(bases, data=given | {"test": short}, metric="bleu")
    assert planned(bases, data=given | {"test": short}, metric="rouge_l").metric == "rouge_l"
    texts = [{"text": f"only words in row {n}"} for n in range(8)]
    plain = str(write_rows(bases / "plain.jsonl", texts))
    with pytest.raises(ConfigError, match="metric=exact_match is measured on answers, and the test rows have none"):
        planned(bases, data={"train": plain, "test": plain}, metric="exact_match")


def test_equal_steps_leave_ranks_alone_and_charge_a_search(bases: Path):
    search = {"recipe": "flexora", "steps": 4, "val_size": 8, "outer_batches": 2, "r": 3}
    plan = planned(bases, methods=["lora", search], budget={"equal": "steps", "r": 4}, train={"steps": 20})
    assert (plan.of("lora").rank, plan.of("flexora").rank, plan.budget) == (4, 3, None)
    assert plan.of("flexora").steps == 20 - 4 * (
        1 + 2
    )  # two batches of four validation rows for every step on four rows
    assert "Its search costs 12 steps" in plan.of("flexora").note


def test_a_method_with_a_rate_of_its_own_is_trained_at_it_and_none_is_tried_for_it(bases: Path):
    methods = [{"recipe": "lora", "lr": 3e-3}, {"recipe": "lora", "name": "tried"}, "none"]
    made = planned(bases, methods=methods, train={"steps": 40, "lr": None}, rates={"values": [1e-3, 1e-2]})
    own, tried, frozen = made.methods
    assert made.tuning(own) == made.tuning(frozen) == []
    assert [job.lr for job in made.tuning(tried)] == [1e-3, 1e-2]
    assert with_rate(made, own, bases).lr == 3e-3
    assert made.runs == 2 + (2 + 2) + 1
    alone = planned(bases, methods=methods[:1], train={"steps": 40, "lr": None})
    assert (alone.rates, alone.tuning_seeds, alone.runs) == ([3e-3], [], 2)
    with pytest.raises(ConfigError, match="the method lora has lr=-1, which is not a learning rate"):
        planned(bases, methods=[{"recipe": "lora", "lr": -1}])


def test_scale_own_leaves_every_recipe_its_alpha(bases: Path):
    plan = planned(
        bases, methods=["lora", "tied_lora", {"recipe": "lora", "lora_alpha": 5, "name": "five"}], scale="own"
    )
    assert plan.of("lora").alpha == 2 * plan.of("lora").rank
    assert plan.of("tied_lora").alpha == plan.of("tied_lora").rank
    assert plan.of("five").alpha == 5


def test_a_classifiers_head_is_not_counted(bases: Path):
    plan = planned(bases, "bert", methods=["lora", "peft:lora"])
    assert plan.metric == "accuracy"
    assert plan.of("lora").parameters == plan.of("peft:lora").parameters == trained(plan, "peft:lora") == plan.budget


def test_adalora_is_counted_at_the_rank_it_ends_with_and_keeps_its_ratio(bases: Path):
    ratio = {"recipe": "peft:adalora", "init_r": 8, "target_r": 4, "name": "two to one"}
    plan = planned(bases, methods=["lora", "peft:adalora", ratio], budget={"r": 6})
    given = plan.of("peft:adalora").adapter
    assert (given["target_r"], given["init_r"]) == (6, 9)
    given = plan.of("two to one").adapter
    assert (given["target_r"], given["init_r"]) == (6, 12)


@pytest.mark.parametrize(("target", "rank"), [(1, 1), (10, 1), (15, 1), (16, 2), (94, 9), (96, 10), (10**6, 100_000)])
def test_the_nearest_rank_is_found_wherever_it_is(target: int, rank: int):
    assert nearest_rank(lambda r: 10 * r, target) == rank


def test_the_nearest_rank_is_found_where_numbers_do_not_grow_evenly():
    """A large step from rank 1 to 2, as where ranks end at the size of a module: the guess is off and walks."""
    numbers = {r: 10 * r if r < 2 else 100 + r for r in range(1, 60)}
    assert nearest_rank(numbers.__getitem__, 140) == 40
