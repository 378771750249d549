"""A switch that never comes, one that has come and is loaded, two adapters at once; what cards and recipes say they rest on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from dashing import adam, assert_same, batch, events, init, parameters, sites, starts, steps, switched, tensors, train
from peft import PeftModel, get_peft_model
from switching import T, base_of

import weftlora
from weftlora import change_rates
from weftlora.recipes import task_directions

CASES = {"init": {}, "tsd": {"directions": 3}}
both = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


@both
def test_a_run_that_ends_before_the_switch_has_trained_plain_lora(fields: dict, tmp_path: Path) -> None:
    """And as such it is saved, loaded and merged."""
    model = init(after=10**6, **fields).double()
    plain = get_peft_model(init().unload(), weftlora.PlainLoraConfig(r=2, target_modules=["first", "second"])).double()
    for site, other in zip(sites(model).values(), sites(plain).values(), strict=True):
        other.structure.load_state_dict(site.structure.state_dict())
    for each in (model, plain):
        train(each, 5, adam(each, weight_decay=0.1))
    x = batch(50).double()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
    for site, other in zip(sites(model).values(), sites(plain).values(), strict=True):
        for one, its in zip(site.structure.parameters(), other.structure.parameters(), strict=True):
            torch.testing.assert_close(one, its, rtol=0, atol=1e-10)
    with pytest.warns(UserWarning, match="still without the switch of LoRA-Init"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(init().unload().double(), tmp_path).double()
    torch.testing.assert_close(loaded(x), plain(x), rtol=0, atol=1e-12)
    assert not switched(loaded)
    torch.testing.assert_close(loaded.merge_and_unload()(x), plain.merge_and_unload()(x), rtol=0, atol=1e-6)


@both
def test_what_is_loaded_after_the_switch_never_decomposes_a_weight_again(
    fields: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = init(after=T, **fields)
    train(model, T + 1)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(change_rates, "spectrum", lambda *_: pytest.fail("a weight was decomposed"))
    loaded = PeftModel.from_pretrained(init().unload(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(batch(50)), model(batch(50)))
    twins = [copy.deepcopy(term.state_dict()) for term in starts(loaded)]
    train(loaded, 3, start=T + 1)
    assert steps(loaded) == T + 4
    assert events(loaded) == {}
    for term, before in zip(starts(loaded), twins, strict=True):
        assert_same(term.state_dict(), before)


def test_two_adapters_that_have_switched_add_up() -> None:
    model = init(after=1)
    train(model, 3)
    model.add_adapter("other", weftlora.LoraTsdConfig(r=3, after=1, directions=2, target_modules=["first", "second"]))
    model.set_adapter("other")
    train(model, 3)
    model.base_model.set_adapter(["default", "other"])
    kept = tensors(model)
    for layer, other in zip(sites(model).values(), sites(model, "other").values(), strict=True):
        x = torch.randn(4, layer.factors().A.shape[1])
        y = torch.zeros(4, layer.factors().B.shape[0])
        assert layer(x, y).abs().max() > 1e-4
        assert other(x, y).abs().max() > 1e-4
    x = batch(50)
    hand = base_of(model, x)
    with torch.no_grad():
        base = model.base_model.model
        one, two = ([site.delta_weight() for site in sites(model, name).values()] for name in ("default", "other"))
        layers = [base.first.base_layer, base.second.base_layer]
        w = [layer.weight + d + e for layer, d, e in zip(layers, one, two, strict=True)]
        summed = torch.tanh(x @ w[0].T + layers[0].bias) @ w[1].T + layers[1].bias
    assert not torch.allclose(model(x), hand, atol=1e-3)
    torch.testing.assert_close(model(x), summed, rtol=0, atol=1e-5)
    assert_same(tensors(model), kept)


def test_more_slots_than_the_weight_has_directions() -> None:
    """r = 7, W with 6 and 5 of them: all are split, the other slots start along their own rows."""
    model, x = init(after=T, r=7), batch(50)
    with pytest.warns(UserWarning, match="2 modules such as first have fewer moved directions"):
        train(model, T)
    for site, k in zip(sites(model).values(), (6, 5), strict=True):
        assert sorted(site.start.index.tolist()) == [-1] * (7 - k) + list(range(k))
        assert torch.count_nonzero(site.structure.B[:, k:]) == 0
    torch.testing.assert_close(model(x), base_of(model, x), rtol=0, atol=5e-6)
    assert all(p.isfinite().all() for p in parameters(model))


def test_cards_and_recipes_say_that_they_are_reconstructed() -> None:
    docs = Path(__file__).parents[2] / "docs"
    said = [" ".join(str(module.__doc__).split()) for module in (task_directions, task_directions)]
    said.append(" ".join((docs / "methods" / "lora_tsd.md").read_text(encoding="utf-8").split()))
    for text in said:
        assert "reconstructed from" in text.lower()
        assert "abstract and f" in text
        assert "not verified against text or code" in text
