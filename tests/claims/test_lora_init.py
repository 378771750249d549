"""LoRA-Init and LoRA-TSD (arXiv 2409.01035, version 4 on), as far as abstract and figure say, written out dense and in fp64.

After a pre-launch of t steps with ΔW, the r directions of largest |uᵀ ΔW v| / (σ + ε): W_res = W − Σ σ̄ ū v̄ᵀ stays fixed and
c B A starts at Σ σ̄ ū v̄ᵀ, so the function is the pretrained one. LoRA-TSD: the same, and gains on the first s of the list.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "schedule"))
from dashing import (
    IN,
    OUT,
    Net,
    adam,
    batch,
    events,
    init,
    loss_of,
    parameters,
    sites,
    starts,
    switched,
    train,
)
from switching import T, base_of, defined, pre_launch, train_seeded, weights

CASES = {"init": {}, "tsd": {"directions": 3}}
both = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


# ---------------------------------------------------------------------- what A and B start as


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 1},
        {"r": 4, "lora_alpha": 3},
        {"use_rslora": True, "r": 3},
        {"rank_pattern": {"second": 4}, "alpha_pattern": {"first": 1}},
        {"lora_dropout": 0.2},
        {"directions": 3},
    ],
    ids=["plain", "r1", "alpha", "rslora", "patterns", "dropout", "tsd"],
)
def test_a_and_b_are_the_symmetric_split_of_ws_part_along_the_definitions_directions(fields: dict) -> None:
    model, deltas = init(after=T, **fields).train(), pre_launch(**fields)
    train_seeded(model, T)
    for name, site in sites(model).items():
        a, b = site.structure.A.detach().double(), site.structure.B.detach().double()
        r = len(a)
        index, sigma, rate, up, down = defined(weights(model)[name], deltas[name], r)
        term = site.start
        assert term.index.tolist() == index, name
        torch.testing.assert_close(term.sigma.double(), sigma, rtol=1e-4, atol=0)
        torch.testing.assert_close(term.rate.double(), rate, rtol=1e-3, atol=0)
        sign = (a * down).sum(1).sign()  # a direction is a pair: its sign is free
        torch.testing.assert_close(a, (sign * (sigma / site.scale).sqrt())[:, None] * down, rtol=0, atol=1e-5)
        torch.testing.assert_close(b, up * sign * (sigma / site.scale).sqrt(), rtol=0, atol=1e-5)


def test_planted_directions_become_the_rows_of_a_and_the_columns_of_b() -> None:
    """ΔW moves directions 4 and 2 of W, most first; nothing is learned in between, as the rate is 0."""
    model = init(after=1, net=lambda: Net().double()).double()
    planted = [4, 2]
    for name, site in sites(model).items():
        u, sigma, vt = torch.linalg.svd(weights(model)[name].detach(), full_matrices=False)
        site.structure.A.data = 3.0 * vt[planted].clone()
        site.structure.B.data = u[:, planted] * sigma[planted] * torch.tensor([0.5, 0.2])
    train(model, 1, torch.optim.SGD(parameters(model), lr=0.0))
    for name, site in sites(model).items():
        u, sigma, vt = torch.linalg.svd(weights(model)[name].detach(), full_matrices=False)
        assert site.start.index.tolist() == planted
        for slot, k in enumerate(planted):
            length = (sigma[k] / site.scale).sqrt()
            assert abs(site.structure.A[slot] @ vt[k]).item() == pytest.approx(length.item(), rel=1e-9)
            assert abs(site.structure.B[:, slot] @ u[:, k]).item() == pytest.approx(length.item(), rel=1e-9)
            product = site.scale * torch.outer(site.structure.B[:, slot], site.structure.A[slot])
            torch.testing.assert_close(product, sigma[k] * torch.outer(u[:, k], vt[k]), rtol=1e-8, atol=1e-10)
        assert pytest.approx(site.start.rate.tolist(), rel=1e-6) == [0.5 * 6, 0.2 * 6]


@both
def test_the_frozen_twins_are_the_same_bits_and_are_never_trained(fields: dict) -> None:
    model = init(after=T, **fields)
    train(model, T, optimizer := adam(model))
    start = {n: (t.down.clone(), t.up.clone()) for n, t in zip(sites(model), starts(model), strict=True)}
    for name, site in sites(model).items():
        assert torch.equal(site.structure.A, start[name][0])
        assert torch.equal(site.structure.B, start[name][1])
        assert torch.count_nonzero(site.start.up) == site.start.up.numel()
    train(model, 3, optimizer, start=T)
    for name, site in sites(model).items():
        assert torch.equal(site.start.down, start[name][0])
        assert torch.equal(site.start.up, start[name][1])
        assert not torch.isclose(site.structure.A, site.start.down, rtol=1e-4).any()
        assert not torch.isclose(site.structure.B, site.start.up, rtol=1e-4).any()


# ---------------------------------------------------------------------- the function returns to the pretrained one


@both
@pytest.mark.parametrize("scale", [{}, {"lora_alpha": 0.6}, {"use_rslora": True, "r": 3}], ids=["2", "0.3", "rs"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)],
    ids=str,
)
def test_the_function_is_the_pretrained_one_after_the_switch(
    dtype: torch.dtype, tolerance: float, scale: dict, fields: dict
) -> None:
    """To the rounding of the outputs' dtype, in a 16-bit base with factors in fp32 too; just before it was not."""
    model = init(after=T, net=lambda: Net().to(dtype), **fields, **scale)
    model = model.double() if dtype == torch.float64 else model
    x, optimizer = batch(50).to(dtype), torch.optim.AdamW(parameters(model), lr=0.2)
    expected = base_of(model, x)
    for step in range(T):
        if step == T - 1:
            assert (model(x) - expected).abs().max() > 16 * tolerance * expected.abs().max()
        optimizer.zero_grad()
        target = batch(step)[:, :OUT].cos()
        (model(batch(step).to(dtype)).float() - target).square().mean().backward()
        optimizer.step()
    assert switched(model)
    assert (model(x) - expected).abs().max() <= tolerance * expected.abs().max()


