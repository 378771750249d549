"""What a user tells a schedule and takes from it: attach, state_dict, load_state_dict, param_groups."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

import weftlora
from families import FAMILIES, adapter_config
from weftlora import change_rates
from weftlora.errors import ConfigError
from weftlora.schedule.schedule import Length

sys.path.insert(0, str(Path(__file__).parents[1] / "schedule"))
from dashing import (
    Net,
    adam,
    assert_same,
    batch,
    dash,
    launch_step,
    launched,
    parameters,
    schedule,
    steps,
    tensors,
    terms,
    train,
)

# ---------------------------------------------------------------------- attach


@pytest.mark.parametrize(
    ("after", "told", "step"),
    [
        (0.25, {"total_steps": 12}, 3),
        (weftlora.epochs(0.5), {"steps_per_epoch": 4}, 2),
        (weftlora.epochs(1), {"steps_per_epoch": 2.5, "total_steps": 5}, 2),
        (2, {"total_steps": 5}, 2),
    ],
)
def test_times_mean_steps_once_the_length_is_told(after, told: dict, step: int) -> None:
    model = dash(after=after)
    weftlora.attach(model, **told)
    train(model, 4)
    assert launch_step(model) == step


def test_the_parts_of_a_length_can_be_told_one_after_the_other() -> None:
    model = dash(after=weftlora.epochs(1))
    seen = []
    weftlora.attach(model, steps_per_epoch=2, on_event=seen.append)
    weftlora.attach(model, total_steps=10)
    assert schedule(model).length == Length(10, 2)
    train(model, 3)
    assert [e["step"] for e in seen] == [2]
    assert seen == schedule(model).events


@pytest.mark.parametrize(("after", "missing"), [(0.5, "total_steps"), (weftlora.epochs(2), "steps_per_epoch")])
def test_without_attach_the_first_step_is_an_error_that_says_what_to_do(after, missing: str) -> None:
    model = dash(after=after)
    optimizer = adam(model)
    with pytest.raises(ConfigError, match=rf"call weftlora\.attach\(model, {missing}=\.\.\.\) before training"):
        train(model, 1, optimizer)
    weftlora.attach(model, **{missing: 4})
    train(model, 8, optimizer, start=1)
    assert launch_step(model) == (2 if missing == "total_steps" else 8)


@pytest.mark.parametrize("total", [1, 4, 5])
def test_a_launch_that_cannot_happen_in_this_run_is_refused(total: int) -> None:
    model = dash(after=5)
    weftlora.attach(model, total_steps=50)
    with pytest.raises(ConfigError, match=rf"due after step 5, but the run ends after {total}: it would silently stay"):
        weftlora.attach(model, total_steps=total)
    assert schedule(model).length == Length(50)  # a refused length is not taken
    weftlora.attach(model, total_steps=6)


def test_a_late_fraction_that_rounds_to_the_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="due after step 10, but the run ends after 10"):
        weftlora.attach(dash(after=0.99), total_steps=10)
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        weftlora.attach(dash(after=weftlora.epochs(1)), total_steps=10)


def test_a_launch_that_has_happened_is_not_asked_about() -> None:
    model = dash(after=3)
    train(model, 3)
    weftlora.attach(model, total_steps=3)


@pytest.mark.parametrize("value", [0, -1, True, "100", math.nan, math.inf, [1]])
@pytest.mark.parametrize("name", ["total_steps", "steps_per_epoch"])
def test_a_length_that_is_none_is_refused(name: str, value) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.* is not a length: give the number of optimiser steps"):
        weftlora.attach(dash(), **{name: value})


def test_every_adapter_of_a_model_is_told() -> None:
    model = dash(after=0.5)
    fields = {"r": 2, "directions": 3, "target_modules": ["second"]}
    model.add_adapter("other", weftlora.LoraDashConfig(after=0.25, **fields))
    weftlora.attach(model, total_steps=8)
    assert schedule(model, "default").length == schedule(model, "other").length == Length(8)


def test_a_model_without_a_schedule_takes_attach_quietly() -> None:
    model = get_peft_model(Net(), weftlora.PlainLoraConfig(r=2, target_modules=["first"]))
    weftlora.attach(model, total_steps=10)
    assert weftlora.state_dict(model) == {}
    weftlora.load_state_dict(model, {})


# ---------------------------------------------------------------------- state_dict


@pytest.mark.parametrize("count", [0, 2, 3, 5])
def test_the_state_survives_json(count: int, tmp_path: Path) -> None:
    model = dash(after=3)
    weftlora.attach(model, total_steps=9)
    train(model, count) if count else None
    state = json.loads(json.dumps(weftlora.state_dict(model), allow_nan=False))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    weftlora.load_state_dict(loaded, state)
    assert weftlora.state_dict(loaded) == state == weftlora.state_dict(model)
    assert schedule(loaded).length == Length(9)
    assert len(state["default"]["events"]) == (count >= 3)
    assert state["default"]["steps"] == count


def test_a_state_taken_stays_as_it_was() -> None:
    model = dash(after=2)
    train(model, 1, optimizer := adam(model))
    state = weftlora.state_dict(model)
    kept = copy.deepcopy(state)
    train(model, 1, optimizer, start=1)
    assert state == kept
    later = weftlora.state_dict(model)
    weftlora.load_state_dict(model, later)
    later["default"]["events"].clear()
    assert len(schedule(model).events) == 1


def test_a_state_of_another_step_is_refused() -> None:
    model = dash()
    state = weftlora.state_dict(model)
    train(model, 1)
    with pytest.raises(
        ConfigError, match="taken after step 0, the adapter 'default' after step 1: load the adapter folder"
    ):
        weftlora.load_state_dict(model, state)


def test_a_state_of_another_adapter_is_refused() -> None:
    model = dash()
    state = {"mine": weftlora.state_dict(model)["default"]}
    with pytest.raises(ConfigError, match=r"adapters \['mine'\], the model's schedules are of \['default'\]"):
        weftlora.load_state_dict(model, state)


def test_a_length_known_to_the_model_is_not_erased_by_a_state_without_one() -> None:
    model = dash(after=0.5)
    state = weftlora.state_dict(model)
    weftlora.attach(model, total_steps=4)
    weftlora.load_state_dict(model, state)
    train(model, 2)
    assert launched(model)


# ---------------------------------------------------------------------- saved files and loading paths


PHASES = {"pre-launch": 2, "launch": 3, "dash": 5}
STRUCTURES = {"plain": weftlora.Plain(), "hydra": weftlora.Hydra(heads=3), "tied": weftlora.Tied(group="shape")}
STATE = {"gain", "down", "up", "index", "sigma", "rate", "launched"}


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@contextmanager
def nothing_decomposed() -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loading decomposed a weight")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(change_rates, "spectrum", refuse)
        for name in ("eigh", "svd"):
            patch.setattr(torch.linalg, name, refuse)
        yield


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem"])
@pytest.mark.parametrize("count", PHASES.values(), ids=PHASES)
def test_from_pretrained_in_every_phase(count: int, low_cpu_mem_usage: bool, structure, tmp_path: Path) -> None:
    model = dash(after=3, structure=structure)
    train(model, count)
    model.eval().save_pretrained(tmp_path)
    with nothing_decomposed():
        loaded = PeftModel.from_pretrained(
            fresh(), tmp_path, adapter_name="renamed", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(loaded(batch(40)), model(batch(40)))
    assert (steps(loaded, "renamed"), launched(loaded, "renamed")) == (count, count >= 3)
    renamed = {n.replace(".renamed.", ".default."): t for n, t in tensors(loaded).items()}
    assert_same(renamed, tensors(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", PHASES.values(), ids=PHASES)
def test_load_adapter_of_transformers_in_every_phase(count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    row = FAMILIES["llama"]
    config = adapter_config("plain", "llama", boost=weftlora.Dash(directions=3, after=3))
    model = get_peft_model(row.build().to(dtype), config)
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model(**row.batch()).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = model(**row.batch()).logits
    base = row.build().to(dtype)
    base.save_pretrained(tmp_path / "base")
    with nothing_decomposed():
        for load in ("load_adapter", "from_pretrained"):
            if load == "load_adapter":
                loaded = row.build().to(dtype)
                loaded.load_adapter(str(tmp_path / "adapter"), adapter_name="renamed")
            else:
                loaded = PeftModel.from_pretrained(row.build().to(dtype), tmp_path / "adapter", adapter_name="renamed")
            got, same_dtype = loaded.eval()(**row.batch()).logits, dtype == torch.float32 or load == "from_pretrained"
            atol = (
                0 if same_dtype else 2**-6 * expected.abs().max().item()
            )  # transformers keeps adapters in the base's dtype
            assert torch.allclose(got, expected, rtol=0, atol=atol), load
            assert (steps(loaded, "renamed"), launched(loaded, "renamed")) == (count, count >= 3)
            for mine, theirs in zip(terms(model), terms(loaded, "renamed"), strict=True):
                if same_dtype:
                    assert_same(mine.state_dict(), theirs.state_dict())


def test_an_adapter_put_into_a_model_by_hand(tmp_path: Path) -> None:
    """inject_adapter_in_model throws the tuner away; the schedule lives on in the sites."""
    model = dash(after=3)
    train(model, 2)
    config = model.peft_config["default"]
    loaded = inject_adapter_in_model(config, fresh())
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(model))
    assert steps(loaded) == 2
    train(loaded, 2)
    assert launch_step(loaded) == 3


def test_the_file_holds_the_state_and_nothing_more(tmp_path: Path) -> None:
    model = dash(after=3)
    train(model, 4)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    names = [name.rpartition("weft_site.")[2] for name in file]
    assert sorted(names) == sorted(2 * ["structure.A", "structure.B", *(f"boost.{part}" for part in STATE)] + ["steps"])
    for term, module in zip(terms(model), ("first", "second"), strict=True):
        for part in STATE:
            assert torch.equal(file[f"base_model.model.{module}.weft_site.boost.{part}"], getattr(term, part))
    assert file["base_model.model.first.weft_site.steps"].item() == 4


def test_the_file_of_a_plain_adapter_holds_none_of_it(tmp_path: Path) -> None:
    model = get_peft_model(fresh(), weftlora.PlainLoraConfig(r=2, target_modules=["first", "second"]))
    train(model, 2)
    model.save_pretrained(tmp_path)
    names = [name.rpartition("weft_site.")[2] for name in load_file(tmp_path / "adapter_model.safetensors")]
    assert sorted(names) == ["structure.A", "structure.A", "structure.B", "structure.B"]


def test_a_dash_file_does_not_load_as_a_plain_adapter(tmp_path: Path) -> None:
    dash().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boost": None}))
    with pytest.raises(weftlora.AdapterError, match="has no place for"):
        PeftModel.from_pretrained(fresh(), tmp_path)


# ---------------------------------------------------------------------- param_groups


def named_groups(model: nn.Module, **fields) -> dict[str, dict]:
    """Last part of a parameter's name → its group."""
    groups = weftlora.param_groups(model, **fields)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in parameters(model)}
    by_id = {id(p): {k: v for k, v in g.items() if k != "params"} for g in groups for p in g["params"]}
    return {n.rpartition(".")[2]: by_id[id(p)] for n, p in model.named_parameters() if p.requires_grad}


