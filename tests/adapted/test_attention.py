"""torch's MultiheadAttention adapted as a whole, held against stock LoRA with the same factors and against ΔW."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import weftlora
from families import randomise
from weftlora.adapted.attention import PARTS

E = 8


class Looks(nn.Module):
    """An attention between two linears, whose in and out projection have names that others have, too."""

    def __init__(self, **fields) -> None:
        super().__init__()
        self.out_proj = nn.Linear(E, E)
        self.attn = nn.MultiheadAttention(E, 2, batch_first=True, **fields)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.out_proj(x)
        y, _ = self.attn(q, x, x, need_weights=False)
        return y.tanh()


X = torch.randn(2, 5, E, generator=torch.Generator().manual_seed(1))


def adapted(make=weftlora.PlainLoraConfig, **fields) -> tuple[nn.Module, PeftModel]:
    torch.manual_seed(0)
    base = Looks()
    model = get_peft_model(copy.deepcopy(base), make(**{"r": 2, "target_modules": ["attn", "out_proj"], **fields}))
    return base, model


def test_with_the_same_factors_it_is_stock_lora() -> None:
    """Stock peft (0.21) adds the update of out_proj twice in a forward, by hand and then by a merge of its own, and differentiates one
    of them: to ours it is one of twice the scale, whose gradient reaches the factors halved."""
    fields = {"r": 3, "lora_alpha": 5, "target_modules": ["attn"], "rank_pattern": {"attn": 2}}
    base, model = adapted(**fields)
    randomise(model)
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
    theirs = stock.base_model.model.attn
    attention = model.base_model.model.attn
    with torch.no_grad():
        for layer, (_, ours) in zip((theirs, theirs.base_layer.out_proj), attention.layers(), strict=True):
            site = ours.site("default").structure
            layer.lora_A["default"].weight.copy_(site.A)
            layer.lora_B["default"].weight.copy_(site.B)
    once = torch.allclose(model(X), stock(X), atol=1e-6)
    attention.out_proj.set_scale("default", 1.0 if once else 2.0)
    assert torch.allclose(model(X), stock(X), atol=1e-6)
    assert not torch.allclose(model(X), base(X), atol=1e-3)
    for each in (model, stock):
        each(X).square().sum().backward()
    for layer, (_, ours) in zip((theirs, theirs.base_layer.out_proj), attention.layers(), strict=True):
        site = ours.site("default").structure
        times = 2.0 if ours is attention.out_proj and not once else 1.0
        assert torch.allclose(site.A.grad, times * layer.lora_A["default"].weight.grad, atol=1e-5)
        assert torch.allclose(site.B.grad, times * layer.lora_B["default"].weight.grad, atol=1e-5)
        assert site.A.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (weftlora.PlainLoraConfig, {}),
        (weftlora.TiedLoraConfig, {}),
        (weftlora.LoraDashConfig, {"directions": 2, "after": 1}),
    ],
)
def test_it_starts_as_the_base_trains_saves_merges_and_goes_away(make, fields, tmp_path) -> None:
    base, model = adapted(make, **fields)
    assert torch.allclose(model(X), base(X), atol=1e-6)
    randomise(model)
    if fields:  # launched by a step
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(X).square().sum().backward()
        optimizer.step()
        randomise(model)
    model.eval()
    expected = model(X)
    assert not torch.allclose(expected, base(X), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.allclose(again(X), expected, atol=1e-6)  # where nothing is trained, torch has a fast path of its own
    with model.disable_adapter():
        assert torch.allclose(model(X), base.eval()(X), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(model(X), expected, atol=1e-6)
    model.merge_adapter()
    assert torch.allclose(model(X), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    plain = copy.deepcopy(model).merge_and_unload()
    assert type(plain.attn) is nn.MultiheadAttention
    assert torch.allclose(plain(X), expected, atol=1e-5)
    assert torch.allclose(model.unload()(X), base(X), atol=1e-6)


def test_a_second_adapter_stands_beside_the_first_and_goes_again() -> None:
    base, model = adapted(init_lora_weights=False)
    first = model(X)
    model.add_adapter(
        "other", weftlora.PlainLoraConfig(r=2, target_modules=["attn", "out_proj"], init_lora_weights=False)
    )
    assert {n for n, m in model.named_modules() if n.endswith("weft_site.other")} == {
        f"base_model.model.{name}.weft_site.other" for name in ("out_proj", *(f"attn.{part}" for part in PARTS))
    }
    model.set_adapter("other")
    assert not torch.allclose(model(X), first, atol=1e-4)
    model.set_adapter("default")
    assert torch.equal(model(X), first)
    with pytest.raises(weftlora.AdapterError, match="attn reads its weights for all rows at once"):
        model.eval()(X, adapter_names=["default", "other"])
    model.delete_adapter("default")
    assert torch.allclose(model.unload()(X), base.eval()(X), atol=1e-6)


def test_what_is_said_of_the_whole_goes_for_both_matrices_and_is_read_from_the_folder(tmp_path) -> None:
    _, model = adapted(rank_pattern={"attn": 3}, alpha_pattern={"attn.out_proj": 1})
    scales = {part: layer.site("default").scale for part, layer in model.base_model.model.attn.layers()}
    assert scales == {"in_proj": 4 / 3, "out_proj": 1 / 3}
    randomise(model)
    model.save_pretrained(tmp_path)
    ranks = {site.site: (site.rank, site.shape) for site in weftlora.inspect(tmp_path).sites}
    assert ranks == {"attn.in_proj": (3, (3 * E, E)), "attn.out_proj": (3, (E, E)), "out_proj": (2, (E, E))}
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"] == [
        "attn",
        "out_proj",
    ]


@pytest.mark.parametrize(
    ("config", "base", "says"),
    [
        (
            weftlora.HydraLoraConfig(heads=2, target_modules=["attn"]),
            {},
            "an adapter on it has to be a ΔW, and HydraLoRA is none",
        ),
        (weftlora.AllocLoraConfig(target_modules=["attn"]), {}, "its rank slots cannot be scored one by one"),
        (
            weftlora.PlainLoraConfig(target_modules=["attn"]),
            {"kdim": 4},
            "keys or values have another size than its queries",
        ),
        (weftlora.PlainLoraConfig(target_modules=["attn.out_proj"]), {}, "or name attn, which is adapted as a whole"),
    ],
    ids=["routed", "moving ranks", "three weights", "a part"],
)
def test_what_is_no_update_of_its_weights_is_refused_before_anything_changes(config, base, says: str) -> None:
    model = Looks(**base)
    with pytest.raises(weftlora.TargetError, match=says):
        get_peft_model(model, config)
    assert type(model.attn) is nn.MultiheadAttention


def test_dropout_is_said_to_drop_nothing_and_a_fast_path_is_not_adapted() -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 drops nothing in attn"):
        adapted(lora_dropout=0.1)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(E, 2, batch_first=True))
    with pytest.raises(
        weftlora.TargetError, match=r"0\.self_attn belongs to a torch TransformerEncoderLayer, whose fast path"
    ):
        get_peft_model(encoder, weftlora.PlainLoraConfig(target_modules=["self_attn"]))


def test_a_view_that_stands_before_a_parameter_is_changed_for_the_forward_too() -> None:
    """As FSDP1 has them for the length of a forward."""
    _, model = adapted(init_lora_weights=False)
    expected, attention = model(X), model.base_model.model.attn.base_layer
    views = {
        "in_proj_weight": attention.in_proj_weight.detach().clone(),
        "out_proj": attention.out_proj.weight.detach().clone(),
    }
    vars(attention)["in_proj_weight"], vars(attention.out_proj)["weight"] = views.values()
    assert torch.allclose(model(X), expected, atol=1e-6)
    assert vars(attention)["in_proj_weight"] is views["in_proj_weight"]
    assert vars(attention.out_proj)["weight"] is views["out_proj"]
