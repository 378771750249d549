"""Slots that go and come: the function, dead slots, moments of survivors and of new slots, optimisers that cannot follow."""

from __future__ import annotations

import copy

import pytest
import torch
from allocating import adam, alora, bare, batch, controller, events, ranks, train
from dashing import sites
from torch import nn

import weftlora
from weftlora.adapter.site import Site, build_site
from weftlora.schedule import rank_slots as surgery
from weftlora.schedule import schedule
from weftlora.schedule.schedule import owners

HYDRAS = {"hydra": weftlora.Hydra(heads=2), "hydra_Ax": weftlora.Hydra(heads=2, router_input="Ax")}
STRUCTURES = {"plain": weftlora.Plain(), **HYDRAS}


class Listener:
    """Optimisers are known from the first schedule on; these sites have none."""

    def counts(self, optimizer: torch.optim.Optimizer) -> bool:
        return False

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        raise AssertionError


LISTENER = Listener()
schedule.listen(LISTENER)
every_structure = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


def site_of(structure, r: int = 3, max_rank: int = 6) -> Site:
    torch.manual_seed(1)
    site = build_site(structure, (r, 8, 7), scale=2.0, dropout=0.0, ranks=weftlora.Reallocate(max_rank=max_rank))
    with torch.no_grad():
        for p, view in surgery.by_slot(site):
            view(p)[:r] = torch.randn_like(view(p)[:r])
    return site.double()


def trained(site: Site, steps: int = 100, **fields) -> torch.optim.Optimizer:
    """Steps that push every live slot: the same gradient sign all the time."""
    optimizer = torch.optim.AdamW(site.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **fields})
    step(site, optimizer, steps)
    return optimizer


