"""Tied-LoRA (arXiv 2311.09578): its forward and backward by formula, and every cell of the grid of trained sets.

y_l = W_l x + s · v_l ⊙ (B (u_l ⊙ (A x)))       A [r, d], B [o, r] shared by all layers l; u_l [r], v_l [o]
"""

import copy
import itertools

import pytest
import torch
from peft import VeraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

import weftlora
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import ConfigError
from weftlora.terms.structure.tied import PARTS, Tied, TiedTerm

D, OUT, R, L = 5, 7, 3, 3
ALL_SETS = ["".join(c) for n in range(1, 5) for c in itertools.combinations("ABuv", n)]
every_set = pytest.mark.parametrize("trained", ALL_SETS)


pytestmark = pytest.mark.filterwarnings("ignore:lora_alpha=")


class Stack(nn.Module):
    """L layers; the adapted projection of each is followed by a frozen one back to the width."""

    def __init__(self, layers: int = L):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(D, OUT), "out": nn.Linear(OUT, D, bias=False)}) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["out"](torch.tanh(layer["qkv"](x))))
        return x


def tied(train: object = "tl6", layers: int = L, *, random: bool = False, alpha: float | None = None, **fields: object):
    """The stack with Tied-LoRA on every `qkv`, in fp64; `random` replaces every tensor of the adapter."""
    config = weftlora.TiedLoraConfig(r=R, train=train, target_modules=["qkv"], lora_alpha=alpha, **fields)
    model = get_peft_model(Stack(layers), config).double()
    if random:
        for tensor in {
            id(t): t for term in terms(model) for part in PARTS if (t := term.part(part)) is not None
        }.values():
            nn.init.normal_(tensor.data)
    return model


def sites(model: nn.Module) -> list[WeftLinear]:
    return [m for m in model.modules() if isinstance(m, WeftLinear)]


def terms(model: nn.Module) -> list[TiedTerm]:
    return [layer.site("default").structure for layer in sites(model)]


