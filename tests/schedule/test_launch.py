"""The launch when something is odd: weights that did not move, values that are not finite, few directions, controls."""

from __future__ import annotations

import warnings

import pytest
import torch
from dashing import (
    HIDDEN,
    IN,
    Net,
    adam,
    assert_same,
    batch,
    dash,
    event,
    init,
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
from peft import get_peft_model
from torch import nn
from torch.optim import SGD

import weftlora
from families import FAMILIES, adapter_config
from weftlora import change_rates
from weftlora.change_rates import decide
from weftlora.errors import ConfigError
from weftlora.host.attach import schedules
from weftlora.progress import Tick
from weftlora.schedule import direction_ranking, processes
from weftlora.schedule.direction_ranking import MeanGate, Ranker

T = 2


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def test_a_launch_before_anything_moved_is_refused_with_a_sentence() -> None:
    model = dash(after=T)
    optimizer = SGD(parameters(model), lr=0.0)
    train(model, 1, optimizer)
    with pytest.raises(ConfigError, match=r"due after step 2, but no weight has moved .*: train longer before it"):
        train(model, 1, optimizer, start=1)
    assert not launched(model)
    optimizer.param_groups[0]["lr"] = 0.1  # who goes on gets the launch as soon as something has moved
    train(model, 1, optimizer, start=2)
    assert launched(model)
    assert launch_step(model) == 3


def test_a_site_that_did_not_move_is_named_and_left_empty() -> None:
    model = dash(after=T)
    sites(model)["second"].structure.B.requires_grad_(False)
    train(model, 1, optimizer := adam(model))
    with pytest.warns(UserWarning, match=r"1 modules such as second have fewer moved directions .*stay empty"):
        train(model, 1, optimizer, start=1)
    first, second = terms(model)
    assert bool(second.launched)
    assert second.index.tolist() == [-1, -1, -1]
    assert torch.count_nonzero(second.up) == torch.count_nonzero(second.down) == 0
    assert (first.index >= 0).all()
    train(model, 2, optimizer, start=2)
    assert torch.count_nonzero(second.gain) == 0
    assert torch.count_nonzero(first.gain) == 3
    assert event(model)["sites"]["second"]["index"] == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["A", "B"])
def test_values_that_are_not_finite_are_reported_with_their_site(part: str, value: float) -> None:
    model = dash(after=T)
    train(model, 1, optimizer := SGD(parameters(model), lr=0.1))
    before = tensors(model)
    getattr(sites(model)["second"].structure, part).data[0, 0] = value
    for p in parameters(model):
        p.grad = torch.zeros_like(p)
    with pytest.raises(ConfigError, match=r"second has values that are not finite at the launch of Dash: lower"):
        optimizer.step()
    assert not launched(model)
    assert all(torch.equal(before[n], t) for n, t in tensors(model).items() if ".boost." in n)


def test_a_base_weight_that_is_not_finite_is_reported_with_its_module() -> None:
    model = dash(after=T)
    train(model, 1, optimizer := adam(model))
    optimizer.zero_grad()
    loss_of(model, batch(1)).backward()
    model.base_model.model.first.base_layer.weight.data[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"base weight of first has values that are not finite"):
        optimizer.step()


def test_more_directions_asked_than_the_weight_has() -> None:
    """W of rank 2: two directions are launched, the other slots stay empty, and it says so."""

    def poor() -> nn.Module:
        net = Net()
        net.first.weight.data = torch.randint(-2, 3, (HIDDEN, 2)).float() @ torch.randint(-2, 3, (2, IN)).float()
        return net

    model = dash(after=T, net=poor)
    train(model, 1, optimizer := adam(model))
    with pytest.warns(UserWarning, match="1 modules such as first have fewer moved directions"):
        train(model, 1, optimizer, start=1)
    first, second = terms(model)
    assert sorted(first.index.tolist()) == [-1, 0, 1]
    assert (second.index >= 0).all()
    for term in terms(model):
        assert all(torch.isfinite(t).all() for t in (term.up, term.down, term.rate, term.sigma))