def step(site: Site, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    draw = torch.Generator().manual_seed(4)
    x, y = (torch.randn(4, width, generator=draw).double() for width in (8, 7))
    for _ in range(steps):
        optimizer.zero_grad()
        (site(x, torch.zeros(4, 7).double()) - y).square().mean().backward()
        optimizer.step()


def rows(site: Site, count: int) -> list[torch.Tensor]:
    return [site.fresh_row(torch.Generator().manual_seed(n)) for n in range(count)]


def parts(site: Site, slots: list[int], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Values and moments of these slots, copied."""
    found = []
    for p, view in surgery.by_slot(site):
        found += [view(t)[slots].clone() for t in (p.detach(), *optimizer.state[p].values()) if t.shape == p.shape]
    return found


@every_structure
def test_making_a_slot_changes_nothing_and_pruning_takes_its_share_only(structure) -> None:
    site = site_of(structure)
    x, y = torch.randn(4, 8).double(), torch.zeros(4, 7).double()
    before = site(x, y)
    surgery.move(site, [], [4, 5], rows(site, 2), 1)
    torch.testing.assert_close(site(x, y), before, rtol=0, atol=1e-14)
    assert torch.count_nonzero(site.structure.A[[4, 5]]) == 16
    surgery.move(site, [4, 5, 1], [], [], 2)
    assert site.live() == [0, 2]
    if isinstance(structure, weftlora.Plain):
        a, b = site_of(structure).structure.A, site_of(structure).structure.B
        share = 2.0 * (x @ a[1])[:, None] * b[:, 1]
        torch.testing.assert_close(site(x, y), before - share, rtol=0, atol=1e-12)


@every_structure
def test_dead_slots_stay_exactly_zero_through_adamw_with_decay(structure) -> None:
    site = site_of(structure)
    optimizer = trained(site, 5)
    surgery.move(site, [0, 2], [], [], 1)
    step(site, optimizer, 100)
    for dead in parts(site, [0, 2, 3, 4, 5], optimizer):
        assert torch.count_nonzero(dead) == 0
    assert all(torch.count_nonzero(part) for part in parts(site, [1], optimizer))


@every_structure
@pytest.mark.parametrize("amsgrad", [False, True])
def test_survivors_keep_values_and_moments_bit_for_bit(structure, amsgrad: bool) -> None:
    site = site_of(structure)
    optimizer = trained(site, 5, amsgrad=amsgrad)
    before = parts(site, [1, 2], optimizer)
    surgery.move(site, [0], [4], rows(site, 1), 1)
    assert len(before) >= 6
    for one, other in zip(before, parts(site, [1, 2], optimizer), strict=True):
        assert torch.equal(one, other)


@every_structure
def test_a_slot_made_where_one_died_inherits_nothing(structure) -> None:
    site = site_of(structure)
    optimizer = trained(site, 5)
    state = optimizer.state[site.structure.A]
    surgery.move(site, [0], [], [], 1)
    surgery.move(site, [], [0], rows(site, 1), 2)
    assert torch.equal(site.structure.A[0], rows(site, 1)[0].double())
    assert not any(torch.count_nonzero(view(p)[0]) for p, view in surgery.by_slot(site)[1:])
    assert torch.count_nonzero(state["exp_avg"][0]) == 0
    assert torch.equal(state["exp_avg_sq"][0], state["exp_avg_sq"][[1, 2]].mean(0))
    assert site.birth.tolist() == [2, 0, 0, 0, 0, 0]


def test_new_rows_are_kaiming_each_its_own_and_come_from_no_generator_of_the_run() -> None:
    """Drawn by seed, round, module and slot, so that processes and resumed runs have the same ones."""
    made = []
    for seed in (1, 2, 3):
        model = alora(score="random", first=1, max_rounds=1, move=10, seed=5 if seed == 3 else 4)
        before = torch.manual_seed(seed).get_state()
        train(model, 1)
        assert torch.equal(torch.get_rng_state(), before)
        its = {name: site.structure.A.detach() for name, site in sites(model).items()}
        made.append({(name, slot): its[name][slot].clone() for name, slot in events(model)[0]["added"]})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(row, made[1][each]) for each, row in made[0].items())
    everything = torch.stack([row[:8] for found in (made[0], made[2]) for row in found.values()])
    assert len({tuple(row) for row in everything.tolist()}) == 20
    for row in made[0].values():
        bound = row.numel() ** -0.5
        assert 0.5 * bound < row.abs().max() <= bound


def test_a_new_slot_takes_no_larger_steps_than_the_rate() -> None:
    """β = 0.9, 0.999, a constant gradient, 1000 steps in: without the seed its first steps are 2.5 to 4.6 times the rate."""
    largest = {}
    for seeded in (True, False):
        site, lr = site_of(weftlora.Plain()), 1e-3
        optimizer = torch.optim.AdamW(site.parameters(), lr=lr, weight_decay=0.0)
        draw = torch.Generator().manual_seed(2)
        slopes = {p: torch.randn(view(p).shape[1:], generator=draw) for p, view in surgery.by_slot(site)}

        def push(slopes=slopes, site=site, optimizer=optimizer) -> None:
            for p, view in surgery.by_slot(site):
                p.grad = torch.zeros_like(p)
                view(p.grad)[site.live()] = slopes[p].double()
            optimizer.step()

        for _ in range(1000):
            push()
        surgery.move(site, [0], [4], rows(site, 1), 1)
        if not seeded:
            for p, view in surgery.by_slot(site):
                view(optimizer.state[p]["exp_avg_sq"])[4] = 0
        steps = []
        for _ in range(20):
            before = site.structure.B[:, 4].clone()
            push()
            steps.append(((site.structure.B[:, 4] - before).abs().max() / lr).item())
        largest[seeded] = steps
    assert max(largest[True]) <= 1.5
    assert largest[True][0] == pytest.approx(0.1, abs=0.02)
    assert largest[False][:5] == pytest.approx([2.5, 3.4, 3.9, 4.3, 4.6], abs=0.1)


def test_a_site_without_survivors_counts_its_steps_anew() -> None:
    site = site_of(weftlora.Plain())
    optimizer = trained(site, 50)
    surgery.move(site, [0, 1, 2], [], [], 1)
    assert site.live() == []
    x, y = torch.randn(4, 8).double(), torch.randn(4, 7).double()
    assert torch.equal(site(x, y), y)
    step(site, optimizer, 2)  # trains on: nothing moves
    surgery.move(site, [], [3], rows(site, 1), 2)
    assert [int(optimizer.state[p]["step"]) for p in (site.structure.A, site.structure.B)] == [0, 0]
    before = site.structure.B[:, 3].clone()
    step(site, optimizer)
    assert (site.structure.B[:, 3] - before).abs().max() <= 1.01 * 1e-2


@pytest.mark.parametrize(
    "structure", [weftlora.Plain(), weftlora.Hydra(heads=2, router_input="Ax")], ids=["plain", "hydra_Ax"]
)
def test_a_compiled_graph_masks_where_an_eager_one_leaves_out(structure, monkeypatch) -> None:
    site = site_of(structure)
    surgery.move(site, [1], [], [], 1)
    x, y = torch.randn(4, 8).double(), torch.randn(4, 7).double()
    eager = site(x, y)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert site.factors().A.shape == (6, 8)
    torch.testing.assert_close(site(x, y), eager, rtol=1e-12, atol=1e-12)


def test_a_mask_changed_in_place_or_loaded_is_seen() -> None:
    site = site_of(weftlora.Plain())
    x, y = torch.randn(4, 8).double(), torch.zeros(4, 7).double()
    whole, state = site(x, y), copy.deepcopy(site.state_dict())
    site.mask[2] = 0
    assert not torch.allclose(site(x, y), whole)
    other = copy.deepcopy(site)
    other.mask[0] = 0
    assert site.live() == [0, 1]
    site.load_state_dict(state)
    assert torch.equal(site(x, y), whole)


# ---------------------------------------------------------------------- optimisers


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
        lambda p: torch.optim.Adamax(p, lr=1e-3),
        lambda p: torch.optim.NAdam(p, lr=1e-3),
    ],
    ids=["fused", "amsgrad", "momentum", "sgd", "rmsprop", "adagrad", "adamax", "nadam"],
)
def test_slots_move_under_every_optimiser_whose_state_lies_slot_by_slot(make) -> None:
    model = alora(score="random")
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    train(model, 8, optimizer)
    assert len(events(model)) == 2
    for site in sites(model).values():
        dead = sorted(set(range(len(site.mask))) - set(site.live()))
        for p, view in surgery.by_slot(site):
            first = [t for name, t in optimizer.state[p].items() if name in surgery.FIRST]
            assert all(torch.count_nonzero(view(t)[dead]) == 0 for t in (p, *first))
            assert torch.isfinite(p).all()


class EightBit(torch.optim.SGD):
    """Keeps its moments as bytes, as 8-bit optimisers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["state1"] = torch.zeros_like(p, dtype=torch.uint8)
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "name"), [(lambda p: torch.optim.Adafactor(p), "Adafactor"), (lambda p: EightBit(p, lr=1e-2), "EightBit")]
)
def test_states_that_do_not_fall_into_slots_are_refused_by_name_at_the_first_step(make, name: str) -> None:
    model = alora(first=5)
    said = rf"{name} keeps a state '.*' .*cannot be taken apart by rank.*train with AdamW"
    with pytest.raises(weftlora.ConfigError, match=said):
        train(model, 1, make([p for p in model.parameters() if p.requires_grad]))
    with pytest.raises(weftlora.ConfigError, match=said):
        surgery.check_optimizer(make)  # the same, found without a model


