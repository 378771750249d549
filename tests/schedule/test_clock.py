"""Optimiser steps are counted, and nothing else: a loop that has never heard of weftlora launches after step N exactly."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dashing import (
    Net,
    adam,
    assert_same,
    batch,
    dash,
    launch_step,
    launched,
    loss_of,
    parameters,
    schedule,
    sites,
    steps,
    tensors,
    terms,
    train,
)
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

import weftlora
from families import FAMILIES
from weftlora.schedule import schedule as clock

N = 3


def test_a_plain_loop_launches_after_step_n_exactly() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net(), weftlora.LoraDashConfig(after=N, target_modules=["first", "second"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for step in range(5):
        x = batch(step)
        loss = (model(x) - x[:, :5]).square().mean()
        seen.append((steps(model), launched(model)))
        loss.backward()
        seen.append((steps(model), launched(model)))
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [s for n in range(5) for s in [(n, n >= N)] * 2]
    assert launch_step(model) == N


def test_deepspeed_whose_steps_cannot_be_counted_is_refused_where_something_is_to_happen() -> None:
    def stepped(config: weftlora.WeftConfig) -> nn.Module:
        """Under stage 2, as DeepSpeed leaves it: the optimiser holds a tensor of its own, and each parameter knows its piece of it."""
        model = get_peft_model(Net(), config)
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters(model)]))
        optimizer = SGD([flat], lr=0.1)
        for p in parameters(model):
            p._hp_mapping = SimpleNamespace(hp_fragment=flat.detach().narrow(0, 0, p.numel()))
        flat.grad = torch.ones_like(flat)
        optimizer.step()
        return model

    stepped(weftlora.PlainLoraConfig(target_modules=["first"]))
    with pytest.raises(weftlora.ConfigError, match="DeepSpeed's ZeRO steps on tensors of its own"):
        stepped(weftlora.LoraDashConfig(target_modules=["first"]))
    third = get_peft_model(Net(), weftlora.LoraDashConfig(target_modules=["first"]))
    for p in parameters(third):
        p.ds_id = 0  # stage 3
    with pytest.raises(weftlora.ConfigError, match="waits for"):
        weftlora.attach(third, total_steps=200)


def test_the_default_is_the_papers_100() -> None:
    model = get_peft_model(Net(), weftlora.LoraDashConfig(target_modules=["first"]))
    optimizer = SGD(parameters(model), lr=0.1)
    train(model, 99, optimizer)
    assert not launched(model)
    train(model, 1, optimizer, start=99)
    assert launched(model)
    assert launch_step(model) == 100


# ---------------------------------------------------------------------- every optimiser of torch counts


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=1e-2),
    "foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "for-loop": lambda p: AdamW(p, lr=1e-2, foreach=False),
    "fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimiser_counts_and_goes_on_after_the_launch(make) -> None:
    model = dash(after=N)
    optimizer = make(parameters(model))
    train(model, N, optimizer)
    assert launched(model)
    train(model, 2, optimizer, start=N)
    assert steps(model) == N + 2
    assert launch_step(model) == N
    assert all(torch.count_nonzero(term.gain) == 3 for term in terms(model))


def test_a_learning_rate_schedule_wraps_the_step_and_changes_nothing() -> None:
    model = dash(after=N)
    optimizer = adam(model)
    schedule_of_lr = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(N):
        assert steps(model) == step
        train(model, 1, optimizer, step)
        schedule_of_lr.step()
    assert launch_step(model) == N


def test_a_closure_that_runs_the_model_many_times_is_one_step() -> None:
    model = dash(after=2)
    optimizer = torch.optim.LBFGS(parameters(model), lr=0.1, max_iter=4)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    for n in (1, 2):
        optimizer.step(closure)
        assert steps(model) == n
    assert len(calls) > 4
    assert launch_step(model) == 2


def test_a_compiled_step_counts_without_being_compiled_again() -> None:
    model = dash(after=4)
    optimizer = adam(model)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for n in range(10):
            optimizer.zero_grad()
            loss_of(model, batch(n)).backward()
            step()
            assert steps(model) == n + 1
            if n == 5:  # the launch leaves one change behind: the fresh moments of the gains
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert launch_step(model) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


# ---------------------------------------------------------------------- what is no step


@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_accumulation_does_not_change_when(accumulation: int) -> None:
    model = dash(after=N)
    optimizer = adam(model)
    for micro in range(4 * accumulation):
        loss_of(model, batch(micro)).backward()
        if (micro + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert steps(model) == 4
    assert launch_step(model) == N


def test_evaluation_and_generation_in_between_are_no_steps() -> None:
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.LoraDashConfig(after=2, r=2, directions=2))
    given, optimizer = FAMILIES["llama"].batch(), adam(model)
    for step in (1, 2, 3):
        model.train()
        model(**given).loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            for _ in range(3):
                model(**given)
        model.generate(input_ids=given["input_ids"], max_new_tokens=4, do_sample=False)
        assert (steps(model), launched(model)) == (step, step >= 2)
    assert launch_step(model) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_does_not_change_when(reentrant: bool) -> None:
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.LoraDashConfig(after=2, r=2, directions=2))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    optimizer = adam(model)
    for step in (1, 2, 3):
        model.train()
        model(**FAMILIES["llama"].batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (steps(model), launched(model)) == (step, step >= 2)


def test_a_module_called_twice_per_forward_does_not_change_when() -> None:
    model = dash(after=N, net=lambda: Net(twice=True))
    train(model, N + 1)
    assert launch_step(model) == N


# ---------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize("fields", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
@pytest.mark.parametrize("unscale", [True, False])
def test_steps_that_a_grad_scaler_skips_do_not_count(fields: dict, unscale: bool) -> None:
    model = dash(after=N)
    optimizer, scaler = adam(model, **fields), torch.amp.GradScaler("cpu", init_scale=8.0)
    counted = 0
    for n, overflow in enumerate([False, True, False, True, True, False, False]):
        before = [p.detach().clone() for p in parameters(model)]
        scaler.scale(loss_of(model, batch(n))).backward()
        if overflow:
            parameters(model)[0].grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counted += not overflow
        assert (steps(model), launched(model)) == (counted, counted >= N)
        moved = any(not torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
        assert moved is not overflow
    assert launch_step(model) == N
    train(model, 1, optimizer)  # without the scaler again
    assert steps(model) == counted + 1


# ---------------------------------------------------------------------- whose step


def test_a_step_that_finds_no_gradient_does_not_count() -> None:
    """It changes nothing: a host that wants to take none drops the gradients."""
    model = dash(after=3)
    optimizer = adam(model)
    train(model, 1, optimizer)
    before = tensors(model)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(tensors(model), before)
    train(model, 2, optimizer, start=1)
    assert (steps(model), launch_step(model)) == (3, 3)


def test_with_several_optimisers_one_of_them_counts() -> None:
    """Matrices and gains apart, as with Muon beside AdamW; whichever steps first."""
    for order in ((0, 1), (1, 0)):
        model = dash(after=N)
        matrices = [p for p in parameters(model) if p.dim() > 1]
        gains = [p for p in parameters(model) if p.dim() == 1]
        optimizers = [SGD(matrices, lr=0.1), AdamW(gains, lr=1e-2)]
        for n in range(N + 2):
            assert (steps(model), launched(model)) == (n, n >= N)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(model, batch(n)).backward()
            for which in order:
                optimizers[which].step()
        assert launch_step(model) == N
        assert all(torch.count_nonzero(term.gain) for term in terms(model))


def test_an_optimiser_of_something_else_counts_nothing() -> None:
    model, head = dash(after=2), nn.Linear(5, 2)
    mine, other = adam(model), SGD(head.parameters(), lr=0.1)
    for n in range(3):
        assert steps(model) == n
        head(model(batch(n))).square().mean().backward()
        other.step()
        assert steps(model) == n
        mine.step()


def test_an_optimiser_over_a_part_of_the_adapter_counts() -> None:
    """Only B in the optimiser, without freezing A: it must not silently stay plain LoRA."""
    model = dash(after=2)
    optimizer = AdamW([p for n, p in model.named_parameters() if n.endswith(".B")], lr=1e-2)
    train(model, 3, optimizer)
    assert launch_step(model) == 2


def test_another_optimiser_takes_over() -> None:
    model = dash(after=4)
    train(model, 2, adam(model))
    train(model, 1, SGD(parameters(model), lr=0.1), start=2)
    optimizer = AdamW([p for n, p in model.named_parameters() if n.endswith(".B") and "second" in n], lr=1e-2)
    gc.collect()
    train(model, 2, optimizer, start=3)
    assert steps(model) == 5
    assert launch_step(model) == 4


class Lookahead(torch.optim.Optimizer):
    """An optimiser that steps another one on the same parameters."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        return self.inner.step(closure)