def test_a_weight_of_zeros_among_others() -> None:
    def net() -> nn.Module:
        made = Net()
        made.second.weight.data.zero_()
        return made

    model = dash(after=T, net=net)
    train(model, 1, optimizer := adam(model))
    with pytest.warns(UserWarning, match="such as second"):
        train(model, 1, optimizer, start=1)
    assert terms(model)[1].index.tolist() == [-1] * 3
    assert event(model)["sites"]["second"]["rate"] == []


@pytest.mark.parametrize("directions", [5, 8, 100])
def test_all_directions_can_be_launched(directions: int) -> None:
    model = dash(after=T, directions=directions)
    train(model, T)
    first, second = terms(model)
    assert len(set(first.index.tolist())) == min(directions, 6)
    assert sorted(second.index.tolist()) == list(range(5))


# ---------------------------------------------------------------------- controls


def test_top_takes_the_largest_sigma() -> None:
    model = dash(after=T, select="top")
    train(model, T)
    for term in terms(model):
        assert term.index.tolist() == [0, 1, 2]
        assert (term.rate > 0).all()


def test_bottom_takes_the_smallest_sigma_that_is_above_the_floor() -> None:
    model = dash(after=T, select="bottom")
    train(model, T)
    for term, site in zip(terms(model), sites(model).values(), strict=True):
        k = min(site.structure.A.shape[1], site.structure.B.shape[0])
        assert term.index.tolist() == [k - 1, k - 2, k - 3]


def test_the_seed_of_the_config_decides_what_random_draws() -> None:
    drawn = []
    for config_seed in (0, 1, 0):
        model = get_peft_model(
            Net(),
            weftlora.LoraDashConfig(
                after=T, select="random", seed=config_seed, r=2, target_modules=["first", "second"]
            ),
        )
        train(model, T)
        drawn.append([term.index.tolist() for term in terms(model)])
    assert drawn[0] == drawn[2] != drawn[1]


def test_random_is_drawn_alike_every_time_and_differently_per_site() -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = dash(after=T, select="random", directions=5, seed=seed)
        train(model, T)
        drawn.append([term.index.tolist() for term in terms(model)])
    assert drawn[0] == drawn[1] == drawn[2]  # neither torch's generator nor the weights decide
    first, second = drawn[0]
    assert first != second
    assert first != sorted(first)
    assert all(len(set(index)) == 5 for index in drawn[0])


def test_decide_is_a_function_of_plain_numbers() -> None:
    rate, sigma = [0.5, 0.0, 0.9, 0.5, 7.0], [4.0, 3.0, 2.0, 1.0, 1e-9]
    assert decide(rate, sigma, 1e-6, 3, "rate", "") == [2, 0, 3]  # 1 did not move, 4 is below the floor
    assert decide(rate, sigma, 1e-6, 2, "top", "") == [0, 2]
    assert decide(rate, sigma, 1e-6, 2, "bottom", "") == [3, 2]
    assert decide(rate, sigma, 0.0, 9, "rate", "") == [4, 2, 0, 3]
    assert sorted(decide(rate, sigma, 1e-6, 9, "random", "s")) == [0, 2, 3]
    assert decide([], [], 0.0, 3, "rate", "") == []


# ---------------------------------------------------------------------- types and layouts


def test_a_bf16_base_is_ranked_as_its_exact_fp32_copy() -> None:
    """Directions, gains and factors are fp32 beside a bf16 base; the rates are those of the exact values."""
    model, copied = (dash(after=T, net=lambda: Net().to(torch.bfloat16)) for _ in range(2))
    assert {p.dtype for p in parameters(model)} == {torch.float32}
    optimizer = adam(model)
    for step in range(T):
        model(batch(step).bfloat16()).float().square().mean().backward()
        optimizer.step()
    for name, site in sites(model).items():
        w = getattr(copied.base_model.model, name).base_layer.weight.detach()
        assert w.dtype == torch.bfloat16
        spec = change_rates.spectrum(w.double())
        term, s = site.boost, site.structure
        rate = change_rates.change_rate(
            spec, change_rates.moved(spec, w.double(), s.A.double(), s.B.double(), site.scale)
        )
        want = change_rates.pick(spec, w.double(), rate, 3)
        assert {t.dtype for t in (term.up, term.down, term.gain)} == {torch.float32}
        assert term.index.tolist() == want.index.tolist()
        assert torch.equal(term.up, want.up.float())
        assert torch.equal(term.down, want.down.float())