def test_an_optimiser_is_tried_before_training_and_one_that_cannot_be_is_left_to_the_first_step() -> None:
    surgery.check_optimizer(lambda p: torch.optim.AdamW(p, lr=1e-2))
    surgery.check_optimizer(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9))
    surgery.check_optimizer(lambda p: torch.optim.LBFGS(p))  # its step wants a closure


def test_two_optimisers_each_have_their_moments_moved() -> None:
    model = alora(score="random", max_rounds=1)
    a = [p for n, p in model.named_parameters() if n.endswith(".A")]
    b = [p for n, p in model.named_parameters() if n.endswith(".B")]
    one, other = (torch.optim.AdamW(group, lr=1e-2) for group in (a, b))
    for number in range(4):
        model(**batch(number)).loss.backward()
        other.step()
        one.step()
        one.zero_grad()
        other.zero_grad()
    assert len(events(model)) == 1
    for site in sites(model).values():
        assert owners(site.structure.A) == [one]
        dead = sorted(set(range(len(site.mask))) - set(site.live()))
        for p, view in surgery.by_slot(site):
            state = (one if p is site.structure.A else other).state[p]
            assert torch.count_nonzero(view(state["exp_avg"])[dead]) == 0


def test_gradients_kept_over_a_round_do_not_wake_a_dead_slot() -> None:
    model = alora(score="random", max_rounds=1, first=1)
    optimizer = adam(model)
    for number in range(3):  # never zeroed
        model(**batch(number)).loss.backward()
        optimizer.step()
    for site in sites(model).values():
        dead = sorted(set(range(len(site.mask))) - set(site.live()))
        assert torch.count_nonzero(site.structure.A[dead]) == 0