def test_factors_decay_and_vectors_do_not() -> None:
    for structure, vectors in (
        (weftlora.Plain(), set()),
        (weftlora.Hydra(heads=2), {"router"}),
        (weftlora.Tied(), {"u", "v"}),
    ):
        groups = named_groups(dash(structure=structure), lr=1e-3, weight_decay=0.1)
        assert set(groups) == {"A", "B", "gain"} | vectors
        for name, group in groups.items():
            assert group == {"lr": 1e-3, "weight_decay": 0.1 if name in "AB" else 0.0}


def test_rates_of_their_own() -> None:
    model = dash(structure=weftlora.Hydra(heads=2))
    groups = named_groups(model, lr=1e-3, router_lr=2e-3, gain_lr=0.0)
    assert {n: g["lr"] for n, g in groups.items()} == {"A": 1e-3, "B": 1e-3, "router": 2e-3, "gain": 0.0}
    groups = named_groups(dash(structure=weftlora.Tied()), lr=1e-3, vector_lr=5e-3)
    assert {n: g["lr"] for n, g in groups.items()} == {"A": 1e-3, "B": 1e-3, "u": 5e-3, "v": 5e-3, "gain": 1e-3}


def test_a_shared_factor_can_have_a_multiple_of_the_rate() -> None:
    row = FAMILIES["llama"]
    model = get_peft_model(row.build(), adapter_config("tied_tl6", "llama"))
    groups = named_groups(model, lr=1e-3, weight_decay=0.1, tied_lr_multiplier=3)
    assert {n: g["lr"] for n, g in groups.items()} == {"A": 3e-3, "B": 3e-3, "u": 1e-3, "v": 1e-3}
    assert {n: g["weight_decay"] for n, g in groups.items()} == {"A": 0.1, "B": 0.1, "u": 0.0, "v": 0.0}


