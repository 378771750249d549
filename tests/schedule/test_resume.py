"""A bare loop resumed at any step is the uninterrupted one bit for bit: adapter folder, optimiser state, weftlora.state_dict."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dashing import (
    Net,
    adam,
    assert_same,
    batch,
    dash,
    init,
    loss_of,
    parameters,
    schedule,
    sites,
    steps,
    tensors,
    train,
)
from peft import PeftModel, get_peft_model
from torch import nn

import weftlora
from families import FAMILIES, adapter_config

LAUNCH, END = 5, 12
CASES = {
    "plain": (dash, {}),
    "hydra": (dash, {"structure": weftlora.Hydra(heads=3)}),
    "tied": (dash, {"structure": weftlora.Tied(group="shape")}),
    "init": (init, {}),
    "init of its own": (init, {"mode": "directions"}),
    "tsd": (init, {"directions": 3}),
    "dash after init": (dash, {"start": weftlora.Directions(after=LAUNCH - 2)}),
    "init after dash": (dash, {"start": weftlora.Directions(after=LAUNCH + 2)}),
}
OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(weftlora.param_groups(m, lr=1e-2, weight_decay=0.1), lr=1e-2),
    "fused": lambda m: torch.optim.AdamW(parameters(m), lr=1e-2, fused=True),
    "momentum": lambda m: torch.optim.SGD(parameters(m), lr=0.05, momentum=0.9),
}


def save(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    model.save_pretrained(folder)
    torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, folder / "rest.pt")
    (folder / "schedule.json").write_text(json.dumps(weftlora.state_dict(model)))


def load(folder: Path, make_optimizer: Any, **fields: Any) -> tuple[PeftModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Net(), folder, is_trainable=True, **fields)
    optimizer = make_optimizer(model)
    rest = torch.load(folder / "rest.pt", weights_only=True)
    optimizer.load_state_dict(rest["optimizer"])
    torch.set_rng_state(rest["rng"])
    weftlora.load_state_dict(model, json.loads((folder / "schedule.json").read_text()))
    return model.train(), optimizer


def run(
    model: PeftModel, optimizer: torch.optim.Optimizer, start: int, end: int, folder: Path | None = None
) -> list[float]:
    """Losses of steps `start` … `end`, with accumulation, dropout, and an evaluation after every step."""
    losses = []
    for step in range(start, end):
        for micro in range(2):
            loss = loss_of(model, batch(2 * step + micro))
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if folder is not None:
            save(folder / str(step + 1), model, optimizer)
        with torch.no_grad():
            model.eval()(3 * batch(1000 + step))
            model.train()
    return losses


def without_seconds(state: dict[str, Any]) -> str:
    text = json.dumps(state)
    for event in (e for s in state.values() for e in s["events"]):
        for seconds in (event["seconds"], *(site["seconds"] for site in event["sites"].values())):
            text = text.replace(f'"seconds": {json.dumps(seconds)}', "")
    return text


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_resumed_at_every_step_of_a_run(case, make, tmp_path: Path) -> None:
    build, fields = case
    model = build(after=LAUNCH, lora_dropout=0.2, **fields).train()
    optimizer = make(model)
    save(tmp_path / "0", model, optimizer)
    losses = run(model, optimizer, 0, END, tmp_path)
    expected, state = tensors(model), without_seconds(weftlora.state_dict(model))
    moments = optimizer.state_dict()["state"]
    for step in range(END + 1):
        again, its_optimizer = load(tmp_path / str(step), make)
        assert steps(again) == step
        assert run(again, its_optimizer, step, END) == losses[2 * step :]
        assert_same(tensors(again), expected)
        if step >= LAUNCH:
            assert without_seconds(weftlora.state_dict(again)) == state
        mine = its_optimizer.state_dict()["state"]
        assert mine.keys() == moments.keys()
        for key, values in moments.items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(mine[key][n])) for n, v in values.items())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("step", [LAUNCH - 1, LAUNCH])
def test_loaded_with_little_memory(step: int, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    make = OPTIMIZERS["adamw"]
    model = dash(after=LAUNCH, structure=weftlora.Hydra(heads=3))
    optimizer = make(model)
    run(model, optimizer, 0, step)
    save(tmp_path, model, optimizer)
    run(model, optimizer, step, LAUNCH + 2)
    again, its_optimizer = load(tmp_path, make, low_cpu_mem_usage=low_cpu_mem_usage)
    run(again, its_optimizer, step, LAUNCH + 2)
    assert_same(tensors(again), tensors(model))


@pytest.mark.parametrize("step", [LAUNCH - 1, LAUNCH])
def test_loaded_by_transformers(step: int, tmp_path: Path) -> None:
    """load_adapter assigns tensors without load_state_dict: the routers' meters must be there all the same."""
    row = FAMILIES["llama"]

    def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(**row.batch()).loss.backward()
            optimizer.step()

    config = adapter_config("hydra", "llama", boost=weftlora.Dash(directions=3, after=LAUNCH))
    model = get_peft_model(row.build(), config).train()
    optimizer = adam(model)
    train_on(model, optimizer, step)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    loaded = row.build()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    its_optimizer = adam(loaded.train())
    its_optimizer.load_state_dict(state)
    train_on(model, optimizer, 3)
    train_on(loaded, its_optimizer, 3)
    mine = {n.removeprefix("base_model.model."): t for n, t in tensors(model).items()}
    assert_same(tensors(loaded), mine)


def test_routers_are_listened_to_only_where_a_launch_may_come(tmp_path: Path) -> None:
    """In the first step, whose number may still be loaded, and in the step of the launch."""
    model = dash(after=3, structure=weftlora.Hydra(heads=2))
    optimizer, listening = adam(model), []
    for step in range(5):
        listening.append({site.gate_meter is not None for site in sites(model).values()})
        train(model, 1, optimizer, start=step)
    assert listening == [{True}, {False}, {True}, {False}, {False}]
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=trainable)
        assert all(site.gate_meter is None for site in sites(loaded).values())


@pytest.mark.parametrize("build", [dash, init])
def test_a_checkpoint_loaded_back_into_the_same_model_continues_from_there(build, tmp_path: Path) -> None:
    """As a host that returns to its best checkpoint does; also from after the launch to before it."""
    model = build(after=LAUNCH)
    optimizer = adam(model)
    train(model, 3, optimizer)
    model.save_pretrained(tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    train(model, 4, optimizer, start=3)
    expected = tensors(model)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert (steps(model), schedule(model).pending() != []) == (3, True)
    optimizer.load_state_dict(kept)
    train(model, 4, optimizer, start=3)
    assert_same(tensors(model), expected)
