"""The switch when something is odd: nothing moved, values that are not finite, masks, families, copies, two at once."""

from __future__ import annotations

import copy

import pytest
import torch
from dashing import (
    adam,
    assert_same,
    batch,
    dash,
    events,
    init,
    loss_of,
    parameters,
    schedule,
    sites,
    steps,
    switched,
    tensors,
    terms,
    train,
)
from peft import PeftModel, get_peft_model
from switching import base_of, weights
from torch.optim import SGD

import weftlora
from families import FAMILIES, adapter_config, logits
from weftlora.errors import ConfigError
from weftlora.host.attach import schedules

T = 2
CASES = {"init": {}, "tsd": {"directions": 3}}
both = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


@both
def test_before_anything_moved_it_is_refused_and_nothing_is_changed(fields: dict) -> None:
    model = init(after=T, **fields)
    optimizer = SGD(parameters(model), lr=0.0)
    train(model, 1, optimizer)
    before = {n: t for n, t in tensors(model).items() if not n.endswith(".steps")}
    with pytest.raises(ConfigError, match=r"the switch of LoRA-Init is due after step 2, but no weight has moved"):
        train(model, 1, optimizer, start=1)
    assert_same({n: t for n, t in tensors(model).items() if not n.endswith(".steps")}, before)
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, 1, optimizer, start=2)
    assert {e["step"] for e in events(model).values()} == {3}


@both
def test_values_that_are_not_finite_stop_both_before_either_is_applied(fields: dict) -> None:
    model = init(after=T, **fields)
    train(model, 1, optimizer := SGD(parameters(model), lr=0.1))
    sites(model)["second"].structure.A.data[0, 0] = torch.nan
    for p in parameters(model):
        p.grad = torch.zeros_like(p)
    both_due = "the switch of LoRA-Init and the launch of Dash" if fields else "the switch of LoRA-Init"
    with pytest.raises(ConfigError, match=rf"second has values that are not finite at {both_due}: lower"):
        optimizer.step()
    assert not switched(model)
    assert not schedule(model).events
    for term in [site.start for site in sites(model).values()] + (terms(model) if fields else []):
        assert all(torch.count_nonzero(t) == 0 for n, t in term.state_dict().items() if n != "index")


class Recorded:
    """A controller that notes when it is asked and when it applies."""

    def __init__(self, name: str, log: list[str], fails: bool = False):
        self.what, self.log, self.fails, self.over = name, log, fails, False

    def due(self, _length) -> int:
        return 1

    def done(self) -> bool:
        return self.over

    def check(self, _length) -> None:
        pass

    def before_step(self, _step, _length) -> None:
        pass

    def plan(self, _step, _length, _optimizer):
        self.log.append(f"{self.what} measures")
        if self.fails:
            raise ConfigError("it cannot")
        return self.apply

    def apply(self) -> dict:
        self.log.append(f"{self.what} applies")
        self.over = True
        return {"event": self.what}


def test_all_who_are_due_have_measured_before_the_first_applies() -> None:
    model, log = init(after=9), []
    schedule(model).controllers[:] = [Recorded("one", log), Recorded("other", log)]
    train(model, 2)
    assert log == ["one measures", "other measures", "one applies", "other applies"]
    assert [(e["event"], e["step"]) for e in schedule(model).events] == [("one", 1), ("other", 1)]


def test_if_one_of_them_cannot_none_is_applied() -> None:
    model, log = init(after=9), []
    schedule(model).controllers[:] = [Recorded("one", log), Recorded("other", log, fails=True)]
    with pytest.raises(ConfigError, match="it cannot"):
        train(model, 1)
    assert log == ["one measures", "other measures"]
    assert not schedule(model).events


def test_a_site_that_did_not_move_starts_as_plain_lora_does() -> None:
    model = init(after=T)
    sites(model)["second"].structure.B.requires_grad_(False)
    train(model, T - 1, optimizer := adam(model))
    with pytest.warns(UserWarning, match=r"1 modules such as second have fewer moved directions than rank slots"):
        train(model, 1, optimizer, start=T - 1)
    second = sites(model)["second"]
    assert second.start.index.tolist() == [-1, -1]
    assert torch.count_nonzero(second.delta_weight()) == 0
    torch.testing.assert_close(second.structure.A.norm(dim=1), torch.ones(2))
    assert events(model)["start_switch"]["sites"]["second"]["index"] == []


def test_slots_that_the_rank_mask_has_off_take_no_direction_and_stay_as_they_are() -> None:
    """Reallocated ranks: a site with three of four slots on takes three directions; the dead slot stays exactly 0."""
    model, x = init(after=T, r=4), batch(50)
    for site in sites(model).values():
        site.mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
        site.structure.A.data[1], site.structure.B.data[:, 1] = 0.0, 0.0
    expected = base_of(model, x)
    train(model, T)
    for site in sites(model).values():
        assert (site.start.index >= 0).tolist() == [True, False, True, True]
        assert torch.count_nonzero(site.structure.A[1]) == torch.count_nonzero(site.structure.B[:, 1]) == 0
        assert torch.count_nonzero(site.start.down[1]) == torch.count_nonzero(site.start.up[:, 1]) == 0
    assert len(events(model)["start_switch"]["sites"]["first"]["index"]) == 3
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-6)
    for site in sites(model).values():
        site.mask = torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-6)  # a twin goes with its slot