def test_what_is_trained_beside_the_adapter_has_its_place() -> None:
    row = FAMILIES["bert"]
    model = get_peft_model(row.build(), adapter_config("plain", "bert", boost=weftlora.Dash(directions=2)))
    groups = named_groups(model, lr=1e-3, weight_decay=0.1, gain_lr=1e-2)
    assert groups["weight"] == {"lr": 1e-3, "weight_decay": 0.1}
    assert groups["bias"] == {"lr": 1e-3, "weight_decay": 0.0}
    assert groups["gain"] == {"lr": 1e-2, "weight_decay": 0.0}
    assert all(group["params"] for group in weftlora.param_groups(model, lr=1.0))


def test_only_the_trained_adapter_is_in_the_groups() -> None:
    model = dash()
    model.add_adapter("other", weftlora.PlainLoraConfig(r=2, target_modules=["first"]))
    count = sum(len(g["params"]) for g in weftlora.param_groups(model, lr=1.0))
    assert count == len(parameters(model)) == 6


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model has no trainable parameters"):
        weftlora.param_groups(dash().requires_grad_(False), lr=1.0)


def test_decay_leaves_the_gains_at_0_until_the_launch() -> None:
    """Even where a user decays everything."""
    for groups in (lambda m: weftlora.param_groups(m, lr=0.1, weight_decay=0.5), parameters):
        model = dash(after=4)
        optimizer = torch.optim.AdamW(groups(model), lr=0.1, weight_decay=0.5)
        for step in range(4):
            train(model, 1, optimizer, step)
            assert all(torch.count_nonzero(term.gain) == 0 for term in terms(model))
        train(model, 1, optimizer, start=4)
        assert all((term.gain != 0).all() for term in terms(model))


@pytest.mark.parametrize("state", [None, [], {"default": None}, {"default": {}}, {"default": {"steps": 0}}])
def test_a_state_that_is_none_is_refused(state) -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), weftlora.LoraDashConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="not a state of schedules"):
        weftlora.load_state_dict(model, state)


def test_attach_refuses_what_it_cannot_use() -> None:
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="no weftlora adapter"):
        weftlora.attach(base, total_steps=10)
    model = get_peft_model(base, weftlora.LoraDashConfig(target_modules=["0"], after=0.5))
    with pytest.raises(ConfigError, match="whole number"):
        weftlora.attach(model, total_steps=10.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be called"):
        weftlora.attach(model, on_event=3)  # type: ignore[arg-type]
    weftlora.attach(model, on_event=print)  # the length may still come
    with pytest.raises(ConfigError, match="needs the length of the run"):
        weftlora.attach(model, steps_per_epoch=4)
