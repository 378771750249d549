"""The stage after a search: what is selected goes with every recipe and with what happens over time; restarting, going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dashing import sites
from peft import PeftModel, get_peft_model
from searching import mse, planted, searched, stack, two_adapters

import weftlora
from families import STRUCTURES
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import ConfigError


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_any_recipe_takes_the_selection_as_layers(structure: str):
    _, selection = searched()
    config = STRUCTURES[structure](r=2, target_modules=["up", "down"], layers=selection.layers)
    names = set(sites(get_peft_model(stack(4), config)))
    assert names == {m for c in selection.chosen for m in c.modules}
    assert len(names) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"boost": weftlora.Dash(directions=2, after=2)},
        {"start": weftlora.Directions(after=2)},
        {"boost": weftlora.Dash(directions=2, after=2), "structure": weftlora.Tied()},
    ],
    ids=["dash", "directions", "tied dash"],
)
def test_the_selection_goes_with_what_happens_over_time(fields: dict):
    """Events happen at the selected sites, the first of which is not the model's first module."""
    base = stack(4).float()
    model = get_peft_model(base, weftlora.WeftConfig(r=2, target_modules=["up", "down"], layers=[1, 3], **fields))
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2))
    x = torch.randn(16, 6)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = mse(model.train(), {"x": x, "y": x.cos()})
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(weftlora.state_dict(model)["default"]["events"]) == 1
    assert all(name.startswith(("blocks.1.", "blocks.3.")) for name in sites(model))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"boost": weftlora.Dash(directions=2, after=2)},
        {"start": weftlora.Directions(after=2)},
        {"ranks": weftlora.Reallocate(first=2, every=1, max_rounds=2, move=1, score="random")},
    ],
    ids=["dash", "directions", "reallocate"],
)
def test_a_gate_that_is_kept_from_a_search_goes_with_what_happens_over_time(fields: dict):
    """At 1 it changes nothing bit for bit; doubled, it doubles the whole update, extra slots and twins too."""
    found = []
    for gated in (False, True):
        torch.manual_seed(4)
        layers = weftlora.Only([1, 3], gated=gated)
        model = get_peft_model(
            stack(4), weftlora.WeftConfig(r=2, target_modules=["up", "down"], layers=layers, **fields)
        )
        optimizer = torch.optim.AdamW(weftlora.param_groups(model.double(), lr=1e-2))
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double()
        for _ in range(5):
            mse(model.train(), {"x": x, "y": x.cos()}).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model)
    one, other = (sites(model) for model in found)
    assert all(torch.equal(one[name].delta_weight(), other[name].delta_weight()) for name in one)
    assert weftlora.state_dict(found[1])["default"]["events"]
    for name, site in other.items():
        site.layer_gate.fill_(2.0)
        torch.testing.assert_close(site.delta_weight(), 2 * one[name].delta_weight(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "fields",
    [{"boost": weftlora.Dash()}, {"start": weftlora.Directions()}, {"ranks": weftlora.Reallocate()}],
    ids=["dash", "directions", "reallocate"],
)
def test_what_happens_over_time_waits_for_the_training_after_the_search(fields: dict):
    with pytest.raises(ConfigError, match="in the training after the search"):
        weftlora.WeftConfig(layers=weftlora.Search(), **fields)


def test_with_everything_selected_all_is_the_only_control_and_the_second_stage_is_plain_lora():
    model, selection = searched(top_k=4)
    assert list(selection.controls()) == ["all"]
    torch.manual_seed(5)
    again = weftlora.second_stage(model, selection, "restart")
    base = stack(4)
    torch.manual_seed(5)
    plain = get_peft_model(base, weftlora.WeftConfig(r=2, target_modules=["up", "down"]), autocast_adapter_dtype=False)
    a, b = sites(again), sites(plain)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].factors().A, b[n].factors().A) for n in a)
    assert all(site.layer_gate is None for site in a.values())
    for m in (again, plain):
        optimizer = torch.optim.AdamW(weftlora.param_groups(m.double(), lr=1e-2))
        mse(m.train(), {"x": torch.ones(3, 6).double(), "y": torch.zeros(3, 6).double()}).backward()
        optimizer.step()
    assert all(torch.equal(a[n].structure.B, b[n].structure.B) for n in a)
    assert max(float(site.structure.B.detach().abs().max()) for site in a.values()) > 0


def test_restart_leaves_no_adapter_on_unselected_blocks():
    model, selection = searched()
    again = weftlora.second_stage(model, selection, "restart")
    assert set(sites(again)) == {m for c in selection.chosen for m in c.modules}
    assert all(float(site.structure.B.detach().abs().max()) == 0 for site in sites(again).values())
    assert again.peft_config["default"].layers == selection.layers
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert all(any(f".{m}." in n for c in selection.chosen for m in c.modules) for n in trained)
    mse(again, {"x": torch.randn(3, 6).double(), "y": torch.zeros(3, 6).double()}).backward()


FOLDED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "hydra": {"structure": weftlora.Hydra(heads=3)},
    "tied_tl6": {"structure": weftlora.Tied(train="tl6")},
    "tied_Bu": {"structure": weftlora.Tied(train="Bu")},
    "tied_AB": {"structure": weftlora.Tied(train="tl5")},
}


@pytest.mark.parametrize("structure", list(FOLDED))
def test_continue_folds_the_gates_and_keeps_the_function_of_the_selected_blocks(structure: str, tmp_path: Path):
    model, selection = searched(FOLDED[structure])
    x = torch.randn(5, 6).double()
    alpha_hat = {c.name: c.alpha_hat for c in selection.candidates}
    assert max(abs(v - 1) for v in alpha_hat.values()) > 1e-3
    with torch.no_grad():
        for name, site in sites(model).items():
            if not any(name in c.modules for c in selection.chosen):
                site.layer_gate.zero_()
        expected = model.eval()(x)
    for c in selection.chosen:
        for name in c.modules:
            assert float(sites(model)[name].layer_gate) == c.alpha_hat
    again = weftlora.second_stage(model, selection, "continue")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), expected, rtol=1e-12, atol=1e-12)
    assert set(sites(again)) == {m for c in selection.chosen for m in c.modules}
    gated = structure == "tied_AB"
    assert {site.layer_gate is not None for site in sites(again).values()} == {gated}
    mse(again.train(), {"x": x, "y": x}).backward()
    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stack(4), tmp_path, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), again.eval()(x), rtol=1e-6, atol=1e-6)


def test_folding_merges_to_the_same_weights():
    model, selection = searched({"use_rslora": True})
    gated = {name: site.delta_weight() for name, site in sites(model).items()}
    folded = {
        name: site.delta_weight() for name, site in sites(weftlora.second_stage(model, selection, "continue")).items()
    }
    for name, delta in folded.items():
        torch.testing.assert_close(delta, gated[name], rtol=1e-12, atol=1e-12)


def test_a_restart_does_not_drop_another_adapter_unasked():
    model = two_adapters()
    selection = weftlora.search_layers(model, planted(stack(3), {1}, 40), loss=mse, lr=1e-2)
    with pytest.raises(ConfigError, match="other"):
        weftlora.second_stage(model, selection)
    assert set(model.peft_config) == {"default", "other"}
    kept = weftlora.second_stage(model, selection, "continue")
    others = [p for name, p in kept.named_parameters() if ".other." in name]
    assert others
    assert not any(p.requires_grad for p in others)
    layers = [m for m in kept.modules() if isinstance(m, WeftLinear)]
    assert all(layer.active_adapters == ["default"] for layer in layers)
