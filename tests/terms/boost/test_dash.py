"""The Dash slots of one site: empty until their launch, and what the choice refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import weftlora
from weftlora.adapter.site import Site, build_site
from weftlora.change_rates import Directions
from weftlora.errors import ConfigError
from weftlora.terms.boost.dash import Dash, DashTerm
from weftlora.terms.structure.hydra import Hydra
from weftlora.terms.structure.plain import Plain
from weftlora.terms.structure.tied import Tied

IN, OUT, R, S = 6, 5, 2, 3
STRUCTURES = {"plain": Plain(), "hydra": Hydra(heads=3), "tied": Tied()}


def site_of(structure=None, directions: int = S, **fields) -> Site:
    torch.manual_seed(0)
    site = build_site(
        structure or Plain(), (R, IN, OUT), scale=2.0, dropout=0.0, boost=Dash(directions=directions), **fields
    ).double()
    for p in site.structure.parameters():
        nn.init.normal_(p)
    return site


def directions(count: int = S) -> Directions:
    up = torch.linalg.qr(torch.randn(OUT, OUT, dtype=torch.float64))[0][:, :count]
    down = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64))[0][:count]
    return Directions(torch.arange(count) + 1, torch.rand(count).double(), torch.rand(count).double(), up, down)


def update(site: Site, x: torch.Tensor) -> torch.Tensor:
    return site(x, x.new_zeros(*x.shape[:-1], OUT))


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_before_the_launch_the_slots_contribute_exactly_nothing_and_their_gains_get_no_gradient(structure) -> None:
    site, x = site_of(structure), torch.randn(4, IN).double()
    with_slots = update(site, x)
    with_slots.square().sum().backward()
    assert torch.count_nonzero(site.boost.gain.grad) == 0
    assert site.boost.gain.grad is not None  # in the graph: no unused parameter for DistributedDataParallel
    site.boost = None
    torch.testing.assert_close(with_slots, update(site, x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_the_slots_add_gain_times_direction_at_scale_1(structure) -> None:
    """No α/r, no router, no v on them."""
    site, x = site_of(structure), torch.randn(4, IN).double()
    before = update(site, x)
    found = directions()
    site.boost.launch(found)
    assert torch.equal(update(site, x), before)  # gains are 0: the launch itself changes nothing
    site.boost.gain.data = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    extra = x @ (found.up * site.boost.gain @ found.down).T
    torch.testing.assert_close(update(site, x), before + extra, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_a_gain_is_what_the_formula_says() -> None:
    site, x = site_of(), torch.randn(4, IN).double()
    found = directions()
    site.boost.launch(found)
    y = update(site, x)
    g = torch.randn_like(y)
    y.backward(g)
    want = ((x @ found.down.T) * (g @ found.up)).sum(0)
    assert (want != 0).all()
    torch.testing.assert_close(site.boost.gain.grad, want, rtol=1e-12, atol=1e-14)


def test_the_layer_gate_acts_on_the_slots_and_the_rank_mask_does_not() -> None:
    site, x = site_of(), torch.randn(4, IN).double()
    site.boost.launch(directions())
    site.boost.gain.data.fill_(1.0)
    whole = update(site, x)
    site.mask = torch.zeros(R, dtype=torch.float64)
    only_slots = update(site, x)
    assert only_slots.abs().max() > 0
    site.mask, site.layer_gate = None, torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(update(site, x), 0.25 * whole, rtol=1e-12, atol=1e-14)


def test_fewer_directions_leave_the_other_slots_empty() -> None:
    site = site_of()
    site.boost.launch(directions(1))
    term = site.boost
    assert bool(term.launched)
    assert term.index.tolist() == [1, -1, -1]
    assert torch.count_nonzero(term.up[:, 1:]) == torch.count_nonzero(term.down[1:]) == 0
    assert torch.count_nonzero(term.sigma[1:]) == torch.count_nonzero(term.rate[1:]) == 0
    update(site, torch.randn(4, IN).double()).square().sum().backward()
    assert term.gain.grad[0] != 0
    assert torch.count_nonzero(term.gain.grad[1:]) == 0


@pytest.mark.parametrize(("asked", "have"), [(1, 1), (5, 5), (8, 5), (1000, 5)])
def test_there_are_no_more_slots_than_directions(asked: int, have: int) -> None:
    assert DashTerm(Dash(directions=asked), IN, OUT).gain.shape == (have,)


def test_directions_are_buffers_and_only_gains_are_trained() -> None:
    term = DashTerm(Dash(), IN, OUT)
    assert [n for n, _ in term.named_parameters()] == ["gain"]
    assert set(term.state_dict()) == {"gain", "down", "up", "index", "sigma", "rate", "launched"}
    term.requires_grad_(True)
    assert not term.up.requires_grad
    assert not term.down.requires_grad


def test_the_update_in_weight_space_holds_the_slots() -> None:
    site = site_of()
    site.boost.launch(found := directions())
    site.boost.gain.data = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    term = site.structure
    want = 2.0 * term.B @ term.A + found.up * site.boost.gain @ found.down
    torch.testing.assert_close(site.delta_weight(), want.detach(), rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- the choice


def test_defaults_are_those_of_the_paper() -> None:
    paper = {"directions": 8, "after": 100, "eps": 1e-8, "select": "rate", "seed": 0, "pair": "train"}
    assert {field.name: getattr(Dash(), field.name) for field in dataclasses.fields(Dash) if field.init} == paper
    assert weftlora.LoraDashConfig().boost == Dash()
    assert weftlora.LoraDashConfig().lora_alpha == 16


@pytest.mark.parametrize("directions", [0, -1, 1.5, True, None, "8"])
def test_a_number_of_directions_that_is_none(directions) -> None:
    with pytest.raises(ConfigError, match="launches nothing: use a whole number from 1 up"):
        Dash(directions=directions)


@pytest.mark.parametrize("eps", [-1e-9, float("inf"), float("nan"), True, None, "0"])
def test_an_eps_that_is_none(eps) -> None:
    with pytest.raises(ConfigError, match="is not a number from 0 up: use 1e-8"):
        Dash(eps=eps)


@pytest.mark.parametrize("select", ["rates", "lowest", "", None])
def test_an_unknown_selection_names_the_known_ones(select) -> None:
    with pytest.raises(ConfigError, match=r"rate.*\?|random, rate, top"):
        Dash(select=select)


def test_a_misspelt_field_in_a_saved_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'directions'"):
        weftlora.WeftConfig(boost={"kind": "dash", "direction": 4})


@pytest.mark.parametrize("seed", [1.5, True, None, "0"])
def test_a_seed_is_a_whole_number(seed) -> None:
    with pytest.raises(ConfigError, match="is not a seed: use a whole number"):
        Dash(select="random", seed=seed)