def test_a_step_within_a_step_is_one_step() -> None:
    model = dash(after=N)
    optimizer = Lookahead(adam(model))
    for n in range(N + 1):
        train(model, 1, optimizer, n)
        assert steps(model) == n + 1
    assert launch_step(model) == N
    assert all(torch.count_nonzero(term.gain) for term in terms(model))


def test_a_step_that_raised_is_forgotten() -> None:
    """An outer optimiser that failed half-way is not mistaken for one that is still running."""
    model = dash(after=9)
    inner = adam(model)
    outer = Lookahead(inner)

    def fail() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outer.step(fail)
    assert steps(model) == 0
    train(model, 2, inner)
    assert steps(model) == 2


def test_two_models_do_not_disturb_each_other() -> None:
    one, two = dash(after=2), dash(after=4)
    of_one, of_two = adam(one), adam(two)
    train(one, 3, of_one)
    assert (steps(one), steps(two)) == (3, 0)
    assert (launched(one), launched(two)) == (True, False)
    train(two, 4, of_two)
    assert (steps(one), steps(two)) == (3, 4)
    assert (launch_step(one), launch_step(two)) == (2, 4)


def test_one_optimiser_of_two_models_counts_for_both() -> None:
    one, two = dash(after=2), dash(after=3)
    optimizer = AdamW([*parameters(one), *parameters(two)], lr=1e-2)
    for n in range(3):
        (loss_of(one, batch(n)) + loss_of(two, batch(n))).backward()
        optimizer.step()
    assert (launch_step(one), launch_step(two)) == (2, 3)


