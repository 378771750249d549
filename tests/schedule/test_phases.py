"""Before and after the launch: compiled models, merging, disabling, deleting, two adapters in different phases."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from dashing import (
    adam,
    assert_same,
    batch,
    dash,
    launch_step,
    launched,
    loss_of,
    parameters,
    sites,
    steps,
    tensors,
    terms,
    train,
)
from peft import PeftModel

import weftlora
from weftlora.host.attach import schedules

T = 2
OTHER = {"r": 2, "directions": 3, "target_modules": ["first", "second"]}


def trained(count: int = T + 3, **fields) -> PeftModel:
    model = dash(after=T, **fields)
    train(model, count)
    return model.eval()


# ---------------------------------------------------------------------- compiled


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again_at_the_launch() -> None:
    """Directions are written into buffers in place: forward and backward graphs stay; results are the eager ones."""
    torch._dynamo.reset()
    eager, model = dash(after=T), dash(after=T)
    compiled = torch.compile(model, backend="aot_eager")
    of_eager, optimizer = adam(eager), adam(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(T + 3):
            for net, its in ((eager, of_eager), (compiled, optimizer)):
                its.zero_grad()
                loss_of(net, batch(step)).backward()
                its.step()
    assert launch_step(model) == launch_step(eager) == T
    assert all(torch.count_nonzero(term.gain) for term in terms(model))
    for (name, one), other in zip(tensors(model).items(), tensors(eager).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_routed_model_gives_the_eager_results() -> None:
    """Its routers are listened to in the step of the launch, which costs recompilation there."""
    torch._dynamo.reset()
    eager, model = (dash(after=T, structure=weftlora.Hydra(heads=2)) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager")
    of_eager, optimizer = adam(eager, eps=1e-5), adam(model, eps=1e-5)
    for step in range(T + 3):
        for net, its in ((eager, of_eager), (compiled, optimizer)):
            its.zero_grad()
            loss_of(net, batch(step)).backward()
            its.step()
    assert launch_step(model) == T
    for (name, one), other in zip(tensors(model).items(), tensors(eager).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)
    torch._dynamo.reset()


# ---------------------------------------------------------------------- merged, disabled, deleted


@pytest.mark.parametrize("structure", [weftlora.Plain(), weftlora.Tied(group="shape")], ids=["plain", "tied"])
def test_merged_after_the_launch_it_is_the_same_function(structure) -> None:
    model, x = trained(structure=structure), batch(30)
    expected = model(x)
    with model.disable_adapter():
        base = model(x)
    weight = model.base_model.model.first.base_layer.weight.detach().clone()
    assert (expected - base).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.first.base_layer.weight, weight)
    assert torch.equal(model(x), expected)
    gone = model.merge_and_unload()
    torch.testing.assert_close(gone(x), expected, rtol=0, atol=1e-5)


def test_the_gains_are_part_of_what_is_merged() -> None:
    model = trained()
    delta = {n: s.delta_weight() for n, s in sites(model).items()}
    for name, site in sites(model).items():
        term, s = site.boost, site.structure
        want = site.scale * s.B @ s.A + term.up * term.gain @ term.down
        torch.testing.assert_close(delta[name], want.detach(), rtol=0, atol=1e-6)
        assert (term.up * term.gain @ term.down).abs().max() > 1e-3


def test_an_adapter_switched_off_in_between_counts_on() -> None:
    model = dash(after=3)
    optimizer = adam(model)
    train(model, 2, optimizer)
    with model.disable_adapter():
        model(batch(9))
    train(model, 1, optimizer, start=2)
    assert launch_step(model) == 3


def test_two_adapters_in_different_phases_do_not_disturb_each_other() -> None:
    model, x = dash(after=T), batch(30)
    train(model, T + 2)
    first = tensors(model)
    alone = copy.deepcopy(model).eval()(x)
    model.add_adapter("other", weftlora.LoraDashConfig(after=4, **OTHER))
    model.set_adapter("other")
    train(model, 3)
    assert (launched(model), launched(model, "other")) == (True, False)
    model.set_adapter("default")
    assert torch.equal(model.eval()(x), alone)
    model.set_adapter("other")
    train(model, 2)
    assert (steps(model), steps(model, "other")) == (T + 2, 5)
    assert launch_step(model, "other") == 4
    now = tensors(model)
    assert_same({n: t for n, t in now.items() if ".default." in n}, first)


def test_both_adapters_active_and_trained_at_once() -> None:
    model = dash(after=T)
    model.add_adapter("other", weftlora.LoraDashConfig(after=T + 1, **OTHER))
    model.base_model.set_adapter(["default", "other"])
    train(model, T + 2)
    assert (launch_step(model), launch_step(model, "other")) == (T, T + 1)
    x = batch(30)
    both = model.eval()(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, rtol=0, atol=1e-5)


def test_an_adapter_deleted_in_one_phase_leaves_the_other_in_its_own() -> None:
    model = dash(after=T)
    train(model, T + 1)
    model.add_adapter("other", weftlora.LoraDashConfig(after=3, **OTHER))
    model.set_adapter("other")
    train(model, 1)
    model.delete_adapter("default")
    assert list(weftlora.state_dict(model)) == ["other"]
    train(model, 2, start=1)
    assert launch_step(model, "other") == 3


def test_a_name_used_again_starts_from_the_beginning() -> None:
    model = dash(after=T)
    train(model, T)
    model.add_adapter("other", weftlora.PlainLoraConfig(r=2, target_modules=["first"]))
    model.delete_adapter("default")
    model.add_adapter("default", weftlora.LoraDashConfig(after=T, **OTHER))
    model.set_adapter("default")
    assert (steps(model), launched(model)) == (0, False)
    train(model, T)
    assert launch_step(model) == T


def test_saving_one_adapter_of_two_saves_its_phase_only(tmp_path) -> None:
    model = dash(after=T)
    model.add_adapter("other", weftlora.LoraDashConfig(after=T, **OTHER))
    train(model, T)
    model.save_pretrained(tmp_path, selected_adapters=["default", "other"])
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / path / "adapter_model.safetensors") for path in (".", "other"))
    assert one.keys() == other.keys()
    key = "base_model.model.first.weft_site."
    assert (one[key + "steps"].item(), other[key + "steps"].item()) == (T, 0)
    assert (bool(one[key + "boost.launched"]), bool(other[key + "boost.launched"])) == (True, False)


def test_all_that_is_trained_is_in_the_graph_in_both_phases() -> None:
    """No unused parameter, so that DistributedDataParallel needs not search for any."""
    model = dash(after=T)
    optimizer = adam(model)
    for step in range(T + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        assert all(p.grad is not None for p in parameters(model))
        optimizer.step()


# ---------------------------------------------------------------------- an adapter that is not yet what it says


def test_saving_before_the_launch_says_what_is_missing(tmp_path) -> None:
    model = dash(after=T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "untrained")
    train(model, T - 1)
    with pytest.warns(
        UserWarning, match=rf"{T - 1} steps and is still without the launch of Dash \(due after step {T}\)"
    ):
        model.save_pretrained(tmp_path / "early")
    train(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "launched")


def test_a_checkpoint_of_a_run_known_to_go_on_needs_no_warning(tmp_path) -> None:
    model = dash(after=0.5)
    weftlora.attach(model, total_steps=2 * T)
    train(model, T - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    schedule = next(iter(schedules(model).values()))
    assert schedule.missing() is None
    assert "without the launch of Dash" in schedule.missing(over=True)
    train(model, 1)
    assert schedule.missing(over=True) is None


def test_only_the_adapter_that_is_saved_is_spoken_of(tmp_path) -> None:
    model = dash(after=T)
    train(model, 1)
    model.add_adapter("plain", weftlora.PlainLoraConfig(r=2, target_modules=["first"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, selected_adapters=["plain"])


def test_an_earlier_state_loaded_forgets_what_came_later() -> None:
    model = dash(after=T)
    early = copy.deepcopy(model.state_dict())
    train(model, T + 1)
    held = schedules(model)["default"].events
    assert [e["event"] for e in held] == ["dash_launch"]
    later = copy.deepcopy(model.state_dict())
    model.load_state_dict(later)
    assert len(held) == 1
    model.load_state_dict(early)
    assert held == weftlora.state_dict(model)["default"]["events"] == []
    train(model, T)
    assert [e["step"] for e in weftlora.state_dict(model)["default"]["events"]] == [T]
