"""What a recipe says of a base in fewer bits, what a base says of itself, and what is refused in which words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from weftlora.errors import AdapterError, ConfigError, MissingExtraError, ModelError
from weftlora.runs import quantisation
from weftlora.runs.base_model import Fingerprint, check_same
from weftlora.runs.recipe import ModelConfig

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({}, None),
        ({"load_in_4bit": True}, NF4),
        ({"quantization": {"load_in_4bit": True}}, NF4),
        ({"load_in_4bit": True, "quantization": {"bnb_4bit_quant_type": "fp4"}}, NF4 | {"bnb_4bit_quant_type": "fp4"}),
        ({"load_in_8bit": True}, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        (
            {"quantization": {"quant_method": "quanto", "weights": "int8"}},
            {"quant_method": "quanto", "weights": "int8"},
        ),
    ],
)
def test_a_section_means_what_transformers_is_told(given: dict[str, Any], means: dict[str, Any] | None) -> None:
    config = ModelConfig.parse({"path": "demo", **given})
    assert quantisation.asked(config.load_in_4bit, config.load_in_8bit, config.quantization, "bfloat16") == means


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "keep one of them"),
        ({"load_in_4bit": True, "quantization": {"load_in_8bit": True}}, "keep one of them"),
        ({"quantization": {"weights": "int8"}}, "does not say how: add load_in_4bit"),
        (
            {"load_in_8bit": True, "quantization": {"quant_method": "torchao"}},
            "load_in_8bit is bitsandbytes', and .* names 'torchao'",
        ),
        ({"load_in_4bits": True}, "did you mean 'load_in_4bit'"),
    ],
)
def test_what_contradicts_itself_is_refused_when_it_is_read(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ModelConfig.parse({"path": "demo", **given})


def test_an_unknown_quantiser_and_key_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'qanto' is not a quantiser of transformers: did you mean 'quanto'"):
        quantisation.loading({"quant_method": "qanto"}, "demo")
    with pytest.raises(
        ConfigError, match=r"no key 'bnb_4bit_quant_typ' for bitsandbytes: did you mean 'bnb_4bit_quant_type'"
    ):
        quantisation.loading(
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "demo"
        )


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("bitsandbytes", r'pip install "weftlora\[quant\]"'),
        ("torchao", r'"weftlora\[quant\]"'),
        ("quanto", "pip install optimum-quanto"),
    ],
)
def test_a_package_that_is_missing_is_one_sentence_with_its_line(
    monkeypatch: pytest.MonkeyPatch, method: str, line: str
) -> None:
    monkeypatch.setattr(quantisation, "_is_there", lambda module: False)
    settings = {"quant_method": method, **({"load_in_4bit": True} if method == "bitsandbytes" else {})}
    with pytest.raises(MissingExtraError, match=rf"the model 'demo' in {method} needs .*{line}"):
        quantisation.loading(settings, "demo")


def test_a_base_that_is_quantised_already_is_not_quantised_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = type("Config", (), {"quantization_config": {"quant_method": "gptq", "bits": 4}})()
    with pytest.raises(
        ModelError, match=r"'mine' is stored in fewer bits already \(gptq\).* leave model\.load_in_4bit"
    ):
        quantisation.check(NF4, stored, "mine")
    monkeypatch.setattr(quantisation, "_is_there", lambda module: False)
    with pytest.raises(
        MissingExtraError, match=r"'mine', which is stored in gptq, needs gptqmodel.*pip install gptqmodel"
    ):
        quantisation.check(None, stored, "mine")
    quantisation.check(NF4, type("Config", (), {})(), "mine")


def test_a_base_that_changed_its_form_since_training_is_refused() -> None:
    plain = Fingerprint("llama hidden_size=8", "a", "b")
    four = dataclasses.replace(plain, form="nf4 (bitsandbytes)")
    with pytest.raises(
        AdapterError, match=r"trained on a base in nf4 \(bitsandbytes\), and there is one that was not quantised"
    ):
        check_same(four, plain, "mine", "there")
    with pytest.raises(AdapterError, match=r"a base that was not quantised, and there is one in nf4"):
        check_same(plain, four, "mine", "there")
    check_same(four, Fingerprint.of(dataclasses.asdict(four)), "mine", "there")
    assert Fingerprint.of({"kind": "llama", "shapes": "a", "values": "b"}).form == ""  # a run of before