def test_of_two_adapters_only_the_trained_one_counts() -> None:
    model = dash(after=2)
    model.add_adapter("other", weftlora.LoraDashConfig(after=3, r=2, directions=3, target_modules=["first", "second"]))
    train(model, 3)
    assert (steps(model), steps(model, "other")) == (3, 0)
    assert (launched(model), launched(model, "other")) == (True, False)
    model.set_adapter("other")
    train(model, 2)
    assert (steps(model), steps(model, "other")) == (3, 2)
    train(model, 1)
    assert launch_step(model, "other") == 3


def test_a_frozen_adapter_never_counts(tmp_path) -> None:
    model = dash(after=2)
    train(model, 1)
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    head = nn.Linear(5, 2)
    optimizer = AdamW([*head.parameters(), *loaded.parameters()], lr=1e-2)
    for n in range(3):
        head(loaded(batch(n))).square().mean().backward()
        optimizer.step()
    assert (steps(loaded), launched(loaded)) == (1, False)


@pytest.mark.parametrize("saved", [1, 2, 3])
def test_torch_distributed_checkpoint_takes_no_step_and_goes_on_as_one_run(saved: int, tmp_path: Path) -> None:
    """It makes an optimiser's state by a step of its own. At 2 the launch has just made the gains' moments new."""

    def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    whole, begun, resumed = (dash(after=2) for _ in range(3))
    train(whole, 5)
    train(begun, saved, optimizer := adam(begun))
    dcp.save(state_of(begun, optimizer), checkpoint_id=tmp_path, no_dist=True)
    found = state_of(resumed, optimizer := adam(resumed))
    assert (steps(resumed), launched(resumed)) == (0, False)
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(resumed, found["model"])
    set_optimizer_state_dict(resumed, optimizer, found["optimizer"])
    assert (steps(resumed), launched(resumed)) == (saved, saved >= 2)
    train(resumed, 5 - saved, optimizer, start=saved)
    assert_same(tensors(resumed), tensors(whole))


