"""Hypergradients against what they are derivatives of: explicit α leaves, and finite differences of the whole program."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from searching import adapted, make, mse, planted, quantised, rounded, stack
from torch import Tensor, nn

import weftlora
from weftlora.errors import ConfigError
from weftlora.search import hypergradient
from weftlora.search.batches import Loss, Random
from weftlora.search.driver import LayerSearch
from weftlora.search.hypergradient import Inner, InnerStep, _adam, _may_turn, adjoint
from weftlora.terms.layers.search import weights

STRUCTURES = {
    "plain": {},
    "hydra": {"structure": weftlora.Hydra(heads=3)},
    "hydra_Ax": {"structure": weftlora.Hydra(heads=2, router_input="Ax")},
    "tied_tl6": {"structure": weftlora.Tied(train="tl6")},
    "tied_v": {"structure": weftlora.Tied(train="vera")},
    "tied_Bu": {"structure": weftlora.Tied(train="Bu")},
    "tied_AB": {"structure": weftlora.Tied(train="tl5")},
}
SMALL = {"outer_batches": 2, "val_size": 12, "steps": 2}


def moved_search(structure: str = "plain", checkpointing: str = "none", bits: str = "none", **fields) -> LayerSearch:
    """A search in the middle of things: θ and α are away from their starts."""
    base = stack(3, checkpointing=checkpointing)
    rows = planted(stack(3), {1}, 40)
    inner = fields.pop("inner", {})
    extra = fields.pop("config", {})
    search = weftlora.Search(**{**SMALL, **fields})
    base = {"none": lambda b: b, "quantised": quantised, "rounded": rounded}[bits](base)
    found = make(adapted(base, search, moved=0.3, **STRUCTURES[structure], **extra), rows, **inner)
    set_alpha(found, torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64))
    return found


def set_alpha(search: LayerSearch, alpha: Tensor) -> None:
    with torch.no_grad():
        search.alpha.copy_(alpha)
    search.gates.write(search.search.gates(alpha))


def by_leaf(search: LayerSearch, batches: list) -> Tensor:
    """∂R_val/∂α by autograd through an explicit α."""
    alpha = search.alpha.detach().clone().requires_grad_()
    search.model.eval()
    alpha_hat, most = weights(alpha), search.search.alpha_hat_max
    if most is not None:
        alpha_hat = torch.stack([torch.minimum(value, value.new_tensor(most)) for value in alpha_hat])
    with search.gates.graphed(list(alpha_hat**search.search.power)):
        loss = torch.stack([mse(search.model, b) for b in batches]).mean()
        [found] = torch.autograd.grad(loss, alpha)
    return found


def outer_batches(search: LayerSearch) -> list:
    before = search.cycles["validation"].position
    batches = search._batches("validation", search.search.outer_batches)
    search.cycles["validation"].position = before
    return batches


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_the_inner_product_identity_equals_an_explicit_alpha_leaf(structure: str):
    """Two micro-batches: accumulation is part of the claim."""
    search = moved_search(structure)
    assert (search.gates.factors is None) == (structure == "tied_AB")
    expected = by_leaf(search, outer_batches(search))
    _, found = search.hypergradient()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("structure", ["plain", "tied_AB"])
@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_the_identity_holds_under_gradient_checkpointing(structure: str, kind: str):
    plain, checkpointed = moved_search(structure), moved_search(structure, checkpointing=kind)
    expected = by_leaf(plain, outer_batches(plain))
    _, found = checkpointed.hypergradient()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_the_identity_holds_for_single_modules_too():
    base, rows = stack(3), planted(stack(3), {1}, 40)
    search = make(adapted(base, weftlora.Search(granularity="module", **SMALL), moved=0.3), rows)
    set_alpha(search, torch.linspace(-0.5, 0.5, 6, dtype=torch.float64))
    expected = by_leaf(search, outer_batches(search))
    torch.testing.assert_close(search.hypergradient()[1], expected, rtol=1e-10, atol=1e-14)


def test_direct_is_the_finite_difference_of_the_validation_loss_at_fixed_theta():
    search = moved_search()
    batches = outer_batches(search)
    _, found = search.hypergradient()
    start = search.alpha.detach().clone()
    for i in range(3):
        sides = []
        for eps in (1e-5, -1e-5):
            moved = start.clone()
            moved[i] += eps
            set_alpha(search, moved)
            with torch.no_grad():
                sides.append(torch.stack([mse(search.model.eval(), b) for b in batches]).mean())
        torch.testing.assert_close(found[i], (sides[0] - sides[1]) / 2e-5, rtol=1e-5, atol=1e-9)


LOSSES: dict[str, Loss] = {
    "squares": mse,
    "absolute": lambda model, batch: (model(batch["x"]) - batch["y"]).abs().mean(),
    "cross entropy": lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"].argmax(-1)),
    "no bound below": lambda model, batch: -model(batch["x"]).pow(3).sum(),
    "of one output": lambda model, batch: model(batch["x"])[0, 0].sin(),
}


@pytest.mark.parametrize("structure", list(STRUCTURES))
@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_gradients_of_alpha_sum_to_zero_for_any_loss(structure: str, loss: str):
    search = moved_search(structure)
    search.passes._loss = LOSSES[loss]
    _, found = search.hypergradient()
    assert abs(float(found.sum())) < 1e-12 * float(found.abs().sum())
    assert found.abs().max() > 1e-8


def test_cubed_gates_of_the_released_code_have_three_times_the_gradient():
    search = moved_search(preset="released")
    batches = outer_batches(search)
    expected = by_leaf(search, batches) * len(batches)  # it sums the losses of micro-batches
    torch.testing.assert_close(search.hypergradient()[1], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("structure", ["plain", "tied_AB"])
def test_a_gate_that_is_cut_off_is_a_constant_of_the_hypergradient(structure: str):
    """α̂ is 1.32, 0.59, 1.08 here: a bound of 1.2 holds the first."""
    search = moved_search(structure, alpha_hat_max=1.2)
    assert [float(g) for g in search.gates.gate_n] == pytest.approx([1.2, 0.594, 1.083], abs=1e-3)
    expected = by_leaf(search, outer_batches(search))
    _, found = search.hypergradient()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert abs(float(found.sum())) < 1e-12 * float(found.abs().sum())
    assert not torch.allclose(found, moved_search(structure).hypergradient()[1], rtol=0.05)


@pytest.mark.parametrize("kind", ["unrolled_fd", "unrolled_exact"])
def test_and_of_the_whole_unrolled_program(kind: str):
    fields = {"fd_step": 1e-4} if kind == "unrolled_fd" else {}
    search = moved_search(hypergrad=kind, inner_steps=2, alpha_hat_max=1.2, inner=INNER["sgd"], **fields)
    expected = brute_force(copy.deepcopy(search))
    torch.testing.assert_close(unrolled(search)[0], expected, rtol=1e-4, atol=1e-8)


def program(search: LayerSearch, alpha: Tensor) -> Tensor:
    """R_val after K inner steps of SGD from where `search` stands, written out without it."""
    search = copy.deepcopy(search)
    set_alpha(search, alpha)
    params = search.passes.params
    for p in params:
        p.grad = None
    lr, decay = search.inner.lr, search.inner.weight_decay
    for _ in range(search.search.inner_steps):
        search.model.train()
        for site in (s for g in search.gates.groups for s in g.sites.values()):
            site.awaits_search = False
        batches = search._batches("train", search.inner.accumulation)
        loss = torch.stack([mse(search.model, b) for b in batches]).mean()
        gradients = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p.add_(g + decay * p, alpha=-lr)
    search.model.eval()
    with torch.no_grad():
        return torch.stack([mse(search.model, b) for b in outer_batches(search)]).mean()


def brute_force(search: LayerSearch, eps: float = 1e-5) -> Tensor:
    start, found = search.alpha.detach().clone(), []
    for i in range(len(start)):
        move = torch.zeros_like(start)
        move[i] = eps
        found.append((program(search, start + move) - program(search, start - move)) / (2 * eps))
    return torch.stack(found)


def unrolled(search: LayerSearch) -> tuple[Tensor, list]:
    """The hypergradient after the search's own inner steps, and what those recorded."""
    for site in (s for g in search.gates.groups for s in g.sites.values()):
        site.awaits_search = False
    _, taken = search._inner_steps()
    return search.hypergradient(taken)[1], taken


