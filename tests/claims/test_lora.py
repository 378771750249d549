"""Plain is stock peft LoRA: the same A and B give the same outputs, gradients and training trajectory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import weftlora
from weftlora.adapter.site import build_site
from weftlora.kernel.dropout import dropped
from weftlora.terms.structure.plain import Plain

IN, HIDDEN, OUT = 6, 10, 4
TARGETS = ["0", "2"]
SETTINGS = [
    pytest.param({"r": 4, "lora_alpha": 7}, id="alpha"),
    pytest.param({"r": 3, "lora_alpha": 5, "use_rslora": True}, id="rslora"),
    pytest.param({"r": 3, "lora_alpha": 16, "lora_dropout": 0.3}, id="dropout"),
    pytest.param({"r": 4, "lora_alpha": 8, "rank_pattern": {"^2": 2}, "alpha_pattern": {"^0": 3}}, id="patterns"),
]


def adapted(config: LoraConfig | weftlora.WeftConfig) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT))
    return get_peft_model(base, config)


def pair(**fields: object) -> tuple[PeftModel, PeftModel]:
    """Our model and peft's, on one base, with the same A and a B that is not zero."""
    ours = adapted(weftlora.PlainLoraConfig(target_modules=TARGETS, **fields))
    stock = adapted(LoraConfig(target_modules=TARGETS, **fields))
    for name in TARGETS:
        term = ours.base_model.model[int(name)].site("default").structure
        theirs = stock.base_model.model[int(name)]
        assert term.A.shape == theirs.lora_A["default"].weight.shape
        nn.init.normal_(term.B, std=0.1)
        theirs.lora_A["default"].weight.data = term.A.detach().clone()
        theirs.lora_B["default"].weight.data = term.B.detach().clone()
        if isinstance(drop := theirs.lora_dropout["default"], nn.Dropout):
            theirs.lora_dropout["default"] = OurMasks(drop.p)
    return ours, stock


class OurMasks(nn.Dropout):
    """Dropout with the masks that our kernel draws."""

    def forward(self, x: Tensor) -> Tensor:
        return dropped(x, self.p) if self.training else x


def trained(model: PeftModel) -> list[nn.Parameter]:
    """A and B of every module, in one order for both."""
    return [p for _, p in sorted(model.named_parameters()) if p.requires_grad]


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(2)
    return torch.randn(9, IN, generator=rng), torch.randn(9, OUT, generator=rng)


@pytest.mark.parametrize("fields", SETTINGS)
@pytest.mark.parametrize("training", [False, True])
def test_the_forward_and_all_gradients_are_those_of_peft(fields: dict, training: bool):
    results = []
    for model in pair(**fields):
        x, target = batch()
        x.requires_grad_()
        torch.manual_seed(3)
        y = model.train(training)(x)
        gradients = torch.autograd.grad((y - target).square().mean(), [x, *trained(model)])
        results.append([y.detach(), *gradients])
    assert len(results[0]) == 6
    for got, want in zip(*results, strict=True):
        close(got, want)


@pytest.mark.parametrize("fields", SETTINGS)
def test_twenty_steps_of_adamw_end_at_the_same_adapter(fields: dict):
    x, target = batch()
    ends = []
    for model in pair(**fields):
        start = [p.detach().clone() for p in trained(model)]
        optimiser = torch.optim.AdamW(trained(model), lr=0.01, weight_decay=0.1)
        torch.manual_seed(3)
        for _ in range(20):
            optimiser.zero_grad()
            (model.train()(x) - target).square().mean().backward()
            optimiser.step()
        assert all((p - s).abs().max() > 0.01 for p, s in zip(trained(model), start, strict=True))
        ends.append([p.detach() for p in trained(model)] + [model.eval()(x).detach()])
    for got, want in zip(*ends, strict=True):
        close(got, want)


@pytest.mark.parametrize("fields", SETTINGS)
def test_the_merged_weight_is_that_of_peft(fields: dict):
    ours, stock = pair(**fields)
    for got, want in zip(ours.merge_and_unload().parameters(), stock.merge_and_unload().parameters(), strict=True):
        close(got, want)


@pytest.mark.filterwarnings("ignore:the rank is larger")
def test_the_start_is_that_of_lora():
    """Section 4.1 of the paper: B = 0, so ΔW = 0; A is random within ±1/√in, as in the released code and peft."""
    ours = adapted(weftlora.PlainLoraConfig(r=200, target_modules=TARGETS))
    stock = adapted(LoraConfig(r=200, target_modules=TARGETS))
    for name, fan_in in zip(TARGETS, (IN, HIDDEN), strict=True):
        term = ours.base_model.model[int(name)].site("default").structure
        theirs = stock.base_model.model[int(name)].lora_A["default"].weight
        assert torch.count_nonzero(term.B) == 0
        assert term.A.abs().max() <= 1 / fan_in**0.5
        assert term.A.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
        assert theirs.std().item() == pytest.approx(term.A.std().item(), rel=0.1)
    x, _ = batch()
    assert torch.equal(ours(x), ours.base_model.model[2].base_layer(torch.tanh(ours.base_model.model[0].base_layer(x))))


@settings(max_examples=25, deadline=None)
@given(r=st.integers(1, 9), fan_in=st.integers(1, 9), out=st.integers(1, 9), alpha=st.floats(0.1, 50))
def test_the_update_is_alpha_over_r_times_B_A(r: int, fan_in: int, out: int, alpha: float):
    site = build_site(Plain(), (r, fan_in, out), scale=alpha / r, dropout=0.0).double()
    nn.init.normal_(site.structure.B)
    x = torch.randn(3, fan_in, dtype=torch.float64)
    want = alpha / r * (site.structure.B @ site.structure.A)
    torch.testing.assert_close(site(x, x.new_zeros(3, out)), x @ want.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(site.delta_weight(), want.detach(), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in site.parameters()) == r * (fan_in + out)