def test_in_bf16_with_a_scale_of_2_the_function_is_bit_for_bit_the_pretrained_one() -> None:
    """c B₀A₀ x and its twin cancel before the one rounding to bf16: nothing of the removed part is left in 16 bits."""
    model = init(after=1, net=lambda: Net().to(torch.bfloat16))
    x = batch(50, 256).bfloat16()
    train_in(model, torch.bfloat16)
    same = (model(x) == base_of(model, x)).float().mean()
    assert same > 0.99
    for site in sites(model).values():
        assert torch.count_nonzero(site.delta_weight()) == 0


def train_in(model: PeftModel, dtype: torch.dtype) -> None:
    for site in sites(model).values():
        site.structure.B.data.normal_()
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    model(batch(0).to(dtype)).float().square().mean().backward()
    optimizer.step()
    assert switched(model)


class FourBits(nn.Linear):
    """A linear layer whose weight is kept as whole numbers from −7 to 7 and a step, as 4-bit quantisation libraries do."""

    def __init__(self, whole: nn.Linear):
        super().__init__(whole.in_features, whole.out_features)
        self.bias = whole.bias
        self.step = whole.weight.detach().abs().max() / 7
        self.weight = nn.Parameter((whole.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() * self.step, self.bias)


@both
def test_on_a_four_bit_base_the_function_is_the_pretrained_one_and_the_bits_stay(fields: dict) -> None:
    def net() -> nn.Module:
        made = Net()
        made.first, made.second = FourBits(made.first), FourBits(made.second)
        return made

    model, x = init(after=T, net=net, **fields), batch(50)
    before, expected = {n: (w, w.clone()) for n, w in weights(model).items()}, base_of(model, x)
    with pytest.warns(UserWarning, match=r"2 modules .* dequantised base"):
        train(model, T)
    assert all(said["ranked_on"] == "dequantised" for said in events(model)["start_switch"]["sites"].values())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-6)
    for name, weight in weights(model).items():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])
    train(model, 3, start=T)
    assert (model(x) - expected).abs().max() > 1e-3


