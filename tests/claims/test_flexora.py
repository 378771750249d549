"""Flexora (arXiv 2408.10774): its equation written out with hooks on stock LoRA, and a planted answer that it finds.

y = W x + α̂_l (α/r) B A x with α̂ = N softmax(α); the released code scales the inputs of dropout, A and B instead: α̂³.
"""

from __future__ import annotations

import random
from statistics import fmean

import layer_cost
import pytest
import torch
from dashing import sites
from peft import LoraConfig, get_peft_model
from searching import adapted, distinct, make, mse, rows_of, stack, taught
from torch import Tensor, nn

import weftlora
from families import FAMILIES, adapter_config, logits, randomise
from weftlora.search.agreement import chance, jaccard
from weftlora.search.driver import LayerSearch
from weftlora.search.groups import Gates, groups_of
from weftlora.search.hypergradient import Inner
from weftlora.terms.layers.search import weights

ALPHA = torch.tensor([0.4, -0.3], dtype=torch.float64)


def stock(model: nn.Module) -> nn.Module:
    """peft's own LoRA with the values of a weftlora adapter on the same tiny Llama."""
    torch.manual_seed(3)
    other = get_peft_model(FAMILIES["llama"].build(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    held = {n.removeprefix("base_model.model."): m for n, m in other.named_modules()}
    with torch.no_grad():
        for name, site in sites(model).items():
            held[name].lora_A["default"].weight.copy_(site.structure.A)
            held[name].lora_B["default"].weight.copy_(site.structure.B)
    return other


def gated(preset: str) -> tuple[nn.Module, Gates]:
    torch.manual_seed(3)
    model = get_peft_model(
        FAMILIES["llama"].build(), adapter_config("plain", "llama", layers=weftlora.Search(preset=preset))
    )
    randomise(model)
    return model, Gates(groups_of(model, "default", "block"))


def block_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def test_the_equation_is_stock_lora_whose_branch_is_multiplied_once():
    model, gates = gated("ours")
    gates.write(weights(ALPHA))
    other = stock(model)
    for name, module in other.named_modules():
        if name.endswith("lora_B.default"):
            factor = float(weights(ALPHA)[block_of(name)])
            module.register_forward_hook(lambda _m, _i, out, f=factor: out * f)
    batch = FAMILIES["llama"].batch()
    torch.testing.assert_close(logits(model, batch), logits(other, batch), rtol=1e-5, atol=1e-6)


def test_the_released_preset_is_its_three_hooks_on_the_inputs_of_dropout_a_and_b():
    model, gates = gated("released")
    gates.write(weights(ALPHA) ** weftlora.Search(preset="released").power)
    other = stock(model)
    hooked = 0
    for name, module in other.named_modules():
        if name.rpartition(".")[0].endswith(("lora_dropout", "lora_A", "lora_B")) and name.endswith(".default"):
            factor = float(weights(ALPHA)[block_of(name)])
            module.register_forward_pre_hook(lambda _m, args, f=factor: (args[0] * f, *args[1:]))
            hooked += 1
    assert hooked == 3 * len(sites(model))
    batch = FAMILIES["llama"].batch()
    torch.testing.assert_close(logits(model, batch), logits(other, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_zero_gives_the_logits_of_plain_lora_bit_for_bit_for_n_from_1_to_128(dtype: torch.dtype):
    """A gate of every N in the same two blocks: any that is not exactly 1 would show."""
    model, gates = gated("ours")
    batch = FAMILIES["llama"].batch()
    torch.manual_seed(3)
    plain = get_peft_model(FAMILIES["llama"].build(), adapter_config("plain", "llama"))
    randomise(plain)
    models = [m.to(dtype) for m in (plain, model)]
    for site in gates.sites:
        site.layer_gate = site.layer_gate.double()
    expected = logits(models[0], batch)
    for n in range(1, 129):
        alpha_hat = weights(torch.zeros(n))
        gates.write(torch.stack([alpha_hat[0], alpha_hat[-1]]))
        assert torch.equal(logits(models[1], batch), expected), n
    gates.write(torch.tensor([1.0, 1.02]))
    assert not torch.equal(logits(models[1], batch), expected)


@pytest.mark.parametrize("blocks", [2, 3, 49, 128])
def test_a_search_of_n_blocks_starts_as_plain_lora_bit_for_bit(blocks: int):
    """With as many gates as N says, and after a step on α that moved nothing."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    plain, model = (adapted(stack(blocks), layers, moved=0.1).float() for layers in (weftlora.All(), weftlora.Search()))
    expected = plain.eval()(x)
    assert torch.equal(model.eval()(x), expected)
    gates = Gates(groups_of(model, "default", "block"))
    assert len(gates.groups) == blocks
    gates.write(weftlora.Search().gates(torch.zeros(blocks)))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("preset", ["ours", "released"])
def test_doubling_one_alpha_hat_doubles_its_blocks_branch_once_and_no_other(preset: str):
    """α̂³ of the released code is eight times."""
    model, gates = gated(preset)
    inputs = {name: torch.randn(3, site.factors().A.shape[1]) for name, site in sites(model).items()}

    def branches() -> dict[str, Tensor]:
        model.eval()
        zero = {name: torch.zeros(3, site.factors().B.shape[0]) for name, site in sites(model).items()}
        return {name: site(inputs[name], zero[name]).detach() for name, site in sites(model).items()}

    before = branches()
    gates.write(torch.tensor([1.0, 2.0]) ** weftlora.Search(preset=preset).power)
    for name, branch in branches().items():
        factor = 1 if block_of(name) == 0 else 2 if preset == "ours" else 8
        assert torch.equal(branch, factor * before[name]), name  # powers of two: not even rounding may differ


def test_the_second_stage_on_the_last_half_keeps_about_half_of_the_activations_and_of_the_trained_numbers():
    cases = layer_cost.measure(layers=4, hidden=64, rounds=1)
    ratio = {name: case["bytes"] / cases["all"]["bytes"] for name, case in cases.items()}
    assert ratio["last half"] < 0.65
    assert ratio["last half"] < ratio["first half"] < 1
    assert ratio["every second"] < 1
    assert {case["trained"] / cases["all"]["trained"] for name, case in cases.items() if name != "all"} == {0.5}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 32, 49, 127, 128])
def test_alpha_zero_is_plain_lora_bit_for_bit_whatever_n_is(n: int):
    model = adapted(stack(2), weftlora.Search(), moved=0.3).float()
    for site in sites(model).values():
        x, y = torch.randn(3, site.factors().A.shape[1]), torch.randn(3, site.factors().B.shape[0])
        site.layer_gate = None
        plain = site.eval()(x, y)
        site.layer_gate = weights(torch.zeros(n))[-1]
        assert torch.equal(site(x, y), plain)


def recovered(k: int, seed: int, **fields) -> tuple[set[int], set[int], LayerSearch]:
    inner = {"lr": 3e-3, "batch_size": 16, **fields.pop("inner", {})}
    chosen = set(random.Random(100 + seed).sample(range(6), k))
    base = distinct(6, seed)
    settings = weftlora.Search(**{"outer_batches": 2, "val_size": 32, "steps": 20, "alpha_lr": 0.02, **fields})
    model = adapted(base, settings, seed, target_modules=["up"], r=8)
    search = make(model, taught(base, chosen, seed=seed), seed=seed, **inner)
    return chosen, set(search.run().blocks), search


def test_a_planted_update_of_half_the_blocks_is_recovered():
    found = [recovered(3, seed)[:2] for seed in range(5)]
    mean = fmean(jaccard(planted, selected) for planted, selected in found)
    assert mean >= 0.6, found
    assert mean > 1.5 * fmean(chance(3, len(selected), 6) for _, selected in found)


def test_the_rule_needs_no_number_of_blocks_one_planted_block_is_found_too():
    planted, selected, search = recovered(1, seed=0)
    assert planted <= selected
    assert len(selected) < 6
    assert search.selection().margin > 0


def test_a_module_that_no_row_reaches_contributes_nothing_and_is_no_error():
    """An expert that is not used in a batch has no gradient at all."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = stack(3).blocks

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[2](self.blocks[0](x))

    search = make(
        adapted(Skips().double(), weftlora.Search(outer_batches=1, val_size=8, steps=3)),
        rows_of(torch.randn(24, 6).double(), torch.randn(24, 6).double()),
    )
    search.step()
    batches = search._batches("validation", 1)
    h = search.passes.backward(batches, training=False).h
    assert h[1] == 0
    assert search.step()["skipped"] is False
    assert all(torch.isfinite(search.alpha.detach()))


def test_one_block_may_take_all_the_weight_without_a_value_that_is_no_number():
    search = make(adapted(stack(3), weftlora.Search(outer_batches=1, val_size=8, steps=2), moved=0.1), taught_rows())
    with torch.no_grad():
        search.alpha.copy_(torch.tensor([800.0, 0.0, 0.0]))
    search.gates.write(weights(search.alpha.detach()))
    row = search.step()
    assert row["max_alpha_hat"] == pytest.approx(3.0)
    assert not row["skipped"]
    assert search.alpha.detach().isfinite().all()


def taught_rows() -> list[dict[str, Tensor]]:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)).double()
    return rows_of(x, x.tanh())


def test_theta_never_sees_the_validation_rows():
    """The validation rows train α only: with other validation rows θ's first step is the same bit for bit."""
    found = []
    for shift in (0.0, 100.0):
        rows = taught_rows()
        held = rows_of(torch.randn(8, 6).double(), torch.full((8, 6), shift).double())
        model = adapted(stack(3), weftlora.Search(outer_batches=1, steps=1))
        search = LayerSearch(model, model.peft_config["default"].layers, Inner(lr=1e-2), rows, held, loss=mse)
        search.step()
        found.append([p.detach().clone() for p in search.passes.params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