def tokens() -> Tensor:
    return torch.randn(8, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained_parts(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module) -> Tensor:
    x = tokens()
    return (model(x) - x.cos()).square().sum()


def train(
    model: nn.Module, steps: int, optimiser: type[torch.optim.Optimizer] = torch.optim.SGD, lr: float = 0.05
) -> None:
    stepper = optimiser([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        stepper.zero_grad()
        loss_of(model).backward()
        stepper.step()


# ---------------------------------------------------------------------- forward and backward by formula


def test_each_layer_computes_the_formula_with_the_shared_pair_and_its_own_vectors():
    model, x = tied(random=True, alpha=6), tokens()
    A, B = terms(model)[0].A, terms(model)[0].B
    assert len({id(term.part("u")) for term in terms(model)}) == len({id(term.part("v")) for term in terms(model)}) == L
    for layer, term in zip(sites(model), terms(model), strict=True):
        u, v = term.part("u"), term.part("v")
        for t in range(len(x)):
            want = layer.base_layer(x[t]) + 6 / R * v * (B @ (u * (A @ x[t])))
            torch.testing.assert_close(layer(x)[t], want, rtol=1e-12, atol=1e-12)


def test_the_backward_formulas_of_the_specification_sum_over_the_layers():
    model = tied(random=True, alpha=6)
    X, Y = [], []

    def keep(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        for t, kept in ((args[0], X), (out, Y)):
            t.requires_grad_(True) if t.is_leaf else t.retain_grad()
            kept.append(t)

    for layer in sites(model):
        layer.register_forward_hook(keep)
    x = tokens().requires_grad_()
    model(x).square().sum().backward()
    owner, s = terms(model)[0], 6 / R
    dA, dB = torch.zeros_like(owner.A), torch.zeros_like(owner.B)
    for layer, term, x_l, y_l in zip(sites(model), terms(model), X, Y, strict=True):
        A, B, u, v, G, x_now = (
            owner.A.detach(),
            owner.B.detach(),
            term.u.detach(),
            term.v.detach(),
            y_l.grad,
            x_l.detach(),
        )
        H = x_now @ A.T
        Z, P = H * u, (G * v) @ B
        M = G.T @ Z
        dB += s * v[:, None] * M
        dA += s * u[:, None] * (P.T @ x_now)
        torch.testing.assert_close(term.v.grad, s * (M * B).sum(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(term.u.grad, s * (P * H).sum(0), rtol=1e-12, atol=1e-12)
        dx = G @ layer.base_layer.weight + s * (P * u) @ A
        torch.testing.assert_close(x_l.grad, dx.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(owner.A.grad, dA, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(owner.B.grad, dB, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- the grid of trained sets


def test_the_grid_has_all_fifteen_cells():
    assert len(ALL_SETS) == 15


def expected_zero(trained: str) -> str:
    """Specification, section 4: B if it is trained, else v, else u, else A."""
    return next(part for part in "BvuA" if part in trained)


@every_set
def test_exactly_one_factor_starts_at_zero_and_the_rest_as_the_table_says(trained: str):
    for term in terms(tied(trained)):
        for part in PARTS:
            value = term.part(part)
            if part == expected_zero(trained):
                assert torch.count_nonzero(value) == 0
            elif part in "AB":
                assert torch.count_nonzero(value) == value.numel()
            elif part in trained:
                assert torch.equal(value, torch.ones_like(value))
            else:
                assert value is None  # a frozen 1 does not exist


@every_set
def test_at_the_start_the_model_is_the_base_bit_for_bit(trained: str):
    model, x = tied(trained), tokens()
    assert torch.equal(model(x), Stack().double()(x))
    for layer in sites(model):
        assert torch.count_nonzero(layer.get_delta_weight("default")) == 0


@every_set
def test_exactly_the_named_parts_are_parameters_and_the_frozen_ones_buffers(trained: str):
    model = tied(trained)
    owner, *followers = terms(model)
    assert {n for n, _ in owner.named_parameters()} == set(trained)
    assert {n for n, _ in owner.named_buffers()} == set("AB") - set(trained)
    for term in followers:
        assert {n for n, _ in term.named_parameters()} == set(trained) & set("uv")
        assert list(term.named_buffers()) == []
    assert all("weft_" in name for name in trained_parts(model))
    counts = {"A": R * D, "B": OUT * R, "u": L * R, "v": L * OUT}
    assert sum(p.numel() for p in trained_parts(model).values()) == sum(counts[part] for part in trained)


@every_set
def test_every_tied_tensor_is_saved_once_frozen_ones_too(trained: str):
    model = tied(trained)
    saved = get_peft_model_state_dict(model)
    sizes = {"A": R * D, "B": OUT * R, "u": L * R * ("u" in trained), "v": L * OUT * ("v" in trained)}
    assert sum(t.numel() for t in saved.values()) == sum(sizes.values())
    assert len([key for key in saved if key.endswith(".A")]) == 1


@every_set
def test_at_the_first_step_only_the_zero_factor_moves(trained: str):
    model = tied(trained)
    loss_of(model).backward()
    for name, p in trained_parts(model).items():
        moves = name.rpartition(".")[2] == expected_zero(trained)
        assert (torch.count_nonzero(p.grad) > 0) == moves, name


@pytest.mark.parametrize(("trained", "zero"), [(trained, zero) for trained in ALL_SETS for zero in (None, *trained)])
def test_no_start_is_dead(trained: str, zero: str | None):
    """After three steps every trained part has moved, whichever of the trained factors is the zero one."""
    model = tied(trained, zero=zero)
    start = {name: t.detach().clone() for name, t in model.state_dict().items()}
    names = set(trained_parts(model))
    train(model, steps=3)
    assert {name for name, t in model.state_dict().items() if not torch.equal(t, start[name])} == names


@pytest.mark.parametrize(
    ("trained", "zero"), [(trained, zero) for trained in ALL_SETS for zero in sorted(set("ABuv") - set(trained))]
)
def test_a_frozen_zero_is_refused_as_a_dead_start(trained: str, zero: str):
    with pytest.raises(ConfigError, match="dead start"):
        Tied(train=trained, zero=zero)


def test_two_zero_factors_would_be_dead_for_ever():
    """Why there is only one: with B = 0 and v = 0 nothing ever moves."""
    model = tied("tl6")
    for term in terms(model):
        term.v.data.zero_()
    start = {name: t.clone() for name, t in model.state_dict().items()}
    train(model, steps=3)
    assert all(torch.equal(t, start[name]) for name, t in model.state_dict().items())


# ---------------------------------------------------------------------- names of trained sets


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ("tl5", "AB"),
        ("tl6", "ABuv"),
        ("TL6", "ABuv"),
        ("vera", "uv"),
        ("Bu", "Bu"),
        ("uB", "Bu"),
        ("bu", "Bu"),
        (["v", "A"], "Av"),
        ({"A", "B", "u"}, "ABu"),
        (("v",), "v"),
        (frozenset("AB"), "AB"),
    ],
)
def test_a_preset_letters_or_a_collection_name_the_trained_set(train: object, parts: str):
    assert Tied(train=train).trained == frozenset(parts)


@pytest.mark.parametrize("train", ["tl1", "tl4", "w", "", [], ["tl6"], 5, None, [["A"]], {"A": False}, "lora"])
def test_what_names_no_trained_set_is_refused(train: object):
    with pytest.raises(ConfigError, match="train="):
        Tied(train=train)


def test_alpha_is_the_rank_so_that_the_papers_formula_has_no_factor():
    model = tied(random=True)
    assert {layer.site("default").scale for layer in sites(model)} == {1.0}


def test_another_alpha_with_a_preset_of_the_paper_is_said():
    with pytest.warns(UserWarning, match=r"scales the update of Tied-LoRA by 2, where the paper uses 1"):
        weftlora.TiedLoraConfig(r=8, train="tl5", lora_alpha=16)


@pytest.mark.parametrize("init", ["kaiming", "normal"])
def test_frozen_random_factors_have_the_spread_they_are_named_after(init: str):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(100, 120)

    config = weftlora.TiedLoraConfig(r=50, train="vera", init=init, target_modules=["qkv"])
    (term,) = terms(get_peft_model(Wide(), config))
    for value, fan_in in ((term.A, 100), (term.B, 50)):
        want = 1.0 if init == "normal" else (3 * fan_in) ** -0.5
        assert value.std().item() == pytest.approx(want, rel=0.05)
        assert abs(value.mean().item()) < 0.05 * want


# ---------------------------------------------------------------------- equal to other methods


def test_one_layer_of_trained_a_and_b_is_lora_bit_for_bit_after_training():
    lora = get_peft_model(Stack(1), weftlora.PlainLoraConfig(r=R, lora_alpha=6, target_modules=["qkv"])).double()
    model = tied("AB", layers=1, alpha=6)
    (plain,), (term,) = [layer.site("default").structure for layer in sites(lora)], terms(model)
    plain.A.data = term.A.detach().clone()
    for either in (model, lora):
        train(either, steps=10, optimiser=torch.optim.AdamW, lr=0.01)
    assert torch.equal(term.A, plain.A)
    assert torch.equal(term.B, plain.B)
    assert torch.count_nonzero(term.B) == term.B.numel()
    assert torch.equal(model(tokens()), lora(tokens()))


def test_trained_vectors_over_a_frozen_pair_are_vera():
    """λ_d of VeRA is u, λ_b is v."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    ours = get_peft_model(base(), weftlora.TiedLoraConfig(r=R, train="vera", group="shape", target_modules=["0", "2"]))
    vera = get_peft_model(base(), VeraConfig(r=R, target_modules=["0", "2"], vera_dropout=0.0))
    theirs = [vera.base_model.model[i] for i in (0, 2)]
    terms(ours)[0].A.copy_(theirs[0].vera_A["default"])
    terms(ours)[0].B.copy_(theirs[0].vera_B["default"])
    for term, layer in zip(terms(ours), theirs, strict=True):
        nn.init.normal_(term.u)
        nn.init.normal_(term.v)
        layer.vera_lambda_d["default"].data = term.u.detach().clone()
        layer.vera_lambda_b["default"].data = term.v.detach().clone()
    results = []
    for model in (ours, vera):
        y = model(tokens().float())
        y.square().sum().backward()
        results.append(y.detach())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for term, layer in zip(terms(ours), theirs, strict=True):
        torch.testing.assert_close(term.u.grad, layer.vera_lambda_d["default"].grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(term.v.grad, layer.vera_lambda_b["default"].grad, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], base()(tokens().float()))


def test_tl6_with_its_vectors_frozen_at_one_is_tl5():
    six, five = tied("tl6"), tied("tl5")
    terms(six)[0].A.data = terms(five)[0].A.detach().clone()
    for term in terms(six):
        term.u.requires_grad_(False)
        term.v.requires_grad_(False)
    for model in (six, five):
        train(model, steps=10, optimiser=torch.optim.AdamW, lr=0.01)
    assert terms(five)[0].B.abs().max() > 0.01
    for part in "AB":
        torch.testing.assert_close(terms(six)[0].part(part), terms(five)[0].part(part), rtol=1e-12, atol=1e-12)


def test_tying_is_lora_with_equal_factors_whose_gradients_add_up():
    tied_model, x = tied("tl5", random=True), tokens()
    lora = get_peft_model(Stack(), weftlora.PlainLoraConfig(r=R, lora_alpha=R, target_modules=["qkv"])).double()
    owner, plains = terms(tied_model)[0], [layer.site("default").structure for layer in sites(lora)]
    for plain in plains:
        plain.A.data, plain.B.data = owner.A.detach().clone(), owner.B.detach().clone()
    for model in (tied_model, lora):
        model(x).square().sum().backward()
    for part in "AB":
        total = sum(getattr(plain, part).grad for plain in plains)
        torch.testing.assert_close(getattr(owner, part).grad, total, rtol=1e-12, atol=1e-12)


def test_an_optimiser_sees_each_tied_tensor_once():
    parameters = [p for p in tied("tl6").parameters() if p.requires_grad]
    assert len(parameters) == len({id(p) for p in parameters}) == 2 + 2 * L


# ---------------------------------------------------------------------- merging


@every_set
def test_the_merged_weight_is_the_formula_and_unmerging_restores_it(trained: str):
    model, x = tied(trained, random=True, alpha=6), tokens()
    before = [layer.base_layer.weight.detach().clone() for layer in sites(model)]
    live = model(x).detach()
    model.merge_adapter()
    for layer, term, W in zip(sites(model), terms(model), before, strict=True):
        u, v = (torch.ones(n).double() if (t := term.part(p)) is None else t for p, n in (("u", R), ("v", OUT)))
        want = W + 6 / R * torch.diag(v) @ term.part("B") @ torch.diag(u) @ term.part("A")
        torch.testing.assert_close(layer.base_layer.weight, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), live, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, W) for layer, W in zip(sites(model), before, strict=True))
    assert torch.equal(model(x), live)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), live, rtol=1e-10, atol=1e-10)