@both
def test_the_weight_is_neither_written_nor_replaced(fields: dict) -> None:
    model = init(after=T, **fields)
    before = {n: (w.data_ptr(), w._version, w.clone()) for n, w in weights(model).items()}
    train(model, T + 2)
    assert switched(model)
    for name, weight in weights(model).items():
        pointer, version, value = before[name]
        assert (weight.data_ptr(), weight._version) == (pointer, version)
        assert torch.equal(weight, value)


@both
def test_an_adapter_saved_at_the_switch_is_a_zero_update_and_merges_as_one(fields: dict, tmp_path: Path) -> None:
    model, x = init(after=T, **fields), batch(50)
    train(model, T)
    for site in sites(model).values():
        assert torch.count_nonzero(site.delta_weight()) == 0  # c = 2: exact; see the test below for others
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(init(after=T).unload(), tmp_path)
    torch.testing.assert_close(loaded(x), base_of(model, x), rtol=0, atol=1e-6)
    merged = loaded.merge_and_unload()
    assert torch.equal(merged(x), base_of(model, x))


@both
def test_merged_after_training_it_is_the_same_function(fields: dict) -> None:
    model, x = init(after=T, lora_alpha=0.7, **fields), batch(50)
    train(model, T + 3)
    for site in sites(model).values():
        s, t = site.structure, site.start
        want = site.scale * (s.B @ s.A - t.up @ t.down)
        want = want if site.boost is None else want + site.boost.up * site.boost.gain @ site.boost.down
        torch.testing.assert_close(site.delta_weight(), want.detach(), rtol=0, atol=1e-6)
    expected = model(x)
    assert (expected - base_of(model, x)).abs().max() > 1e-3
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)


