"""A run that searches its layers first: one folder, one resume, and selections that other recipes take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupting import Interrupt, weights
from pairing import both_of
from peft import PeftModel

import weftlora
from weftlora.errors import ConfigError, DataError, RunError, TargetError
from weftlora.progress import Tick
from weftlora.runs.run import Run
from weftlora.search import Selection
from weftlora.search.driver import LayerSearch
from weftlora.train.layer_search import search_recipe

Make = Callable[..., dict[str, Any]]
FLEXORA = {"recipe": "flexora", "r": 4, "val_size": 8, "outer_batches": 2, "steps": 4, "lora_dropout": 0.2}


@pytest.mark.parametrize("finetune", ["restart", "continue"])
def test_one_run_searches_selects_and_trains(recipe: Make, finetune: str) -> None:
    ticks = []
    run = weftlora.train(recipe(adapter={**FLEXORA, "finetune": finetune}), progress=ticks.append)
    assert run.status == "complete"
    assert [t.phase for t in ticks if t.phase in ("search", "train")] == ["search"] * 4 + ["train"] * 4
    selection = Selection.load(run.folder / "selection.json")
    [event] = [e for e in map(json.loads, (run.folder / "events.jsonl").open()) if e["event"] == "selection"]
    assert event["layers"] == list(selection.blocks)
    assert run.adapter["layers"] == {"kind": "only", "blocks": list(selection.blocks), "gated": False}
    names = {n.split(".weft_site")[0] for n in _tensors(run)}
    assert {n.removeprefix("base_model.model.") for n in names} == {m for c in selection.chosen for m in c.modules}
    assert len((run.folder / "search.jsonl").read_text().splitlines()) == 4
    assert weftlora.evaluate(run).scores.loss is not None


@pytest.mark.parametrize("finetune", ["restart", "continue"])
def test_a_frozen_a_is_frozen_in_the_search_and_after_it(recipe: Make, tmp_path: Path, finetune: str) -> None:
    adapter = {**FLEXORA, "finetune": finetune}
    keys = {"freeze_down": True, "lora_plus_ratio": 4}
    run = weftlora.train(recipe(adapter=adapter, train=keys))
    free = weftlora.train(recipe(adapter=adapter, out=str(tmp_path / "free")))
    assert run.status == "complete"
    assert 0 < run.parameters["trainable"] < free.parameters["trainable"]
    assert run.parameters["trainable"] == run.figures["trained"]


def _tensors(run: Run) -> list[str]:
    from safetensors import safe_open

    with safe_open(run.adapter_folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("finetune", ["restart", "continue"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_interrupted_inside_its_search_ends_as_the_uninterrupted_one(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, finetune: str
) -> None:
    adapter = {**FLEXORA, "finetune": finetune}
    whole = weftlora.train(recipe(adapter=adapter, train={"save_every": 2}, out=str(tmp_path / "whole")))
    given = recipe(adapter=adapter, train={"save_every": 2}, out=str(tmp_path / "cut"))
    step = LayerSearch.step

    def stopping(self: LayerSearch) -> dict[str, Any]:
        if self.done == stop:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSearch, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            weftlora.train(given)
    assert Run.load(given["out"]).status == "interrupted"
    ticks: list[Tick] = []
    resumed = weftlora.train(given, resume=True, progress=ticks.append)
    begun = 1 + stop // 2 * 2  # a search that began anew would end the same
    assert [t.done for t in ticks if t.phase == "search"] == list(range(begun, 5))
    assert weights(resumed) == weights(whole)
    cut, uncut = (Selection.load(run.folder / "selection.json") for run in (resumed, whole))
    assert cut == uncut


def test_a_run_interrupted_after_its_search_goes_on_with_the_same_selection(recipe: Make, tmp_path: Path) -> None:
    long = {"steps": 6, "save_every": 2}
    whole = weftlora.train(recipe(adapter=FLEXORA, train=long, out=str(tmp_path / "whole")))
    given = recipe(adapter=FLEXORA, train=long, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(5)])
    resumed = weftlora.train(given, resume=True)
    assert resumed.time["resumed_from"] == 4
    assert weights(resumed) == weights(whole)


def test_a_recipe_may_ask_for_an_error_where_too_few_blocks_qualify(
    recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of two blocks cannot both be above their mean."""
    filled = weftlora.train(recipe(adapter={**FLEXORA, "min_layers": 2}, out=str(tmp_path / "filled")))
    assert filled.adapter["layers"]["blocks"] == [0, 1]
    assert "added for min_layers: model.layers." in caplog.text
    given = recipe(adapter={**FLEXORA, "min_layers": 2, "when_fewer": "error"})
    with pytest.raises(RunError, match=r"selects 1 of 2 groups, fewer than min_layers=2"):
        weftlora.train(given)
    assert Run.load(given["out"]).status == "failed"
    with pytest.raises(RunError, match="fewer than min_layers=2"):
        search_recipe(given, out=tmp_path / "selection.json")
    assert not (tmp_path / "selection.json").exists()


