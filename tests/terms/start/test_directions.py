"""The frozen twins of one site, the values that A and B start from, and what the choice refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import weftlora
from weftlora import change_rates
from weftlora.adapter.site import Site, build_site
from weftlora.errors import CombinationError, ConfigError
from weftlora.terms.start.directions import Directions, DirectionsTerm, start_values
from weftlora.terms.structure.plain import Plain

IN, OUT, R, SCALE = 6, 5, 3, 2.0


def found(sigma: list[float]) -> change_rates.Directions:
    s = len(sigma)
    up = torch.linalg.qr(torch.randn(OUT, OUT, dtype=torch.float64))[0][:, :s]
    down = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64))[0][:s]
    return change_rates.Directions(torch.arange(s) + 7, torch.tensor(sigma).double(), torch.rand(s).double(), up, down)


def site_of(**fields) -> Site:
    torch.manual_seed(0)
    site = build_site(Plain(), (R, IN, OUT), scale=SCALE, dropout=0.0, start=Directions(**fields)).double()
    site.structure.B.data.normal_()
    return site


def switch(site: Site, directions: change_rates.Directions, live: list[int] | None = None) -> torch.Tensor:
    slots = torch.tensor(list(range(R)) if live is None else live)
    return site.start.switch(directions, site.structure.A, site.structure.B, slots, SCALE, 1.0)


def update(site: Site, x: torch.Tensor) -> torch.Tensor:
    return site(x, x.new_zeros(*x.shape[:-1], OUT))


# ---------------------------------------------------------------------- before and after the switch


def test_before_the_switch_the_site_is_plain_lora() -> None:
    site, x = site_of(), torch.randn(4, IN).double()
    plain = SCALE * x @ site.structure.A.T @ site.structure.B.T
    torch.testing.assert_close(update(site, x), plain, rtol=1e-12, atol=1e-14)
    assert not site.start.launched


def test_the_product_is_ws_part_along_the_directions_and_the_update_is_zero() -> None:
    site, x, directions = site_of(), torch.randn(4, IN).double(), found([0.9, 0.5, 0.2])
    assert switch(site, directions).tolist() == [True] * 3
    part = directions.up * directions.sigma @ directions.down
    torch.testing.assert_close(SCALE * site.structure.B @ site.structure.A, part, rtol=0, atol=1e-12)
    torch.testing.assert_close(update(site, x), x.new_zeros(4, OUT), rtol=0, atol=1e-12)
    assert site.start.index.tolist() == [7, 8, 9]
    assert site.start.launched


def test_what_is_trained_is_ba_minus_the_frozen_product() -> None:
    site, x = site_of(), torch.randn(4, IN).double()
    switch(site, found([0.9, 0.5, 0.2]))
    frozen = site.structure.B.detach() @ site.structure.A.detach()
    with torch.no_grad():
        site.structure.A += 0.1
        site.structure.B -= 0.2
    want = SCALE * (site.structure.B @ site.structure.A - frozen)
    torch.testing.assert_close(site.delta_weight(), want.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(update(site, x), x @ want.T, rtol=0, atol=1e-12)


def test_a_twin_is_switched_off_with_its_slot_and_follows_the_layer_gate() -> None:
    site, x = site_of(), torch.randn(4, IN).double()
    switch(site, found([0.9, 0.5, 0.2]))
    with torch.no_grad():
        site.structure.A += 0.1
    whole, term = update(site, x), site.start
    site.mask = torch.tensor([0.0, 1.0, 0.0]).double()
    one = SCALE * (torch.outer(site.structure.B[:, 1], site.structure.A[1]) - torch.outer(term.up[:, 1], term.down[1]))
    torch.testing.assert_close(update(site, x), x @ one.T, rtol=0, atol=1e-12)
    site.mask, site.layer_gate = None, torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(update(site, x), 0.25 * whole, rtol=0, atol=1e-12)


def test_only_live_slots_are_started_and_the_others_are_left_as_they_are() -> None:
    site = site_of()
    before = {n: p.detach().clone() for n, p in site.structure.named_parameters()}
    directions = found([0.9, 0.5])
    switch(site, directions, live=[0, 2])
    assert torch.equal(site.structure.A[1], before["A"][1])
    assert torch.equal(site.structure.B[:, 1], before["B"][:, 1])
    assert torch.count_nonzero(site.start.down[1]) == torch.count_nonzero(site.start.up[:, 1]) == 0
    assert site.start.index.tolist() == [7, -1, 8]
    product = SCALE * torch.outer(site.structure.B[:, 2], site.structure.A[2])
    torch.testing.assert_close(product, 0.5 * torch.outer(directions.up[:, 1], directions.down[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("twins", [torch.float32, torch.bfloat16], ids=str)
def test_twins_are_the_same_values_in_any_mixture_of_dtypes(factors: torch.dtype, twins: torch.dtype) -> None:
    site = site_of()
    site.structure.to(factors)
    site.start.to(twins)
    switch(site, found([0.9, 0.5, 0.2]))
    assert torch.equal(site.structure.A.double(), site.start.down.double())
    assert torch.equal(site.structure.B.double(), site.start.up.double())


def test_twins_are_buffers_and_nothing_more_is_trained() -> None:
    term = DirectionsTerm(Directions(), R, IN, OUT)
    assert not list(term.parameters())
    assert set(term.state_dict()) == {"down", "up", "index", "sigma", "rate", "launched"}
    assert set(DirectionsTerm(Directions(mode="directions"), R, IN, OUT).state_dict()) == {
        "index",
        "sigma",
        "rate",
        "launched",
    }


# ---------------------------------------------------------------------- the values


def test_the_split_is_symmetric_and_takes_the_scale_out() -> None:
    directions = found([0.9, 0.5, 0.2])
    a, b, frozen = start_values(directions, torch.randn(3, IN), OUT, Directions(), 3.0, 0.9)
    assert frozen.all()
    torch.testing.assert_close(a, (directions.sigma / 3.0).sqrt()[:, None] * directions.down, rtol=1e-12, atol=0)
    torch.testing.assert_close(b, directions.up * (directions.sigma / 3.0).sqrt(), rtol=1e-12, atol=0)


def test_the_guard_starts_small_sigma_with_a_row_and_no_column() -> None:
    directions = found([0.9, 1e-4, 0.2])
    a, b, frozen = start_values(directions, torch.randn(3, IN), OUT, Directions(guard=1e-3, kappa=0.5), 1.0, 0.9)
    assert frozen.tolist() == [True, False, True]
    torch.testing.assert_close(a[1], 0.5 * directions.down[1], rtol=1e-12, atol=0)
    assert torch.count_nonzero(b[:, 1]) == 0


def test_the_guard_is_a_share_of_the_weights_largest_sigma() -> None:
    """Of the whole W, of which the directions at hand need not hold the largest."""
    for largest, guarded in ((1e4, True), (1e2, False)):
        frozen = start_values(found([0.1]), torch.randn(1, IN), OUT, Directions(guard=1e-4), 1.0, largest)[2]
        assert frozen.tolist() == [not guarded]
    exactly = start_values(found([0.25]), torch.randn(1, IN), OUT, Directions(guard=0.125), 1.0, 2.0)[2]
    assert exactly.tolist() == [False]


def test_slots_beyond_the_directions_keep_where_their_row_points() -> None:
    rows = torch.randn(3, IN)
    a, b, frozen = start_values(found([0.9]), rows, OUT, Directions(kappa=2.0), 1.0, 0.9)
    assert frozen.tolist() == [True, False, False]
    torch.testing.assert_close(a[1:], 2.0 * (rows[1:] / rows[1:].norm(dim=1, keepdim=True)).double(), rtol=1e-6, atol=0)
    assert torch.count_nonzero(b[:, 1:]) == 0


def test_our_own_mode_starts_every_row_along_a_direction_and_every_column_at_zero() -> None:
    directions = found([0.9, 0.5, 0.2])
    a, b, frozen = start_values(directions, torch.randn(3, IN), OUT, Directions(mode="directions"), 1.0, 0.9)
    assert not frozen.any()
    assert torch.equal(a, directions.down)
    assert torch.count_nonzero(b) == 0


# ---------------------------------------------------------------------- the choice


def test_defaults_and_saved_form() -> None:
    choice = {"after": 100, "mode": "residual", "eps": 1e-8, "guard": 1e-6, "kappa": 1.0, "select": "rate", "seed": 0}
    assert dataclasses.asdict(Directions()) == choice
    config = weftlora.LoraInitConfig()
    assert (config.start, config.boost, config.lora_alpha) == (Directions(), None, 16)
    assert config.to_dict()["start"] == {"kind": "directions", **choice}
    assert weftlora.WeftConfig(**config.to_dict()).start == config.start
    later = weftlora.LoraInitConfig(after=weftlora.epochs(0.5))
    assert weftlora.WeftConfig(**later.to_dict()).start.after == weftlora.epochs(0.5)


def test_tsd_is_the_two_choices_and_nothing_else() -> None:
    config = weftlora.LoraTsdConfig(r=4, directions=2, after=30, eps=1e-6, select="top", seed=3)
    by_axes = weftlora.WeftConfig(
        r=4,
        start=weftlora.Directions(after=30, eps=1e-6, select="top", seed=3),
        boost=weftlora.Dash(directions=2, after=30, eps=1e-6, select="top", seed=3),
    )
    assert config.to_dict() == by_axes.to_dict()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"after": 0}, r"Directions\(after=...\): 0 is not a time"),
        ({"after": 1.5}, "is not a time"),
        ({"mode": "residue"}, "did you mean 'residual'"),
        ({"select": "rates"}, "did you mean 'rate'"),
        ({"eps": -1.0}, r"is not a number in \[0, 1\): use 1e-8"),
        ({"guard": 1.0}, r"is not a number in \[0, 1\): use 1e-6"),
        ({"guard": True}, r"is not a number in \[0, 1\)"),
        ({"kappa": 0}, "is not a positive number: use 1.0"),
        ({"kappa": float("inf")}, "is not a positive number"),
        ({"seed": 1.5}, "is not a seed"),
    ],
)
def test_values_that_cannot_work_are_refused_with_what_to_do(fields: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Directions(**fields)


@pytest.mark.parametrize("structure", [weftlora.Hydra(heads=2), weftlora.Tied()], ids=["hydra", "tied"])
@pytest.mark.parametrize("recipe", [weftlora.LoraInitConfig, weftlora.LoraTsdConfig])
def test_structures_that_it_does_not_go_with_are_refused_by_the_table(structure, recipe) -> None:
    with pytest.raises(CombinationError, match=f"{type(structure).__name__} with Directions"):
        recipe(structure=structure)


def test_a_misspelt_field_in_a_saved_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'guard'"):
        weftlora.WeftConfig(start={"kind": "directions", "gaurd": 1e-6})


def test_a_twin_that_is_cleared_says_nothing_of_its_direction() -> None:
    site = site_of()
    switch(site, found([3.0, 2.0]))
    term = site.start
    before = term.rate.clone()
    term.index[1] = 0  # the largest of W, which is a direction like any other
    assert [(each.index, each.sigma) for each in term.chosen()] == [(7, 3.0), (0, 2.0)]
    term.clear([0])
    assert [each.index for each in term.chosen()] == [0]
    assert (int(term.index[0]), float(term.sigma[0]), float(term.rate[0])) == (-1, 0.0, 0.0)
    assert torch.equal(term.rate[1:], before[1:])
    assert not term.down[0].any()
    assert not term.up[:, 0].any()