# ---------------------------------------------------------------------- what stops a run before it is too late


def test_without_rows_the_first_step_is_an_error_that_says_so() -> None:
    model = bare(first=3)
    with pytest.raises(weftlora.ConfigError, match=r"was given none: call weftlora\.attach\(model, validation="):
        train(model, 1)


@pytest.mark.parametrize("fields", [{"score": "random"}, {"score": "none"}, {"max_rounds": 0}])
def test_controls_need_no_rows(fields: dict) -> None:
    model = bare(**fields)
    train(model, 8)
    assert len(events(model)) == (2 if fields == {"score": "random"} else 0)


def test_moving_more_than_there_is_is_refused_at_the_first_step() -> None:
    with pytest.raises(weftlora.ConfigError, match=r"takes 28 ranks a round .* that have 28: nothing would be left"):
        train(bare(move=28, score="random"), 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"move": 28}, "nothing would be left"), ({"target_modules": ["0.mlp.up_proj"], "move": 1}, "one adapted module")],
)
def test_and_where_the_length_of_the_run_is_told_before_any_step(fields: dict, says: str) -> None:
    with pytest.raises(weftlora.ConfigError, match=says):
        weftlora.attach(bare(score="random", **fields), total_steps=8)


def test_a_round_after_the_end_of_the_run_is_an_error() -> None:
    with pytest.raises(weftlora.ConfigError, match="the last of 2 rounds of moving ranks is due after step 5"):
        weftlora.attach(bare(), total_steps=5)
    weftlora.attach(bare(), total_steps=6)


def test_a_fraction_needs_the_length_of_the_run() -> None:
    with pytest.raises(weftlora.ConfigError, match=r"due at 0\.5, which needs .*total_steps="):
        train(bare(first=0.5, score="random"), 1)


def test_a_tied_structure_is_refused_with_its_reason() -> None:
    with pytest.raises(weftlora.CombinationError, match="a slot cannot move to another module"):
        weftlora.AllocLoraConfig(structure=weftlora.Tied())


def test_frozen_twins_are_cleared_where_their_slot_changed() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cleared: list[list[int]] = []

        def clear(self, slots: list[int]) -> None:
            self.cleared.append(slots)

    site = site_of(weftlora.Plain())
    site.start = Twins()
    surgery.move(site, [1], [4], rows(site, 1), 1)
    assert site.start.cleared == [[1, 4]]


def test_a_plan_is_applied_whole_or_not_at_all(monkeypatch) -> None:
    """An error between deciding and writing leaves values, moments and masks as they were; the next try does the round."""
    model = alora(max_rounds=1)
    optimizer = adam(model)
    train(model, 2, optimizer)
    monkeypatch.setattr(Site, "fresh_row", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(model, 3, optimizer, start=2)
    assert set(ranks(model).values()) == {2}
    assert controller(model).rounds == 0
    monkeypatch.undo()
    optimizer.zero_grad()
    train(model, 4, optimizer, start=3)
    assert controller(model).rounds == 1
    assert set(ranks(model).values()) != {2}