def test_a_classifiers_head_is_fresh_in_the_second_stage(recipe: Make) -> None:
    run = weftlora.train(recipe("bert", adapter={**FLEXORA, "exclude_modules": ["pooler.dense"]}))
    assert run.status == "complete"


def test_too_few_rows_for_the_search_leave_no_folder(recipe: Make, tmp_path: Path) -> None:
    given = recipe(adapter={**FLEXORA, "val_size": 100})
    with pytest.raises(DataError, match="val_size=100"):
        weftlora.train(given)
    assert not (tmp_path / "run").exists()


def test_a_search_alone_writes_a_selection_that_any_recipe_takes(recipe: Make, tmp_path: Path) -> None:
    given = recipe(adapter="hydralora")
    given["adapter"]["layers"] = {"search": {"val_size": 8, "outer_batches": 2, "steps": 2}}
    found = search_recipe(given, seeds=2, out=tmp_path / "selection.json")
    assert found.stability is not None
    assert found.stability.selections == 2
    assert found.record()["layers"] == list(found.selections[0].blocks)
    assert not (tmp_path / "run").exists()
    named = recipe(adapter={"recipe": "tied_lora", "r": 4, "layers": str(tmp_path / "selection.json")})
    run = weftlora.train(named)
    assert run.adapter["layers"]["blocks"] == list(found.selections[0].blocks)
    listed = weftlora.train(recipe(adapter={"recipe": "lora", "r": 4, "layers": [1]}, out=str(tmp_path / "listed")))
    assert all(".layers.1." in name for name in _tensors(listed))
    other = recipe(
        "t5", adapter={"recipe": "lora", "layers": str(tmp_path / "selection.json")}, out=str(tmp_path / "t5")
    )
    with pytest.raises(TargetError, match=r"searched on another model: it selects model\.layers"):
        weftlora.train(other)


def test_layers_that_are_chosen_already_are_not_searched(recipe: Make) -> None:
    with pytest.raises(ConfigError, match="nothing to search"):
        search_recipe(recipe(adapter={"recipe": "lora", "layers": [0]}))
    with pytest.raises(ConfigError, match="flexora searches its layers"):
        weftlora.train(recipe(adapter={**FLEXORA, "layers": [0]}))


@pytest.mark.parametrize("adapter", ["peft:lora", "none"])
def test_an_adapter_without_gates_is_not_searched(recipe: Make, adapter: str) -> None:
    given = recipe()
    given["adapter"] = {"recipe": adapter}
    with pytest.raises(ConfigError, match="no layer gates"):
        search_recipe(given)


def test_the_adapter_of_a_searched_run_loads_with_peft(recipe: Make, bases: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    run = weftlora.train(recipe(adapter=FLEXORA))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["llama"]), run.adapter_folder)
    assert model.peft_config["default"].layers == Selection.load(run.folder / "selection.json").layers


@pytest.mark.sharded
def test_two_processes_select_as_one_does_and_resume_exactly_inside_the_search(recipe: Make, tmp_path: Path) -> None:
    """Half the accumulation on each of two processes: the same micro-batches together, in training and in the search."""
    adapter = {**FLEXORA, "steps": 5, "lora_dropout": 0.0}
    train = {"batch_size": 4, "accumulation": 2, "save_every": 2, "schedule": "constant"}
    alone = weftlora.train(recipe(adapter=adapter, train=train, out=str(tmp_path / "alone")))
    halved = recipe(adapter=adapter, train={**train, "accumulation": 1})
    (tmp_path / "recipe.json").write_text(json.dumps(halved))
    one, other = both_of(str(Path(__file__).with_name("two_trainings.py")), tmp_path)
    assert one == other
    assert one["layers"] == [list(alone.adapter["layers"]["blocks"])] * 2
    assert one["steps"] == alone.steps
    single, whole, cut = (Selection.load(tmp_path / name / "selection.json") for name in ("alone", "whole", "cut"))
    assert cut == whole
    assert [c.alpha for c in whole.candidates] == pytest.approx([c.alpha for c in single.candidates], abs=1e-4)
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert adapters[0] == adapters[1]