def test_dash_due_when_nothing_has_moved_since_the_switch_is_refused() -> None:
    """At a rate of 0 after the switch, ΔW is exactly 0, not rounding: no directions are made up from it."""
    model = dash(after=T + 1, start=weftlora.Directions(after=T), lora_alpha=0.7)
    train(model, T, optimizer := adam(model))
    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
    with pytest.raises(ConfigError, match=r"the launch of Dash is due after step 3, but no weight has moved"):
        train(model, 1, optimizer, start=T)


def test_saving_before_the_switch_says_what_is_missing(tmp_path) -> None:
    model = init(after=T, directions=3)
    train(model, T - 1)
    missing = r"without the switch of LoRA-Init \(due after step 2\) and the launch of Dash \(due after step 2\)"
    with pytest.warns(UserWarning, match=missing):
        model.save_pretrained(tmp_path)


def test_times_that_need_the_length_of_the_run_are_asked_for_and_checked() -> None:
    model = init(after=0.5)
    with pytest.raises(ConfigError, match=r"the switch of LoRA-Init is due at 0.5, which needs the length"):
        train(model, 1)
    model = init(after=0.5)
    weftlora.attach(model, total_steps=4)
    train(model, 2)
    assert events(model)["start_switch"]["step"] == 2
    with pytest.raises(ConfigError, match=r"due after step 9, but the run ends after 4"):
        weftlora.attach(init(after=9), total_steps=4)


@both
def test_a_copy_made_in_the_pre_launch_switches_by_itself(fields: dict) -> None:
    model = init(after=T, **fields)
    train(model, 1)
    twin = copy.deepcopy(model)
    train(twin, 1, start=1)
    assert (steps(model), steps(twin)) == (1, 2)
    assert (switched(model), switched(twin)) == (False, True)


def test_two_adapters_switch_at_their_own_times() -> None:
    model, x = init(after=T), batch(50)
    train(model, T + 1)
    model.add_adapter("other", weftlora.LoraTsdConfig(r=2, after=1, directions=2, target_modules=["first", "second"]))
    first = {n: t for n, t in tensors(model).items() if ".default." in n}
    model.set_adapter("other")
    train(model, 1)
    assert switched(model, "other")
    torch.testing.assert_close(model(x), base_of(model, x), rtol=0, atol=2e-6)
    assert_same({n: t for n, t in tensors(model).items() if ".default." in n}, first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "t5", "bert", "plain"])
@pytest.mark.parametrize("boost", [None, weftlora.Dash(directions=2, after=T)], ids=["init", "tsd"])
def test_families_return_to_their_pretrained_function_and_save_what_they_are(family: str, boost, tmp_path) -> None:
    """gpt2's Conv1D keeps W transposed; bert's head is trained beside the adapter, so it is left alone here."""
    row = FAMILIES[family]
    config = adapter_config("plain", family, start=weftlora.Directions(after=T), boost=boost, heads_too=False)
    model = get_peft_model(row.build(), config)
    expected, optimizer = logits(row.build(), row.batch()), adam(model)
    for step in range(T):
        optimizer.zero_grad()
        model(**row.batch()).loss.backward()
        optimizer.step()
        if step < T - 1:
            assert (logits(model, row.batch()) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, row.batch()), expected, rtol=0, atol=2e-5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**row.batch()).loss.backward()
        optimizer.step()
    trained = logits(model, row.batch())
    assert (trained - expected).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(row.build(), tmp_path, adapter_name="other", low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded, row.batch()), trained)
    if row.from_transformers:
        base = row.build()
        base.load_adapter(str(tmp_path), adapter_name="other")
        assert torch.equal(logits(base, row.batch()), trained)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, row.batch()), trained)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, row.batch()), trained, rtol=0, atol=2e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, row.batch()), trained)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, row.batch()), trained, rtol=0, atol=2e-5)


@pytest.mark.slow
@both
def test_a_compiled_model_is_not_compiled_again_at_the_switch(fields: dict) -> None:
    """A, B and their twins are written in place: forward and backward graphs stay; results are the eager ones."""
    torch._dynamo.reset()
    eager, model = init(after=T, **fields), init(after=T, **fields)
    compiled = torch.compile(model, backend="aot_eager")
    of_eager, optimizer = adam(eager, eps=1e-5), adam(model, eps=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(T + 3):
            for net, its in ((eager, of_eager), (compiled, optimizer)):
                its.zero_grad()
                loss_of(net, batch(step)).backward()
                its.step()
    assert switched(model)
    for (name, one), other in zip(tensors(model).items(), tensors(eager).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)
    torch._dynamo.reset()


def test_the_kept_decompositions_serve_the_switch_too(tmp_path) -> None:
    models = [init(after=T, directions=3) for _ in range(2)]
    for model in models:
        weftlora.attach(model, cache=tmp_path)
        train(model, T)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(weights(models[0]))
    assert_same(tensors(models[0]), tensors(models[1]))
    assert not schedules(models[0])["default"].pending()