def test_autocast_around_the_whole_loop_changes_no_direction() -> None:
    """The optimiser steps inside the autocast block: on the same weights the same directions come out."""
    found = []
    for on in (False, True):
        model = dash(after=1)
        for site in sites(model).values():
            site.structure.B.data = torch.randn(site.structure.B.shape, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            train(model, 1, SGD(parameters(model), lr=0.0))
        found.append(tensors(model))
    assert_same(*found)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "t5", "bert"])
def test_families(family: str) -> None:
    config = adapter_config("plain", family, boost=weftlora.Dash(directions=3, after=T))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(FAMILIES[family].build(), config)
    optimizer = adam(model)
    for _ in range(T + 1):
        model(**FAMILIES[family].batch()).loss.backward()
        optimizer.step()
    assert launch_step(model) == T
    assert all(torch.count_nonzero(term.gain) == 3 for term in terms(model))


def test_each_weight_is_decomposed_once_and_one_at_a_time(monkeypatch) -> None:
    """The launch frees each decomposition before the next: at most one spectrum is alive."""
    import gc
    import weakref

    alive: list[weakref.ref] = []
    most = []
    real = change_rates.spectrum

    def watched(w, *args):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        spec = real(w, *args)
        alive.append(weakref.ref(spec))
        return spec

    monkeypatch.setattr(change_rates, "spectrum", watched)
    model = dash(after=T)
    train(model, T + 2)
    assert most == [0, 0]
    gc.collect()
    assert not any(ref() for ref in alive)


def test_a_model_without_values_can_carry_the_adapter() -> None:
    """On the meta device: to count parameters, or to load values into it later."""
    with torch.device("meta"):
        model = dash(after=T)
    weftlora.attach(model, total_steps=10)
    made = dash(after=T)
    model.to_empty(device="cpu").load_state_dict(made.state_dict())
    train(model, T)
    train(made, T)
    assert launched(model)
    assert_same(tensors(model), tensors(made))


def test_the_forward_never_decomposes(monkeypatch) -> None:
    model = dash(after=T)
    train(model, T)

    def refuse(*_):
        raise AssertionError("a decomposition outside the launch")

    for name in ("svd", "eigh", "svdvals", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    train(model, 2)
    model.eval()
    model(batch(0))
    assert steps(model) == T + 2


def test_a_launch_tells_how_far_it_is_once_for_all_who_ask() -> None:
    ticks: list[Tick] = []
    model = init(after=T, directions=2)  # LoRA-TSD: Dash and Init at one step
    weftlora.attach(model, on_progress=ticks.append)
    train(model, T)
    assert [(tick.phase, tick.done, tick.total) for tick in ticks] == [("ranking directions", n, 2) for n in (1, 2)]


def test_every_site_is_ranked_once_however_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = Ranker(schedules(dash())["default"].members * 2)
    monkeypatch.setattr(Ranker, "_rank_turn", lambda _, numbers, *__: list(numbers))
    for world, split in ((2, False), (3, True), (1, True)):
        monkeypatch.setattr(processes, "world", lambda world=world: world)
        monkeypatch.setattr(direction_ranking, "is_sharded", lambda _, split=split: split)
        assert ranker._rank_all([]) == [0, 1, 2, 3]


def test_the_mean_gate_of_nothing_seen_is_uniform() -> None:
    site = next(iter(sites(dash()).values()))
    for seen in (None, torch.zeros(5, dtype=torch.float64)):
        assert MeanGate(site, seen).mean(4).tolist() == [0.25] * 4
