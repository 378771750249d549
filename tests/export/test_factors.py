"""The closed form of a site: one pair of matrices whose product is ΔW, whatever the site is made of."""

from __future__ import annotations

import pytest
import torch

from weftlora.adapter.site import Site, build_site
from weftlora.errors import AdapterError, MergeError
from weftlora.export.factors import Pair, closed_form, combined, common_rank
from weftlora.terms.boost.dash import Dash
from weftlora.terms.ranks.reallocate import Reallocate
from weftlora.terms.start.directions import Directions
from weftlora.terms.structure.hydra import Hydra
from weftlora.terms.structure.plain import Plain
from weftlora.terms.structure.tied import Tied


def moved(site: Site) -> Site:
    with torch.no_grad():
        for p in site.parameters():
            p.add_(torch.randn_like(p))
    return site


def site(structure: object = None, scale: float = 0.5, **axes: object) -> Site:
    return moved(build_site(structure or Plain(), (3, 6, 5), scale=scale, dropout=0.0, **axes))  # type: ignore[arg-type]


def launch(s: Site, count: int = 2) -> None:
    """Set Dash slots along planted orthonormal directions."""
    term = s.boost
    u, v = (torch.linalg.qr(torch.randn(n, count))[0] for n in (5, 6))
    term.up[:, :count], term.down[:count] = u, v.T
    term.launched.fill_(True)


def test_scale_and_gates_go_into_b():
    s = site(Tied(), scale=0.25)
    f = s.factors()
    pair = closed_form(s)
    assert torch.equal(pair.a, f.A.double())
    wanted = f.v[:, None].double() * f.B.double() * f.gate.double() * 0.25
    assert torch.allclose(pair.b, wanted, rtol=1e-14)
    assert pair.a.dtype == pair.b.dtype == torch.float64


def test_the_product_is_the_update_of_every_kind_of_site():
    dashed, both = site(boost=Dash(directions=3)), site(boost=Dash(directions=2), start=Directions())
    launch(dashed)
    launch(both)
    both.start.down.copy_(torch.randn(3, 6))
    both.start.up.copy_(torch.randn(5, 3))
    masked = site(ranks=Reallocate(max_rank=5))
    masked.mask.copy_(torch.tensor([1.0, 0, 1, 1, 0]))
    for s, rank in ((site(), 3), (site(Tied()), 3), (dashed, 5), (both, 8), (masked, 3)):
        pair = closed_form(s)
        assert pair.rank == rank
        assert torch.allclose(pair.delta(), s.delta_weight().double(), atol=1e-6)


def test_slots_that_do_nothing_are_left_out_and_those_of_an_untrained_adapter_stay():
    s = site(boost=Dash(directions=4))
    assert closed_form(s).rank == 3  # not launched: rows and columns of zeros
    launch(s, 2)
    with torch.no_grad():
        s.boost.gain[0] = 0
    assert closed_form(s).rank == 3 + 1
    fresh = build_site(Plain(), (3, 6, 5), scale=1.0, dropout=0.0)
    assert closed_form(fresh).rank == 3
    assert not closed_form(fresh).b.any()


def test_a_dash_slot_along_a_twins_direction_shares_its_slot():
    """LoRA-TSD launches along the directions it started from: rank 2r, spec lora_tsd.md section 3."""
    s = site(boost=Dash(directions=2), start=Directions())
    launch(s)
    s.start.down[:2], s.start.up[:, :2] = 1.7 * s.boost.down, -0.3 * s.boost.up
    s.start.down[2], s.start.up[:, 2] = torch.randn(6), torch.randn(5)
    pair = closed_form(s)
    assert pair.rank == 2 * 3
    assert torch.allclose(pair.delta(), s.delta_weight().double(), atol=1e-6)
    s.boost.down[0, 0] += 1e-3  # nearly parallel is another direction
    assert closed_form(s).rank == 2 * 3 + 1
    assert torch.allclose(closed_form(s).delta(), s.delta_weight().double(), atol=1e-6)


def test_a_routed_site_needs_its_gates_fixed():
    s = site(Hydra(heads=2), boost=Dash(directions=2))
    launch(s)
    with pytest.raises(MergeError, match="depends on the token"):
        closed_form(s)
    omega = torch.tensor([0.3, 0.7], dtype=torch.float64)
    heads = s.structure.B.double().unflatten(1, (2, 3))
    dash = (s.boost.up * s.boost.gain).double() @ s.boost.down.double()
    wanted = 0.5 * (0.3 * heads[:, 0] + 0.7 * heads[:, 1]) @ s.structure.A.double() + dash
    assert closed_form(s, omega).rank == 3 + 2
    assert torch.allclose(closed_form(s, omega).delta(), wanted, atol=1e-12)


def test_padding_and_adding_keep_the_function():
    one, two = (Pair(torch.randn(r, 6), torch.randn(5, r)) for r in (2, 3))
    assert torch.equal(one.padded(8).delta(), one.delta())
    assert one.padded(8).rank == 8
    both = combined([one, two])
    assert both.rank == 5
    assert torch.allclose(both.delta(), one.delta() + two.delta(), atol=1e-6)


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (65, 128), (257, 320), (321, 512), (512, 512)])
def test_server_ranks_are_the_next_that_servers_know(rank: int, served: int):
    pairs = {"one": Pair(torch.zeros(1, 4), torch.zeros(4, 1)), "two": Pair(torch.zeros(rank, 4), torch.zeros(4, rank))}
    assert common_rank(pairs, True) == served
    assert common_rank(pairs, False) == rank


def test_a_rank_above_every_servers_is_refused():
    with pytest.raises(AdapterError, match="two has rank 513 and servers take a rank of 512 at most"):
        common_rank({"two": Pair(torch.zeros(513, 4), torch.zeros(4, 513))}, True)