INNER = {
    "sgd": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.05},
    "adam": {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.1},
}


@pytest.mark.parametrize("kind", ["unrolled_fd", "unrolled_exact"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_unrolled_equals_finite_differences_of_steps_of_accumulated_batches(kind: str, steps: int):
    """SGD; every optimiser, clipped or not, against a program that shares no code: tests/reference/test_true_hypergradients.py."""
    fields = {"hypergrad": kind, "inner_steps": steps, "inner": {**INNER["sgd"], "accumulation": 2}}
    if kind == "unrolled_fd":
        fields["fd_step"] = 1e-4
    search = moved_search(**fields)
    before = copy.deepcopy(search)
    found, _ = unrolled(search)
    torch.testing.assert_close(found, brute_force(before), rtol=1e-4, atol=1e-8)
    assert abs(float(found.sum())) < 1e-6 * float(found.abs().sum())
    assert search.rough == 0  # a step of SGD is linear in its gradient


def test_an_element_that_may_turn_is_told():
    """One of 100 gradients is near 0: Adam's first step is its sign, which a step on α may turn; what never moved cannot."""
    for one, expected in ((1.0, 0.0), (1e-3, 0.02 / 0.01), (0.0, 0.0)):
        p = nn.Parameter(torch.zeros(100, dtype=torch.float64))
        p.grad = torch.ones(100, dtype=torch.float64)
        p.grad[0] = one
        torch.optim.AdamW([p], lr=0.02).step()
        state = {"exp_avg_sq": 0.001 * p.grad**2}
        turning = 0.02 * _may_turn(state, p, 0.999, 0.01)
        step = InnerStep([], [], Random.now(), [p.grad], 1.0, [1.0], [0.0], [0.0], (0.9, 0.999), [turning])
        lam = [torch.ones(100, dtype=torch.float64)]
        found = adjoint([step], lam, torch.tensor([1.2, -1.6]), lambda step, towards: (towards, torch.zeros(2)), 0.01)
        assert found.rough == pytest.approx(expected / 2)  # beside a g of length 2


def test_a_selection_says_how_rough_its_hypergradients_were():
    search = moved_search(hypergrad="unrolled_exact", inner=INNER["adam"])
    assert "rough" in search.run().record
    assert "rough" not in moved_search().run().record


@pytest.mark.parametrize("structure", ["hydra", "tied_tl6", "tied_AB"])
def test_unrolled_kinds_agree_for_every_structure(structure: str):
    fields = {"inner_steps": 3, "inner": INNER["adam"]}
    exact, _ = unrolled(moved_search(structure, hypergrad="unrolled_exact", **fields))
    fd, _ = unrolled(moved_search(structure, hypergrad="unrolled_fd", fd_step=1e-4, **fields))
    torch.testing.assert_close(fd, exact, rtol=1e-5, atol=1e-9)


def test_dropout_is_repeated_in_the_passes_of_the_adjoint():
    fields = {"inner_steps": 2, "inner": INNER["sgd"], "config": {"lora_dropout": 0.3}}
    found = []
    for kind, extra in (("unrolled_exact", {}), ("unrolled_fd", {"fd_step": 1e-4})):
        search = moved_search(hypergrad=kind, **extra, **fields)
        torch.manual_seed(5)
        found.append(unrolled(search)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-9)


def test_truncation_to_one_step_is_the_last_steps_term():
    fields = {"hypergrad": "unrolled_exact", "inner_steps": 4, "inner": INNER["sgd"]}
    whole, taken = unrolled(moved_search(**fields))
    short, kept = unrolled(moved_search(unroll_steps=1, **fields))
    assert (len(taken), len(kept)) == (4, 1)
    assert not torch.allclose(whole, short, rtol=1e-3)


def test_direct_points_further_away_from_exact_the_longer_the_unroll():
    """The cosine is what the card shows per K; only its direction of change is a claim."""
    cosines = []
    for steps in (1, 8):
        fields = {"inner_steps": steps, "inner": {"optimizer": "sgd", "lr": 0.1}}
        exact, _ = unrolled(moved_search(hypergrad="unrolled_exact", **fields))
        search = moved_search(hypergrad="direct", **fields)
        direct, _ = unrolled(search)
        cosines.append(float(torch.nn.functional.cosine_similarity(exact, direct, dim=0)))
    assert cosines[0] > 0.9
    assert cosines[1] < cosines[0]


@pytest.mark.parametrize("kind", ["direct", "unrolled_fd"])
def test_on_a_quantised_base_the_hypergradient_is_that_of_the_same_function_unquantised(kind: str):
    fields = {"hypergrad": kind, "inner_steps": 2 if kind == "unrolled_fd" else 1, "inner": INNER["adam"]}
    found = [unrolled(moved_search(bits=bits, **fields))[0] for bits in ("quantised", "rounded")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)
    assert found[0].abs().max() > 1e-4
    with pytest.raises(ConfigError, match="quantised"):
        moved_search(bits="quantised", hypergrad="unrolled_exact")


def test_a_quantised_or_checkpointed_model_is_refused_for_exact_before_any_step():
    base = stack(3)
    model = adapted(base, weftlora.Search(hypergrad="unrolled_exact", **SMALL))
    model.gradient_checkpointing = True
    with pytest.raises(ConfigError, match="unrolled_fd"):
        make(model, planted(stack(3), {1}, 40))
    other = adapted(stack(3), weftlora.Search(hypergrad="unrolled_exact", **SMALL))
    other.register_parameter("packed", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(ConfigError, match="quantised"):
        make(other, planted(stack(3), {1}, 40))


def test_what_adams_step_changes_by_with_its_moments_is_autograds():
    """P = −∂θ'/∂m and Q = ∂θ'/∂v of one element each; without a gradient so far both moments are 0, and Q too."""
    m = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.5, 2e-3, 0.0], dtype=torch.float64, requires_grad=True)
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}
    step = -group["lr"] * m[:2] / (1 - 0.9**3) / ((v[:2] / (1 - 0.99**3)).sqrt() + 1e-3)
    by_m, by_v = torch.autograd.grad(step.sum(), (m, v))
    push, bend = _adam({"step": torch.tensor(3.0), "exp_avg": m.detach(), "exp_avg_sq": v.detach()}, group)
    torch.testing.assert_close(push[:2], -by_m[:2], rtol=1e-12, atol=0)
    torch.testing.assert_close(bend[:2], by_v[:2], rtol=1e-12, atol=0)
    assert float(bend[2]) == 0