def test_the_pre_launch_is_discarded() -> None:
    """Two pre-launches of other lengths along the same ranking end in the same A and B: nothing of BA stays."""
    models = [init(after=1) for _ in range(2)]
    for model, size in zip(models, (1.0, 1.5), strict=True):
        for site in sites(model).values():
            generator = torch.Generator().manual_seed(3)
            site.structure.B.data = size * torch.randn(site.structure.B.shape, generator=generator)
        train(model, 1, torch.optim.SGD(parameters(model), lr=0.0))
    for one, other in zip(*(parameters(model) for model in models), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------- the guard


def small(smallest: float) -> nn.Module:
    """Net with a first weight whose last σ is `smallest` of its first."""
    net = Net()
    u, sigma, vt = torch.linalg.svd(net.first.weight.detach().double(), full_matrices=False)
    sigma[-1] = smallest * sigma[0]
    net = net.double()
    net.first.weight.data = u * sigma @ vt
    return net


def gradients(guard: float) -> tuple[PeftModel, list[float], list[float]]:
    """Norms of the gradients of the rows of A and columns of B of `first`, summed over two steps after the switch."""
    model = init(after=1, net=lambda: small(1e-7), guard=guard).double()
    site = sites(model)["first"]
    u, _, vt = torch.linalg.svd(weights(model)["first"].detach(), full_matrices=False)
    site.structure.A.data, site.structure.B.data = vt[[5, 4]].clone(), u[:, [5, 4]] * torch.tensor([0.5, 0.1])
    sites(model)["second"].structure.B.data.normal_()
    optimizer = torch.optim.SGD(parameters(model), lr=0.0)
    train(model, 1, optimizer)
    optimizer.zero_grad()
    loss_of(model, batch(1)).backward()
    return model, site.structure.A.grad.norm(dim=1).tolist(), site.structure.B.grad.norm(dim=0).tolist()


def test_a_component_with_next_to_no_sigma_still_gets_gradient() -> None:
    model, _, columns = gradients(guard=1e-6)
    site = sites(model)["first"]
    assert site.start.index.tolist() == [5, 4]  # the null direction first: it moved most for its size
    assert site.structure.A[0].norm().item() == pytest.approx(1.0)
    assert torch.count_nonzero(site.structure.B[:, 0]) == 0
    assert torch.count_nonzero(site.start.down[0]) == torch.count_nonzero(site.start.up[:, 0]) == 0
    assert torch.count_nonzero(site.start.up[:, 1]) == site.start.up.shape[0]
    assert events(model)["start_switch"]["sites"]["first"]["guarded"] == [5]
    assert events(model)["start_switch"]["sites"]["second"]["guarded"] == []
    _, unguarded_rows, unguarded = gradients(guard=0.0)
    assert columns[0] > 1e3 * max(unguarded[0], unguarded_rows[0])


def test_what_is_guarded_is_a_share_of_the_largest_sigma() -> None:
    for guard, guarded in ((1e-8, []), (1e-6, [5])):
        model, _, _ = gradients(guard)
        assert events(model)["start_switch"]["sites"]["first"]["guarded"] == guarded
        x = batch(50).double()
        torch.testing.assert_close(model(x), base_of(model, x), rtol=0, atol=1e-12)


def test_slots_without_a_direction_start_as_plain_loras() -> None:
    """W of rank 2 and r = 4: two directions are split; the other slots keep where A points and can learn."""

    def poor() -> nn.Module:
        net = Net()
        net.first.weight.data = torch.randint(-2, 3, (8, 2)).float() @ torch.randint(-2, 3, (2, IN)).float()
        return net

    model = init(after=T, net=poor, r=4)
    train(model, T - 1, optimizer := adam(model))
    with pytest.warns(UserWarning, match=r"1 modules such as first have fewer moved directions .* without a direction"):
        train(model, 1, optimizer, start=T - 1)
    site, x = sites(model)["first"], batch(50)
    assert sorted(site.start.index.tolist()) == [-1, -1, 0, 1]
    torch.testing.assert_close(site.structure.A[2:].norm(dim=1), torch.ones(2))
    assert torch.count_nonzero(site.structure.B[:, 2:]) == torch.count_nonzero(site.start.up[:, 2:]) == 0
    torch.testing.assert_close(model(x), base_of(model, x), rtol=0, atol=5e-6)
    optimizer.zero_grad()
    loss_of(model, batch(T)).backward()
    assert (site.structure.B.grad[:, 2:].norm(dim=0) > 0).all()


# ---------------------------------------------------------------------- our own variant


def test_with_directions_only_a_starts_along_them_and_nothing_is_frozen() -> None:
    model, deltas, x = init(after=T, mode="directions", kappa=0.5), pre_launch(), batch(50)
    expected = base_of(model, x)
    train(model, T)
    for name, site in sites(model).items():
        index, _, _, _, down = defined(weights(model)[name], deltas[name], 2)
        a = site.structure.A.detach().double()
        assert site.start.index.tolist() == index
        torch.testing.assert_close(a * (a * down).sum(1).sign()[:, None], 0.5 * down, rtol=0, atol=1e-6)
        assert torch.count_nonzero(site.structure.B) == 0
        assert site.factors().extra == ()
        assert events(model)["start_switch"]["sites"][name]["guarded"] == []
    assert not [n for n in model.state_dict() if n.endswith(("start.up", "start.down"))]
    assert torch.equal(model(x), expected)


# ---------------------------------------------------------------------- moments


def test_a_and_b_start_with_fresh_moments() -> None:
    model = init(after=T)
    optimizer = adam(model, weight_decay=0.0)
    train(model, T, optimizer)
    assert not any(value.any() for p in parameters(model) for value in optimizer.state[p].values())
    before = [p.detach().clone() for p in parameters(model)]
    train(model, 1, optimizer, start=T)
    for p, start in zip(parameters(model), before, strict=True):
        assert optimizer.state[p]["step"] == 1
        moved = (p.detach() - start).abs()
        torch.testing.assert_close(
            moved, torch.full_like(moved, 1e-2), rtol=1e-2, atol=0
        )  # Adam's first step is lr long


def test_the_trajectory_after_the_switch_is_that_of_a_fresh_optimiser() -> None:
    """Against a loop by hand: A and B set to the split, an AdamW of their own, the frozen product subtracted from W."""
    model = init(after=T).double()
    train(model, T, optimizer := adam(model))
    twin = init(after=10**6).double()
    for site, copied in zip(sites(model).values(), sites(twin).values(), strict=True):
        copied.structure.load_state_dict(site.structure.state_dict())
    for name, weight in weights(twin).items():
        term = sites(model)[name].start
        weight.data -= sites(model)[name].scale * term.up @ term.down
    other = adam(twin)
    for step in range(T, T + 5):
        train(model, 1, optimizer, step)
        train(twin, 1, other, step)
    for one, by_hand in zip(parameters(model), parameters(twin), strict=True):
        torch.testing.assert_close(one, by_hand, rtol=1e-9, atol=1e-12)


def test_momentum_is_dropped_too_and_what_is_no_part_of_the_switch_keeps_its_moments() -> None:
    model = init(after=T, modules_to_save=["second"], target_modules=["first"])
    train(model, T, optimizer := torch.optim.SGD(parameters(model), lr=0.05, momentum=0.9))
    kept = {id(p) for p in optimizer.state}
    mine = {id(p) for site in sites(model).values() for p in site.parameters()}
    assert kept == {id(p) for p in parameters(model)} - mine


# ---------------------------------------------------------------------- cost, and what it says


def test_no_matrix_of_the_weights_size_is_made_in_a_step() -> None:
    """Forward and backward with frozen twins and gains: nothing of size out × in."""
    wide = 128

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(wide, wide)
            self.first.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = isinstance(out, Tensor) and not out._is_view()
            inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
            if made and out.untyped_storage().data_ptr() not in inputs:
                self.numel = max(self.numel, out.numel())
            return out

    model = init(after=1, net=Wide, target_modules=["first"], directions=3)
    sites(model)["first"].structure.B.data.normal_()
    optimizer = torch.optim.SGD(parameters(model), lr=1e-3)
    for _ in range(2):
        with Largest() as seen:
            model(torch.randn(4, wide)).square().mean().backward()
        optimizer.step()
        assert 0 < seen.numel < wide * wide / 4


def test_what_the_switch_did_is_an_event_with_its_numbers() -> None:
    model = init(after=T)
    train(model, T)
    what = events(model)["start_switch"]
    assert (what["step"], what["adapter"]) == (T, "default")
    assert what["seconds"] > 0
    for name, site in sites(model).items():
        said = what["sites"][name]
        assert said["index"] == site.start.index.tolist()
        assert said["sigma"] == pytest.approx(site.start.sigma.tolist(), rel=1e-6)
        assert said["rate"] == pytest.approx(site.start.rate.tolist(), rel=1e-6)
        assert said["guarded"] == []
        assert said["ranked_on"] == "in memory"
        assert said["seconds"] > 0


def test_a_pre_launch_on_data_finds_what_the_task_asks_for_and_training_then_does_it() -> None:
    """The task halves the last two of W's directions: SGD's first steps show which, and A and B then shrink them."""
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(OUT, IN), full_matrices=False)
    sigma = torch.tensor([3.0, 2.5, 2.0, 1.0, 0.8])
    w, target = (u * sigma) @ vt, (u * sigma * torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5])) @ vt

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(IN, OUT, bias=False)
            self.first.weight.data = w.clone()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model, x = init(after=5, net=One, target_modules=["first"]), torch.randn(512, IN)
    optimizer = torch.optim.SGD(parameters(model), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - x @ target.T).square().mean()
        loss.backward()
        optimizer.step()
    assert sorted(sites(model)["first"].start.index.tolist()) == [3, 4]
    assert loss.item() < 1e-5
    torch.testing.assert_close(w + sites(model)["first"].delta_weight(), target, rtol=0, atol=1e-2)