# ---------------------------------------------------------------------- hosts that replace things


@pytest.mark.parametrize("overwrite", [True, False])
def test_parameters_replaced_by_a_cast_are_still_counted(overwrite: bool) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        model = dash(after=2)
        old = parameters(model)[0]
        model.to(torch.float64)
        assert (parameters(model)[0] is old) is not overwrite
        train(model, 3)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert launch_step(model) == 2


def test_parameters_replaced_by_hand_in_mid_run_are_still_counted() -> None:
    model = dash(after=4)
    optimizer = adam(model)
    train(model, 2, optimizer)
    model.base_model._cast_adapter_dtype("default", True)
    for site in sites(model).values():
        site.structure.A = nn.Parameter(site.structure.A.detach().clone())
        site.structure.B = nn.Parameter(site.structure.B.detach().clone())
        site.boost.gain = nn.Parameter(site.boost.gain.detach().clone())
    new = adam(model)  # the old one is alive and holds the orphans
    train(model, 3, new, start=2)
    assert steps(model) == 5
    assert launch_step(model) == 4
    optimizer.step()
    assert steps(model) == 5


def test_a_copy_counts_for_itself() -> None:
    model = dash(after=3)
    train(model, 1)
    copied = copy.deepcopy(model)
    assert schedule(copied) is not schedule(model)
    assert {m.site for m in schedule(copied).members} == set(sites(copied).values())
    train(copied, 2, start=1)
    assert (steps(model), launched(model)) == (1, False)
    assert (steps(copied), launched(copied)) == (3, True)
    train(model, 2, start=1)
    assert launched(model)
    for one, other in zip(terms(model), terms(copied), strict=True):
        assert torch.equal(one.up, other.up)


def test_models_that_are_gone_leave_no_listener() -> None:
    gc.collect()
    before = len(clock._listeners)
    models = [dash(after=2) for _ in range(3)]
    optimizers = [adam(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, 3, optimizer)
    watched = [weakref.ref(schedule(model)) for model in models]
    assert len(clock._listeners) == before + 3
    del models, optimizers, model, optimizer
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
    assert len(clock._listeners) == before


def test_listeners_are_called_in_the_order_they_were_made() -> None:
    """On several processes all must launch in one order: their collective calls have to meet."""
    made = [dash(after=1) for _ in range(20)]
    order = [s for s in clock._listeners.values() if s in {schedule(m) for m in made}]
    assert order == [schedule(m) for m in made]


def test_a_deleted_adapter_launches_nothing() -> None:
    model = dash(after=2)
    model.add_adapter("other", weftlora.LoraDashConfig(after=5, r=2, directions=3, target_modules=["first", "second"]))
    optimizer = adam(model)
    train(model, 1, optimizer)
    model.delete_adapter("default")
    model.set_adapter("other")
    gc.collect()
    optimizer.step()  # still holds the deleted adapter's parameters
    assert steps(model, "other") == 0


def test_zero_redundancy_steps_count_once() -> None:
    """Its inner optimiser holds this process's share; only the outer one is the same everywhere."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("torch.distributed is not available, or in use")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = dash(after=N)
        optimizer = ZeroRedundancyOptimizer(parameters(model), AdamW, lr=1e-2)
        for n in range(N + 1):
            train(model, 1, optimizer, n)
            assert steps(model) == n + 1
        assert launch_step(model) == N
    finally:
        dist.destroy_process_group()
