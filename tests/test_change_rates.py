"""Change rates and directions: planted ones are found, however small their σ, and nothing breaks where σ says nothing.

Definition (arXiv 2409.01035): W = U diag(σ) Vᵀ, d_i = u_iᵀ ΔW v_i, δ_i = |d_i| / (σ_i + ε).
"""

from __future__ import annotations

import ast
import inspect
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weftlora import change_rates
from weftlora.change_rates import Spectrum, change_rate, floor, moved, pick, spectrum, take

SHAPES = {"out>in": (24, 15), "out<in": (15, 24), "equal": (18, 18)}
ROUTES = ("gram", "svd")
F64 = torch.float64


def orthogonal(n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64))[0][:, :k]


def planted(shape: tuple[int, int], sigma: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], V [in, k] random with orthonormal columns and W = U diag(σ) Vᵀ, fp64."""
    u, v = orthogonal(shape[0], len(sigma), seed), orthogonal(shape[1], len(sigma), seed + 1)
    return u, v, u * sigma @ v.T


def towards(u: Tensor, v: Tensor, amount: dict[int, float]) -> tuple[Tensor, Tensor]:
    """A [r, in], B [out, r] with B A = Σ amount_i u_i v_iᵀ, mixed so that no slot is a direction of its own."""
    index, a = list(amount), torch.tensor(list(amount.values()), dtype=F64)
    mix = torch.randn(len(a), len(a), generator=torch.Generator().manual_seed(9), dtype=F64) + 3 * torch.eye(len(a))
    return torch.linalg.inv(mix) @ v[:, index].T, u[:, index] * a @ mix


def found(
    w: Tensor, a: Tensor, b: Tensor, count: int, route: str = "gram", eps: float = 1e-8
) -> change_rates.Directions:
    spec = spectrum(w, route)
    return pick(spec, w, change_rate(spec, moved(spec, w, a, b), eps), count)


def geometric(k: int, smallest: float) -> Tensor:
    return torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), k, dtype=F64) * 3


# ---------------------------------------------------------------------- planted directions


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_planted_directions_are_found_in_their_order(shape, smallest: float, route: str) -> None:
    k = min(shape)
    sigma = geometric(k, smallest)
    u, v, w = planted(shape, sigma)
    order = [k - 1, 2, k - 3, 7, 0, 5]  # the smallest σ and the largest among them
    rates = [3.0, 2.0, 1.2, 0.7, 0.4, 0.2]
    amount = {i: (-1) ** n * rate * sigma[i].item() for n, (i, rate) in enumerate(zip(order, rates, strict=True))}
    got = found(w, *towards(u, v, amount), 6, route, eps=0)
    assert got.index.tolist() == order
    torch.testing.assert_close(got.rate, torch.tensor(rates, dtype=F64), rtol=2e-3, atol=0)
    torch.testing.assert_close(got.sigma, sigma[order], rtol=2e-3, atol=0)
    for s, i in enumerate(order):  # the planted pair itself, up to one common sign
        assert (got.up[:, s] @ u[:, i]) * (got.down[s] @ v[:, i]) > 0.999


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(2, 20), fan_in=st.integers(2, 20), seed=st.integers(0, 99), smallest=st.sampled_from([1e-1, 1e-3])
)
def test_any_single_planted_direction_is_the_first(out: int, fan_in: int, seed: int, smallest: float) -> None:
    k = min(out, fan_in)
    u, v, w = planted((out, fan_in), geometric(k, smallest), seed)
    i = seed % k
    assert found(w, *towards(u, v, {i: 0.01}), 1).index.tolist() == [i]


def test_a_rate_is_relative_to_sigma_so_a_small_direction_wins_over_a_larger_move() -> None:
    sigma = torch.tensor([100.0, 10.0, 1.0, 0.1], dtype=F64)
    u, v, w = planted((6, 5), sigma)
    got = found(w, *towards(u, v, {0: 5.0, 1: 2.0, 3: 0.1}), 3)
    assert got.index.tolist() == [3, 1, 0]
    assert got.rate.tolist() == pytest.approx([1.0, 0.2, 0.05], rel=1e-4)


# ---------------------------------------------------------------------- d and δ are what the paper defines


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("r", [1, 4, 40])
def test_d_from_factors_is_the_diagonal_in_the_basis_of_w(shape, r: int, route: str) -> None:
    """r = 40 is larger than either side."""
    _, _, w = planted(shape, geometric(min(shape), 0.05))
    a, b = torch.randn(r, shape[1], dtype=F64), torch.randn(shape[0], r, dtype=F64)
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    want = torch.diagonal(u.T @ (2.5 * b @ a) @ vt.T)
    spec = spectrum(w, route)
    got = moved(spec, w, a, b, scale=2.5)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(change_rate(spec, got, eps=0), want.abs() / sigma, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_routes_agree(shape) -> None:
    _, _, w = planted(shape, geometric(min(shape), 1e-3))
    a, b = torch.randn(3, shape[1], dtype=F64), torch.randn(shape[0], 3, dtype=F64)
    gram, svd = found(w, a, b, 8, "gram"), found(w, a, b, 8, "svd")
    assert gram.index.tolist() == svd.index.tolist()
    torch.testing.assert_close(gram.sigma, svd.sigma, rtol=1e-8, atol=0)
    torch.testing.assert_close(gram.rate, svd.rate, rtol=1e-6, atol=0)
    pairs = [torch.einsum("os,si->soi", d.up, d.down) for d in (gram, svd)]  # free of signs
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-7)


def test_the_change_rate_has_eps_relative_to_the_largest_sigma() -> None:
    spec = Spectrum(torch.tensor([4.0, 1.0], dtype=F64), torch.eye(2, dtype=F64), True)
    d = torch.tensor([-8.0, 0.5], dtype=F64)
    assert change_rate(spec, d, eps=0).tolist() == [2.0, 0.5]
    assert change_rate(spec, d, eps=0.25).tolist() == [8 / 5, 0.5 / 2]
    assert change_rate(spec, d).tolist() == pytest.approx([2.0, 0.5], rel=1e-7)


@pytest.mark.parametrize("tall", [True, False])
def test_the_sign_of_a_pair_changes_nothing(tall: bool) -> None:
    w = torch.randn(9, 6, dtype=F64) if tall else torch.randn(6, 9, dtype=F64)
    a, b = torch.randn(2, w.shape[1], dtype=F64), torch.randn(w.shape[0], 2, dtype=F64)
    spec = spectrum(w)
    flipped = Spectrum(spec.sigma, spec.side * torch.tensor([1.0, -1, -1, 1, -1, 1], dtype=F64), spec.tall)
    one, two = (pick(s, w, change_rate(s, moved(s, w, a, b)), 4) for s in (spec, flipped))
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.rate, two.rate)
    gain = torch.tensor([0.3, -1, 2, 0.1], dtype=F64)
    torch.testing.assert_close(one.up * gain @ one.down, two.up * gain @ two.down, rtol=1e-12, atol=1e-14)


def test_directions_are_orthonormal_pairs_of_w() -> None:
    w = torch.randn(30, 20)
    got = take(spectrum(w), w, torch.ones(20, dtype=F64), [19, 3, 0])
    torch.testing.assert_close(got.up.T @ got.up, torch.eye(3, dtype=F64), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.down @ got.down.T, torch.eye(3, dtype=F64), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.up.T @ w.double() @ got.down.T, got.sigma.diag(), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.sigma, torch.linalg.svdvals(w.double())[[19, 3, 0]], rtol=1e-10, atol=0)


# ---------------------------------------------------------------------- spectra that say nothing


def all_finite(d: change_rates.Directions) -> bool:
    return all(bool(torch.isfinite(t.double()).all()) for t in (d.sigma, d.rate, d.up, d.down))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_repeated_singular_values_give_finite_directions_of_the_right_count(shape, route: str) -> None:
    k = min(shape)
    sigma = torch.tensor([2.0] * (k // 2) + [0.5] * (k - k // 2), dtype=F64)
    u, v, w = planted(shape, sigma)
    got = found(w, *towards(u, v, {k - 1: 0.4, k - 2: 0.3}), 5, route)
    assert all_finite(got)
    assert len(set(got.index.tolist())) == 5
    assert (got.index[:1] >= k // 2).all()  # within the block that moved most
    torch.testing.assert_close(got.up.T @ got.up, torch.eye(5, dtype=F64), rtol=0, atol=1e-9)
    torch.testing.assert_close(got.down @ got.down.T, torch.eye(5, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (200, 120)], ids=str)
@pytest.mark.parametrize("rank", [1, 5])
def test_null_directions_are_left_out(shape, rank: int, route: str) -> None:
    _, _, w = planted(shape, geometric(rank, 0.1))
    a, b = torch.randn(4, shape[1], dtype=F64), torch.randn(shape[0], 4, dtype=F64)  # moves null directions as well
    spec = spectrum(w, route)
    d = moved(spec, w, a, b)
    rate = change_rate(spec, d)
    assert torch.isfinite(rate).all()
    assert torch.count_nonzero(d[rank:]) == 0
    got = pick(spec, w, rate, 8)
    assert sorted(got.index.tolist()) == list(range(rank))
    assert all_finite(got)


@pytest.mark.parametrize("route", ROUTES)
def test_dead_rows_and_columns_are_null_directions(route: str) -> None:
    w = torch.randn(12, 9)
    w[3:], w[:, 5:] = 0, 0
    got = found(w, torch.randn(2, 9), torch.randn(12, 2), 9, route)
    assert sorted(got.index.tolist()) == [0, 1, 2]
    assert torch.count_nonzero(got.up[3:]) == torch.count_nonzero(got.down[:, 5:]) == 0


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_weight_of_zeros_has_no_directions(shape, route: str) -> None:
    w = torch.zeros(shape)
    spec = spectrum(w, route)
    d = moved(spec, w, torch.randn(3, shape[1]), torch.randn(shape[0], 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = pick(spec, w, change_rate(spec, d), 4)
    assert torch.count_nonzero(d) == 0
    assert torch.isfinite(d).all()
    assert torch.isfinite(change_rate(spec, d)).all()
    assert len(got.index) == 0
    assert got.up.shape == (shape[0], 0)
    assert got.down.shape == (0, shape[1])


def test_a_zero_update_moves_nothing_and_nothing_is_picked() -> None:
    w = torch.randn(8, 5)
    got = found(w, torch.randn(2, 5), torch.zeros(8, 2), 3)
    assert len(got.index) == 0


def test_asking_for_more_directions_than_there_are() -> None:
    w = torch.randn(7, 4)
    for count in (4, 5, 100):
        assert sorted(found(w, torch.randn(2, 4), torch.randn(7, 2), count).index.tolist()) == [0, 1, 2, 3]
    assert found(w, torch.randn(2, 4), torch.randn(7, 2), 0).index.tolist() == []


def test_ties_go_to_the_lower_index() -> None:
    w = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    spec = spectrum(w)
    rate = torch.tensor([0.5, 0.7, 0.5, 0.5], dtype=F64)
    assert pick(spec, w, rate, 3).index.tolist() == [1, 0, 2]
    assert pick(spec, w, torch.ones(4, dtype=F64), 4).index.tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_every_decomposition_is_made_in_fp64(dtype: torch.dtype, route: str, monkeypatch) -> None:
    seen = []
    for name in ("eigh", "svd"):
        real = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda m, _r=real, **kw: (seen.append(m.dtype), _r(m, **kw))[1])
    spec = spectrum(torch.randn(6, 4).to(dtype), route)
    assert seen == [F64]
    assert spec.sigma.dtype == spec.side.dtype == F64


def test_the_route_has_no_precision_to_choose() -> None:
    """fp32 Gram loses directions from σ_max/σ_min ≈ 2e3 on: it must not be reachable by any argument."""
    assert list(inspect.signature(spectrum).parameters) == ["w_oi", "route"]
    names = {n.attr for n in ast.walk(ast.parse(inspect.getsource(change_rates))) if isinstance(n, ast.Attribute)}
    assert "float64" in names
    assert not names & {"float32", "float", "half", "bfloat16", "set_float32_matmul_precision"}


def test_a_million_to_one_spectrum_in_fp32_storage_is_ranked_as_by_the_exact_svd() -> None:
    """The case that an fp32 Gram matrix loses; the truth here is the fp64 SVD of the very same fp32 numbers."""
    sigma = geometric(64, 1e-6)
    _, _, w64 = planted((96, 64), sigma)
    w = w64.float()
    exact_u, exact_sigma, exact_vt = torch.linalg.svd(w.double(), full_matrices=False)
    chosen = [55, 40, 58, 20, 50]
    rates = torch.tensor([3.0, 2.0, 1.2, 0.7, 0.4], dtype=F64)
    b, a = exact_u[:, chosen] * (rates * exact_sigma[chosen]), exact_vt[chosen]
    got = found(w, a, b, 5, eps=0)
    assert got.index.tolist() == chosen
    torch.testing.assert_close(got.rate, rates, rtol=1e-2, atol=0)

    gram32 = (w.T @ w).double()
    lost = torch.linalg.eigvalsh(gram32).clamp_min(0).sqrt().flip(0)
    assert ((lost - exact_sigma).abs() / exact_sigma)[50:].max() > 0.5  # the case does tell the two apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_a_16_bit_weight_is_upcast_exactly(dtype: torch.dtype, route: str) -> None:
    w = torch.randn(10, 7).to(dtype)
    a, b = torch.randn(2, 7), torch.randn(10, 2)
    one, two = found(w, a, b, 4, route), found(w.double(), a, b, 4, route)
    for name in ("index", "sigma", "rate", "up", "down"):
        assert torch.equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_changes_nothing(route: str) -> None:
    w, a, b = torch.randn(10, 7), torch.randn(2, 7), torch.randn(10, 2)
    want = found(w, a, b, 4, route)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = found(w, a, b, 4, route)
    for name in ("index", "sigma", "rate", "up", "down"):
        assert torch.equal(getattr(got, name), getattr(want, name))


def test_nothing_of_it_is_in_a_graph_and_the_weight_is_left_alone() -> None:
    w = torch.randn(6, 5, requires_grad=True)
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    before = w.detach().clone()
    got = found(w, a, b, 3)
    assert not any(t.requires_grad for t in (got.sigma, got.rate, got.up, got.down))
    assert torch.equal(w, before)


@pytest.mark.parametrize("shape", [(400, 4), (4, 400)])
def test_only_the_smaller_side_is_decomposed(shape, monkeypatch) -> None:
    """No matrix of the larger side squared, and none of the weight's size beside its fp64 copy."""
    sizes = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (sizes.append(tuple(m.shape)), real(m))[1])
    spec = spectrum(torch.randn(shape))
    assert sizes == [(4, 4)]
    assert spec.side.shape == (4, 4)


def test_the_floor_is_the_square_root_of_rounding_in_fp64() -> None:
    """What a Gram matrix can tell from 0; at 4096 it is 1e-6 σ_max, where fp32's own floor would be 5e-4."""
    sigma = torch.tensor([2.0, 1.0], dtype=F64)
    assert floor(sigma, (4096, 4096)) == pytest.approx(2 * (4096 * 2.22e-16) ** 0.5, rel=1e-3)
    assert floor(sigma, (4096, 4096)) / 2 == pytest.approx(1e-6, rel=0.1)
    assert floor(sigma[:0], (3, 0)) == 0
