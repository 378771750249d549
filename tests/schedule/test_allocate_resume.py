"""Rounds in a bare loop, in Trainer and in a killed process: resumed at any step, the run is the uninterrupted one bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from allocating import HELD_OUT, adam, alora, batch, controller, events, ranks, scorer, train
from dashing import assert_same, sites, steps, tensors
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

import weftlora
from families import FAMILIES, logits
from weftlora.schedule import rank_slots as surgery
from weftlora.scoring.brackets import only

END, ROUNDS = 9, (3, 5)
CASES = {
    "exact": {},
    "hydra": {"structure": weftlora.Hydra(heads=2, router_input="Ax"), "lora_dropout": 0.2},
    "shortlist": {"score": "shortlist", "shortlist_factor": 2},
    "random": {"score": "random"},
    "with_dash": {"boost": weftlora.Dash(directions=2, after=4)},
}


def save(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    model.save_pretrained(folder)
    torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, folder / "rest.pt")
    (folder / "schedule.json").write_text(json.dumps(weftlora.state_dict(model)))


def load(folder: Path, **fields: Any) -> tuple[PeftModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(FAMILIES["llama"].build(), folder, is_trainable=True, **fields).train()
    optimizer = adam(model)
    rest = torch.load(folder / "rest.pt", weights_only=True)
    optimizer.load_state_dict(rest["optimizer"])
    torch.set_rng_state(rest["rng"])
    weftlora.load_state_dict(model, json.loads((folder / "schedule.json").read_text()))
    weftlora.attach(model, validation=HELD_OUT)
    return model, optimizer


def untimed(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if k != "seconds"} for event in told]


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_resumed_at_every_step_of_a_run(fields: dict[str, Any], tmp_path: Path) -> None:
    model = alora(**fields)
    optimizer = adam(model)
    save(tmp_path / "0", model, optimizer)
    losses = []
    for step in range(END):
        losses += train(model, step + 1, optimizer, start=step)
        save(tmp_path / str(step + 1), model, optimizer)
    assert [e["step"] for e in events(model)] == list(ROUNDS)
    moments = optimizer.state_dict()["state"]
    for step in (0, *(s + d for s in ROUNDS for d in (-1, 0)), 6, END):
        again, its = load(tmp_path / str(step))
        assert steps(again) == step
        assert train(again, END, its, start=step) == losses[step:]
        assert_same(tensors(again), tensors(model))
        assert untimed(events(again)) == untimed(events(model))
        for key, values in its.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(moments[key][n])) for n, v in values.items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_with_little_memory(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = alora()
    optimizer = adam(model)
    train(model, 4, optimizer)
    save(tmp_path, model, optimizer)
    train(model, 6, optimizer, start=4)
    again, its = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    train(again, 6, its, start=4)
    assert_same(tensors(again), tensors(model))


def test_interrupted_while_scoring_the_round_is_done_as_if_nothing_had_been(tmp_path: Path) -> None:
    """The step was taken, the round was not: whoever goes on from the checkpoint before gets the uninterrupted run."""
    whole = alora()
    train(whole, END)
    model = alora()
    optimizer = adam(model)
    train(model, 2, optimizer)
    save(tmp_path, model, optimizer)
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt

    hook = list(sites(model).values())[-1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        train(model, 3, optimizer, start=2)
    hook.remove()
    assert set(ranks(model).values()) == {2}
    assert controller(model).rounds == 0
    again, its = load(tmp_path)
    train(again, END, its, start=2)
    assert_same(tensors(again), tensors(whole))


def test_two_runs_with_one_seed_make_one_plan_and_another_seed_another() -> None:
    told = []
    for seed in (0, 0, 1):
        model = alora(score="random", seed=seed)
        train(model, 6)
        told.append(untimed(events(model)))
    assert told[0] == told[1]
    assert [e["pruned"] for e in told[0]] != [e["pruned"] for e in told[2]]


# ---------------------------------------------------------------------- folders hold the layout


def moved(**fields: Any) -> PeftModel:
    model = alora(**fields)
    train(model, 6)
    assert len(set(ranks(model).values())) > 1
    return model.eval()


@pytest.mark.parametrize("structure", [weftlora.Plain(), weftlora.Hydra(heads=2)], ids=["plain", "hydra"])
def test_every_way_of_loading_restores_the_layout(structure: Any, tmp_path: Path) -> None:
    model = moved(structure=structure)
    expected = logits(model, batch(0))
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, low_cpu_mem_usage=low)
        assert ranks(loaded) == ranks(model)
        assert torch.equal(logits(loaded, batch(0)), expected)
    base = FAMILIES["llama"].build()
    base.load_adapter(str(tmp_path), adapter_name="other")
    assert torch.equal(logits(base, batch(0)), expected)
    assert torch.equal(logits(copy.deepcopy(model), batch(0)), expected)


def test_a_merge_is_of_the_live_slots() -> None:
    model = moved()
    expected = logits(model, batch(0))
    merged = model.merge_and_unload()
    assert (logits(merged, batch(0)) - expected).abs().max() < 1e-5


def test_a_module_at_rank_0_trains_saves_loads_and_merges(tmp_path: Path) -> None:
    model = alora(first=8, max_rounds=1)
    first = next(iter(sites(model).values()))
    surgery.move(first, [0, 1], [], [], 1)
    optimizer = adam(model)
    train(model, 9, optimizer)
    name = next(iter(sites(model)))
    assert first.live() == []
    assert name not in {m for m, _ in events(model)[0]["added"]}
    assert torch.count_nonzero(first.delta_weight()) == 0
    expected = logits(model, batch(0))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
    assert ranks(loaded)[name] == 0
    assert torch.equal(logits(loaded, batch(0)), expected)
    assert (logits(loaded.merge_and_unload(), batch(0)) - expected).abs().max() < 1e-5


def test_a_module_at_rank_0_comes_back_where_it_may() -> None:
    """Everybody else is full, so what is taken away goes to it."""
    model = alora(score="random", first=2, max_rounds=1, revive=True, move=1, max_rank=2)
    optimizer = adam(model)
    train(model, 1, optimizer)
    site = next(iter(sites(model).values()))
    surgery.move(site, [0, 1], [], [], 1)
    train(model, 2, optimizer, start=1)
    assert site.live() == [0]
    assert torch.count_nonzero(site.structure.B) == 0
    assert torch.count_nonzero(site.structure.A[0]) == site.structure.A.shape[1]
    train(model, 3, optimizer, start=2)
    assert torch.count_nonzero(site.structure.B[:, 0]) > 0


def test_a_checkpoint_loaded_back_into_the_same_model_brings_its_layout(tmp_path: Path) -> None:
    """As a host that returns to its best checkpoint does."""
    model = alora()
    optimizer = adam(model)
    train(model, 4, optimizer)
    model.save_pretrained(tmp_path)
    kept, layout = copy.deepcopy(optimizer.state_dict()), ranks(model)
    train(model, 6, optimizer, start=4)
    expected = tensors(model)
    assert ranks(model) != layout
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert (ranks(model), controller(model).rounds) == (layout, 1)
    optimizer.load_state_dict(kept)
    weftlora.attach(model, validation=HELD_OUT)
    train(model, 6, optimizer, start=4)
    assert_same(tensors(model), expected)


# ---------------------------------------------------------------------- Trainer


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    given = {
        "per_device_train_batch_size": 2,
        "max_steps": 7,
        "learning_rate": 2e-2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return TrainingArguments(str(folder), **{**given, **quiet, **fields})


def test_trainer_resumes_and_accumulation_does_not_move_a_round(tmp_path: Path) -> None:
    whole = alora(lora_dropout=0.1)
    Trainer(whole, arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=HELD_OUT).train()
    assert [e["step"] for e in events(whole)] == list(ROUNDS)
    for step in (2, 3, 4):
        again = alora(lora_dropout=0.1)
        trainer = Trainer(again, arguments(tmp_path / "b", gradient_accumulation_steps=2), train_dataset=HELD_OUT)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(tensors(again), tensors(whole))


def test_trainer_ends_with_the_layout_of_its_best_checkpoint(tmp_path: Path) -> None:
    model, told = alora(), list[Any]()
    weftlora.attach(model, on_event=told.append)
    best = {3: 0.0}  # step 3 is declared best: after the first round, before the second

    class Rigged(Trainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_loss": best.get(self.state.global_step, 1.0)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss"
    )
    Rigged(model, args, train_dataset=HELD_OUT, eval_dataset=HELD_OUT).train()
    first, second = told
    assert ranks(model) == first["ranks"] != second["ranks"]
    assert events(model) == [first]  # what came later is not of this adapter
    saved = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path / "checkpoint-3")
    assert torch.equal(logits(saved, batch(0)), logits(model, batch(0)))


def test_dash_slots_stay_on_while_rank_slots_are_scored() -> None:
    """They are of the base: M₀, the model without any rank slot, has them."""
    model = alora(boost=weftlora.Dash(directions=2, after=1), first=5)
    train(model, 3)
    for site in sites(model).values():
        nn.init.normal_(site.boost.gain)
    s = scorer(model)
    drawn = s.drawn("a")
    model.eval()
    with torch.no_grad():
        whole = model(**drawn).loss
        with only(s.sites, []):
            without = model(**drawn).loss
        with model.disable_adapter():
            base = model(**drawn).loss
    assert len({float(whole), float(without), float(base)}) == 3