def test_finite_differences_move_theta_by_the_length_that_is_set(monkeypatch: pytest.MonkeyPatch):
    search = moved_search(hypergrad="unrolled_fd", fd_step=0.03, inner={"optimizer": "sgd", "lr": 0.1})
    moved: list[float] = []
    at = hypergradient.parameters_at

    def seen(params: list[nn.Parameter], values: list[Tensor]):
        moved.append(sum(float((v - s).square().sum()) for v, s in zip(values, start, strict=True)) ** 0.5)
        return at(params, values)

    for site in (s for g in search.gates.groups for s in g.sites.values()):
        site.awaits_search = False
    _, [taken] = search._inner_steps()
    start = taken.theta
    monkeypatch.setattr(hypergradient, "parameters_at", seen)
    search.hypergradient([taken])
    assert moved == pytest.approx([0.03, 0.03])


def test_the_rate_of_theta_falls_along_a_cosine_from_its_whole():
    search = moved_search(steps=4, inner={"optimizer": "sgd", "lr": 0.1, "schedule": "cosine"})
    rates = []
    for _ in range(4):
        search.step()
        rates.append(search.loop.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


@pytest.mark.parametrize(
    "fields", [{"lr": 0}, {"lr": -1.0}, {"weight_decay": -0.1}, {"max_grad_norm": math.inf}, {"lr": "1"}]
)
def test_an_inner_optimiser_that_cannot_work_is_refused(fields: dict):
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}=.* cannot be used in a search"):
        Inner(**fields)
