"""Planted answers: heads of known cosines, spaces turned by known angles, updates of known effective rank."""

from __future__ import annotations

import math

import pytest
import torch

import weftlora
from weftlora.adapted.routing import cosines
from weftlora.adapter.site import Site, build_site
from weftlora.change_rates import principal_angles
from weftlora.inspection import measures
from weftlora.inspection.measures import effective_rank, factor_similarity, singular_values, split_name
from weftlora.report.inspection.elements import Grid, block_label, labels_of, short_names


def turned(r: int, fan_in: int, angles: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices [r, in] whose row spaces have these principal angles (degrees), in mixed-up bases."""
    frame = torch.linalg.qr(torch.randn(fan_in, 2 * r, dtype=torch.float64)).Q.T
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()[:, None]
    other = radians.cos() * frame[:r] + radians.sin() * frame[r:]
    return torch.randn(r, r, dtype=torch.float64) @ frame[:r], torch.randn(r, r, dtype=torch.float64) @ other


def hydra(r: int = 2, heads: int = 3, fan_in: int = 10, out: int = 8) -> Site:
    return build_site(weftlora.Hydra(heads=heads), (r, fan_in, out), scale=2.0, dropout=0.0)


def test_principal_angles_are_those_that_were_planted():
    planted = [0.0, 12.0, 45.0, 90.0]
    one, other = turned(4, 20, planted)
    assert principal_angles(one, other).rad2deg().tolist() == pytest.approx(planted, abs=1e-5)
    assert len(principal_angles(one, torch.zeros(4, 20))) == 0


def test_overlap_is_the_mean_squared_cosine_and_chance_what_random_spaces_have():
    one, other = turned(2, 50, [0.0, 60.0])
    found = factor_similarity(one, other)
    assert found.overlap == pytest.approx((1 + 0.25) / 2)
    drawn = [factor_similarity(torch.randn(3, 40), torch.randn(5, 40)) for _ in range(200)]
    assert sum(d.overlap for d in drawn) / 200 == pytest.approx(drawn[0].chance, abs=0.01)
    assert drawn[0].chance == 5 / 40
    assert drawn[0].cosine is None


def test_moved_and_cosine_say_how_far_a_factor_is_from_its_start():
    start = torch.eye(2, 6)
    found = factor_similarity(start * 1.5, start)
    assert (found.relative_change, found.cosine, found.overlap) == (
        pytest.approx(0.5),
        pytest.approx(1.0),
        pytest.approx(1.0),
    )
    nothing = factor_similarity(start, torch.zeros(2, 6))
    assert (nothing.relative_change, nothing.cosine, nothing.overlap, nothing.angles) == (None, None, None, [])


def test_heads_have_the_cosines_that_were_planted():
    site = hydra(r=2, heads=4, out=8)
    basis = torch.linalg.qr(torch.randn(16, 2)).Q.T
    first, second = basis[0].reshape(8, 2), basis[1].reshape(8, 2)
    planted = [3 * first, 0.5 * first + math.sqrt(0.75) * second, -first, torch.zeros(8, 2)]
    site.structure.B.data = torch.cat(planted, 1)
    found = measures.heads("site", site)
    assert found.cosine[0][1] == pytest.approx(0.5, abs=1e-6)
    assert found.cosine[0][2] == pytest.approx(-1.0, abs=1e-6)
    assert found.cosine[1][2] == pytest.approx(-0.5, abs=1e-6)
    assert found.cosine[3] == [None] * 4
    assert found.mean == pytest.approx((0.5 - 1 - 0.5) / 3, abs=1e-6)


def test_heads_of_an_untrained_adapter_have_no_cosine():
    found = measures.heads("site", hydra())
    assert found.mean is None
    assert measures.heads("site", build_site(weftlora.Plain(), (2, 4, 4), scale=1.0, dropout=0.0)) is None


def test_cosines_are_of_rows():
    table = cosines(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    assert table[0][1] == table[1][0] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(("sigma", "rank"), [([3.0, 3.0, 3.0], 3.0), ([5.0, 0.0], 1.0), ([0.0, 0.0], 0.0)])
def test_effective_rank_counts_equal_directions(sigma: list[float], rank: float):
    assert effective_rank(torch.tensor(sigma)) == pytest.approx(rank)


def test_singular_values_are_those_of_the_product():
    a, b = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert singular_values(a, b).tolist() == pytest.approx(torch.linalg.svdvals(b @ a)[:3].tolist())


def test_a_routed_site_is_measured_at_the_gate_that_was_seen():
    site = hydra(r=2, heads=2)
    heads = torch.randn(2, 8, 2)
    site.structure.B.data = torch.cat(list(heads), 1)
    gate = measures.MeanGate(site, torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64))
    for given, weights, said in ((gate, (0.75, 0.25), "mean gate"), (None, (0.5, 0.5), "uniform gate")):
        found = measures.measure_site("layers.0.q", site, given, 10.0, None)
        delta = 2.0 * (weights[0] * heads[0] + weights[1] * heads[1]) @ site.structure.A
        assert found.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert found.relative == pytest.approx(found.norm / 10)
        assert (found.norm_kind, found.mergeable) == (said, False)
        assert "depends on the token" in found.why_not


def test_live_slots_alone_count():
    site = build_site(weftlora.Plain(), (4, 6, 5), scale=1.0, dropout=0.0, ranks=weftlora.Reallocate(max_rank=6))
    site.mask[1] = 0
    found = measures.measure_site("q", site, None, None, None)
    assert (found.rank, found.max_rank, found.initial_rank) == (3, 5, 4)  # max_rank: never more than the smaller side
    assert found.trained == 3 * (6 + 5)
    assert measures.factor(site, "A").shape == (3, 6)
    assert measures.factor(site, "B").shape == (3, 5)


def test_a_fresh_draw_has_its_own_size():
    drawn = build_site(weftlora.Plain(), (16, 400, 8), scale=1.0, dropout=0.0).structure.A
    assert measures.size_of_a_fresh_draw(drawn) == pytest.approx(1.0, abs=0.02)
    assert measures.size_of_a_fresh_draw(2 * drawn) == pytest.approx(2.0, abs=0.04)


def test_a_wide_grid_is_split_and_loses_nothing():
    whole = Grid(["encoder 0", "decoder 0"], ["self.q", "cross.q", "mlp"], [[0.1, None, 0.2], [0.3, 0.4, 0.5]])
    assert whole.split(80) == [whole]
    parts = whole.split(25)
    assert [part.modules for part in parts] == [["self.q"], ["cross.q"], ["mlp"]]
    assert parts[1].blocks == ["decoder 0"]
    assert sorted(value for part in parts for value in part.flat) == whole.flat == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_names_are_cut_at_the_block():
    assert split_name("bert.encoder.layer.11.attention.self.query") == ("bert.encoder.layer.11", "attention.self.query")
    assert split_name("lm_head") == ("", "lm_head")
    assert split_name("layers.0") == ("", "layers.0")  # the number is the module itself
    assert short_names(["attention.output.dense", "output.dense", "attention.self.query"]) == {
        "attention.output.dense": "attention.output.dense",
        "output.dense": "output.dense",
        "attention.self.query": "query",
    }
    assert block_label("decoder.block.3") == "decoder 3"
    assert labels_of(["a.layers.0", "b.layers.0"]) == {"a.layers.0": "a.layers.0", "b.layers.0": "b.layers.0"}
