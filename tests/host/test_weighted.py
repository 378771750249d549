"""add_weighted_adapter: the sum of what adapters compute, exact or truncated with its error said."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import weftlora
from families import FAMILIES, STRUCTURES, logits, randomise
from weftlora.host.versions import ties_weights

BATCH = FAMILIES["llama"].batch()


def two(second: weftlora.WeftConfig | None = None) -> PeftModel:
    """A plain adapter, and one on some of its modules and others."""
    torch.manual_seed(0)
    model = get_peft_model(
        FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    randomise(model)
    model.add_adapter("second", second or weftlora.TiedLoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    randomise(model)
    return model


def deltas(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    found = {}
    for where, layer in model.named_modules():
        if hasattr(layer, "weft_site") and name in layer.weft_site:
            found[where] = layer.get_delta_weight(name)
    return found


SECONDS = {
    "tied": None,
    "dash": weftlora.LoraDashConfig(r=2, directions=2, after=1, target_modules=["q_proj", "v_proj"]),
    "init": weftlora.LoraInitConfig(r=2, after=1, target_modules=["q_proj", "v_proj"]),
    "alora": weftlora.AllocLoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("second", SECONDS)
def test_side_by_side_is_the_weighted_sum(second: str, tmp_path) -> None:
    model = two(SECONDS[second])
    if second in ("dash", "init"):  # launched by a step, and trained on from there
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**BATCH).loss.backward()
        optimizer.step()
        randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "both", combination_type="cat")
    first, other, both = (deltas(model, name) for name in ("default", "second", "both"))
    assert both.keys() == first.keys() | other.keys()
    for name, delta in both.items():
        expected = 0.7 * first.get(name, torch.zeros(())) - 1.5 * other.get(name, torch.zeros(()))
        assert torch.allclose(delta, expected, atol=1e-5), name
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path / "both")
    assert torch.equal(logits(again, BATCH), logits(model, BATCH))


def test_an_svd_says_what_it_leaves_out() -> None:
    model = two()
    with pytest.warns(UserWarning, match=r"adapter 'small' leaves out (\d+\.\d)% of the sum") as told:
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "small", combination_type="svd", svd_rank=1)
    first, other, small = (deltas(model, name) for name in ("default", "second", "small"))
    lost = whole = 0.0
    for name, delta in small.items():
        expected = first.get(name, 0) + other.get(name, 0)
        u, s, vt = torch.linalg.svd(expected)
        assert torch.allclose(delta, s[0] * torch.outer(u[:, 0], vt[0]), atol=1e-5), name
        lost, whole = lost + float(s[1:].square().sum()), whole + float(s.square().sum())
    assert f"{(lost / whole) ** 0.5:.1%}" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "whole", svd_rank=5)


def test_one_adapter_is_scaled_exactly_whatever_the_way() -> None:
    model = two()
    model.add_weighted_adapter(["default"], [0.25], "quarter", combination_type="linear")
    for name, delta in deltas(model, "quarter").items():
        assert torch.allclose(delta, deltas(model, "default")[name] / 4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((["default", "nope"], [1, 1], "c", "cat"), weftlora.AdapterError, "there is no adapter 'nope'"),
        ((["default", "second"], [1], "c", "cat"), weftlora.ConfigError, "a weight per adapter"),
        ((["default", "second"], [1, float("nan")], "c", "cat"), weftlora.ConfigError, "nan is not a weight"),
        ((["default", "second"], [1, 1], "c", "ties"), weftlora.ConfigError, "combination_type='ties' does not add up"),
        ((["default", "second"], [1, 1], "c", "svd", 0), weftlora.ConfigError, "svd_rank=0 is not a rank"),
        ((["default", "second"], [1, 1], "a.b.", "cat"), weftlora.ConfigError, "cannot name a module"),
    ],
)
def test_a_sum_that_cannot_be_made_is_refused_before_anything_is_changed(arguments, error, says) -> None:
    model = two()
    with pytest.raises(error, match=says):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default", "second"]


def test_a_routed_adapter_has_no_sum() -> None:
    model = two(weftlora.HydraLoraConfig(r=2, heads=2, target_modules=["q_proj"]))
    with pytest.raises(weftlora.MergeError, match="'second' is HydraLoRA"):
        model.add_weighted_adapter(["default", "second"], [1, 1], "c", combination_type="cat")


@pytest.mark.skipif(not ties_weights(), reason="peft does not ask for it")
def test_a_tied_embedding_is_trained_in_full_as_one_with_the_output_layer(tmp_path) -> None:
    """What peft asks of a tuner for `ensure_weight_tying`."""
    base = FAMILIES["llama"].build(tie_word_embeddings=True)
    config = weftlora.PlainLoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    get_peft_model(base, config)
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    assert inputs.modules_to_save["default"].weight is outputs.modules_to_save["default"].weight
    with pytest.raises(weftlora.TargetError, match="would tie adapters of lm_head"):
        get_peft_model(
            FAMILIES["llama"].build(tie_word_embeddings=True),
            weftlora.PlainLoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True),
        )


def test_a_model_whose_tokens_are_trained_is_merged_and_unloaded() -> None:
    """The wrapper around an embedding gives a weight that is no parameter."""
    base = FAMILIES["llama"].build(tie_word_embeddings=True)
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=2, trainable_token_indices=[1, 3]))
    randomise(model)
    expected = logits(model, BATCH)
    assert torch.allclose(logits(model.merge_and_unload(), BATCH), expected, atol=1e-5)


@pytest.mark.parametrize("structure", ["plain", "hydra", "tied_tl6"])
def test_an_adapter_is_weighed_for_the_length_of_a_block(structure: str) -> None:
    model = get_peft_model(
        FAMILIES["llama"].build(),
        STRUCTURES[structure](r=2, boost=weftlora.Dash(directions=2), target_modules=["q_proj", "v_proj"]),
    )
    randomise(model)
    whole, layer = logits(model, BATCH), model.base_model.model.model.layers[0].self_attn.q_proj
    boost = layer.site("default").boost
    boost.down.copy_(torch.randn(boost.down.shape))
    boost.up.copy_(torch.randn(boost.up.shape))
    whole, x = logits(model, BATCH), torch.randn(3, 32)
    with weftlora.rescale_adapter_scale(model, 0):
        assert torch.allclose(logits(model, BATCH), logits(FAMILIES["llama"].build(), BATCH), atol=1e-6)
    with torch.no_grad(), weftlora.rescale_adapter_scale(model, 0.5):
        half = layer(x) - layer.get_base_layer()(x)
        with (
            pytest.raises(weftlora.ConfigError, match="multiplier='no' is not a number"),
            weftlora.rescale_adapter_scale(model, "no"),
        ):
            pass
    assert torch.equal(logits(model, BATCH), whole)
    layer.set_scale("default", 4)
    layer.unscale_layer(2)
    layer.scale_layer(0.25)
    with torch.no_grad():
        assert torch.allclose(layer(x) - layer.get_base_layer()(x), half, atol=1e-6)
        layer.unscale_layer()
        assert torch.allclose(layer(x) - layer.get_base_layer()(x), 2 * half, atol=1e-5)
    if structure != "hydra":
        model.merge_adapter()
        with (
            pytest.raises(weftlora.AdapterError, match="its scale is in W"),
            weftlora.rescale_adapter_scale(model, 0.5),
        ):
            pass
    with (
        pytest.raises(weftlora.AdapterError, match="no weftlora adapter to rescale"),
        weftlora.rescale_adapter_scale(FAMILIES["llama"].build(), 0.5),
    ):
        pass


def test_a_sum_takes_over_the_one_module_that_is_trained_in_full_and_two_are_refused() -> None:
    """As in stock peft one of the adapters may train a head; here the sum has its values, too. An attention is summed as a whole."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 2)})
    fields = {"r": 2, "target_modules": ["attn"], "init_lora_weights": False}
    model = get_peft_model(base, weftlora.PlainLoraConfig(modules_to_save=["head"], **fields))
    model.add_adapter("other", weftlora.PlainLoraConfig(**fields))
    head = model.base_model.model["head"]
    torch.nn.init.ones_(head.modules_to_save["default"].weight)
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "both", combination_type="cat")
    assert torch.equal(head.modules_to_save["both"].weight, torch.ones(2, 4))
    assert head.modules_to_save["both"] is not head.modules_to_save["default"]
    for _, layer in model.base_model.model["attn"].layers():
        delta = 0.5 * layer.get_delta_weight("default") + 2.0 * layer.get_delta_weight("other")
        assert torch.allclose(layer.get_delta_weight("both"), delta, atol=1e-6)
        assert layer.r == {"default": 2, "other": 2, "both": 4}
        seen = layer.scaling
    with pytest.raises(weftlora.MergeError, match="adapters 'default' and 'both' each train head in full"):
        model.add_weighted_adapter(["default", "both"], [1.0, 1.0], "more", combination_type="cat")
    assert set(model.peft_config) == {"default", "other", "both"}
    model.delete_adapter("both")
    assert "both" not in seen
