"""What a run knows of its way: planted moves of rank slots, and what a search selected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import weftlora
from families import FAMILIES
from weftlora.inspection import measures
from weftlora.inspection.subject import live_subject
from weftlora.search import Selection

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def subject(**fields: Any) -> Any:
    config = weftlora.AllocLoraConfig(r=2, target_modules=["q_proj"], **fields)
    return live_subject(get_peft_model(FAMILIES["llama"].build(), config), None, "planted")


def moved(
    round_: int, step: int, taken: list[Any], made: list[Any], ranks: dict[str, int], **more: Any
) -> dict[str, Any]:
    when = {"event": "reallocation", "adapter": "default", "round": round_, "step": step}
    return {**when, "pruned": taken, "added": made, "ranks": ranks, **more}


def test_rounds_stand_there_as_they_were_told():
    planted = subject()
    planted.events = [
        {"event": "start", "steps": 9},
        moved(1, 3, [[Q0, 1, -0.5]], [[Q1, 2]], {Q0: 1, Q1: 3}),
        {"event": "checkpoint", "step": 3},
        moved(2, 6, [[Q0, 0, None]], [[Q1, 3]], {Q0: 0, Q1: 4}),
    ]
    found = measures.rank_history(planted)
    assert found.before == {Q0: 2, Q1: 2}
    assert [(each.step, each.round) for each in found.rounds] == [(3, 1), (6, 2)]
    assert found.rounds[0].taken == [(Q0, 1, -0.5)]
    assert found.rounds[0].made == [(Q1, 2)]
    assert found.rounds[1].ranks == {Q0: 0, Q1: 4}


def test_a_round_that_was_repeated_after_a_kill_counts_once():
    planted = subject()
    planted.events = [
        moved(1, 3, [[Q0, 1, 0.0]], [[Q1, 2]], {Q0: 1, Q1: 3}),
        {"event": "resume", "steps": 9},
        moved(1, 3, [[Q1, 1, 0.0]], [[Q0, 2]], {Q0: 3, Q1: 1}),
        moved(1, 3, [], [], {}, adapter="another"),
    ]
    found = measures.rank_history(planted)
    assert [each.ranks for each in found.rounds] == [{Q0: 3, Q1: 1}]


@pytest.mark.parametrize("damage", [{"ranks": {Q0: 1}}, {"pruned": None}, {"round": "first"}, {"added": [[Q0]]}])
def test_a_damaged_round_is_said_and_no_history_is_made_up(damage: dict[str, Any]):
    planted = subject()
    planted.events_from = "events.jsonl"
    planted.events = [moved(1, 3, [[Q0, 1, 0.0]], [[Q1, 2]], {Q0: 1, Q1: 3}) | damage]
    assert measures.rank_history(planted) is None
    assert planted.left_out == ["Ranks over time: events.jsonl is damaged."]


def test_a_line_that_a_kill_cut_short_hides_no_round(alora_run: Path, tmp_path: Path):
    folder = shutil.copytree(alora_run, tmp_path / "run")
    lines = (folder / "events.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "reallocation" in line)
    (folder / "events.jsonl").write_text("\n".join([*lines[:first], lines[first][:40], *lines[first:]]) + "\n")
    assert [each.step for each in weftlora.inspect(folder, base=False).history.rounds] == [2, 4]


def test_a_checkpoint_knows_the_rounds_up_to_it(alora_run: Path, tmp_path: Path):
    folder = shutil.copytree(alora_run, tmp_path / "run")
    checkpoint = shutil.copytree(folder / "adapter", folder / "checkpoints" / "checkpoint-6")
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    steps = next(key for key in tensors if key.endswith("weft_site.steps"))
    for at, rounds in ((6, [2, 4]), (3, [2]), (1, [])):
        save_file({**tensors, steps: torch.full_like(tensors[steps], at)}, checkpoint / "adapter_model.safetensors")
        found = weftlora.inspect(checkpoint, base=False)
        assert found.steps == at
        assert ([each.step for each in found.history.rounds] if found.history else []) == rounds


def test_a_run_tells_its_moves_and_ends_at_the_ranks_it_has(alora_run: Path):
    found = weftlora.inspect(alora_run, spectra=0)
    assert [each.step for each in found.history.rounds] == [2, 4]
    assert found.history.rounds[-1].ranks == {site.site: site.rank for site in found.sites}
    assert set(found.history.before.values()) == {2}
    assert found.history.source.endswith("events.jsonl")
    way = found.history.rounds[0].way
    assert way
    assert any(f"of rank slots in 2 rounds, scored by {way}, among" in sentence for sentence in found.verdict)


def test_an_adapter_without_its_run_knows_only_what_was_made_later(alora_run: Path):
    found = weftlora.inspect(alora_run / "adapter", base=False)
    assert found.history is not None  # it still lies in its run
    moved_away = shutil.copytree(alora_run / "adapter", alora_run.parent / "alone")
    alone = weftlora.inspect(moved_away, base=False)
    assert alone.history is None
    assert any("live slots were made later, the last in round 2" in sentence for sentence in alone.left_out)


def test_a_live_schedule_tells_them_too():
    planted = subject()
    planted.events, planted.events_from = [moved(1, 3, [], [], {Q0: 2, Q1: 2})], "the adapter's schedule"
    assert measures.rank_history(planted).source == "the adapter's schedule"
    planted.events = []
    assert measures.rank_history(planted) is None


def test_selected_layers_come_with_alpha_and_margin(flexora_run: Path):
    found, selection = weftlora.inspect(flexora_run, spectra=0), Selection.load(flexora_run / "selection.json")
    assert found.layers.margin == selection.margin
    assert [c.alpha for c in found.layers.candidates] == [c.alpha for c in selection.candidates]
    assert [c.name for c in found.layers.candidates if c.selected] == [c.name for c in selection.chosen]
    assert {site.block for site in found.sites} == {c.name for c in selection.chosen}


def test_a_selection_file_that_another_recipe_used_is_found(flexora_run: Path, hydra_run: Path, tmp_path: Path):
    folder = shutil.copytree(hydra_run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["recipe"]["adapter"]["layers"] = str(flexora_run / "selection.json")
    (folder / "run.json").write_text(json.dumps(record))
    assert weftlora.inspect(folder, base=False).layers.margin is not None
    record["recipe"]["adapter"]["layers"] = str(tmp_path / "gone.json")
    (folder / "run.json").write_text(json.dumps(record))
    gone = weftlora.inspect(folder, base=False)
    assert gone.layers.margin is None
    assert any("margins" in sentence for sentence in gone.left_out)
    assert weftlora.inspect(folder, rows=1, spectra=0).factor_comparison.kind == "fresh draw"


def test_a_damaged_selection_is_left_out_with_the_reason(flexora_run: Path, tmp_path: Path):
    folder = shutil.copytree(flexora_run, tmp_path / "run")
    (folder / "selection.json").write_text("{")
    found = weftlora.inspect(folder, base=False)
    assert found.layers.margin is None
    assert any(s.startswith("α and margins") and "selection.json" in s for s in found.left_out)


@pytest.mark.parametrize(("layers", "source", "blocks"), [(weftlora.All(), "all", 2), (weftlora.Only([1]), "named", 1)])
def test_without_a_search_the_adapted_blocks_are_named(layers: Any, source: str, blocks: int):
    model = get_peft_model(
        FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"], layers=layers)
    )
    found = weftlora.inspect(model, spectra=0).layers
    assert source in found.source
    assert len(found.candidates) == blocks
    assert found.margin is None
