"""Servers and converters take an export and refuse the folder that training writes, which they would compute wrongly.

The rules, as read in vLLM (`parse_fine_tuned_lora_name` in vllm/lora/utils.py, `PEFTHelper` in vllm/lora/peft_helper.py) and in
llama.cpp (convert_lora_to_gguf.py) in November 2026. Neither looks at `peft_type`, and a weftlora config has all that they ask of a
config, so that the names of the tensors are the only thing that stops them: a tensor of ours called `lora_A.weight` would be
served without a word, without its gates, its router or its directions.

    vLLM        the last parts are lora_A.weight or lora_B.weight, or the last is lora_embedding_A or lora_embedding_B; else
                ValueError. The config must have r, lora_alpha and target_modules; modules_to_save must be empty.
    llama.cpp   .lora_A.weight, .lora_B.weight, .lora_embedding_A or .lora_embedding_B anywhere in the name, or a base_layer
                weight or a norm, which are passed over; anything else ends the conversion. The config must have lora_alpha.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import weftlora
from families import FAMILIES
from weftlora.recipes import RECIPES

VLLM = re.compile(r"(^|\.)lora_(A|B)\.weight$|(^|\.)lora_embedding_(A|B)$")
LLAMA_CPP = re.compile(r"\.lora_(A|B)\.weight|\.lora_embedding_(A|B)")
LLAMA_CPP_PASSED_OVER = re.compile(r"\.base_layer\.weight|_layernorm|\.norm")
OURS = [name for name in RECIPES if not name.startswith("peft:")]


def read(folder: Path) -> tuple[list[str], dict[str, Any]]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return sorted(load_file(folder / "adapter_model.safetensors")), config


def served_by_vllm(names: list[str], config: dict[str, Any]) -> bool:
    complete = {"r", "lora_alpha", "target_modules"} <= config.keys() and not config.get("modules_to_save")
    return complete and all(VLLM.search(name) for name in names)


def converted_by_llama_cpp(names: list[str], config: dict[str, Any]) -> bool:
    known = all(LLAMA_CPP.search(name) or LLAMA_CPP_PASSED_OVER.search(name) for name in names)
    return "lora_alpha" in config and known


@pytest.mark.parametrize("name", OURS)
def test_no_server_takes_a_training_folder(name: str, tmp_path: Path) -> None:
    get_peft_model(FAMILIES["llama"].build(), RECIPES[name](r=2)).save_pretrained(tmp_path)
    names, config = read(tmp_path)
    ours = [key for key in names if ".weft_" in key]
    assert ours == names
    assert not any(VLLM.search(key) or LLAMA_CPP.search(key) or LLAMA_CPP_PASSED_OVER.search(key) for key in ours)
    assert not served_by_vllm(names, config)
    assert not converted_by_llama_cpp(names, config)
    assert config["peft_type"] == "WEFT"


def test_an_export_and_a_stock_lora_are_taken(
    adapted: Callable[..., PeftModel], in_process: list[Any], tmp_path: Path
) -> None:
    """The rules are no rules that refuse everything."""
    weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "lora")
    get_peft_model(FAMILIES["llama"].build(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "stock"
    )
    for folder in (tmp_path / "lora", tmp_path / "stock"):
        names, config = read(folder)
        assert names
        assert served_by_vllm(names, config)
        assert converted_by_llama_cpp(names, config)
        assert config["peft_type"] == "LORA"


def test_an_adapter_that_trains_tokens_is_not_exported(tmp_path: Path) -> None:
    config = weftlora.PlainLoraConfig(r=2, trainable_token_indices=[5, 6])
    model = get_peft_model(FAMILIES["llama"].build(), config)
    for export in (weftlora.export_lora, weftlora.merge):
        with pytest.raises(weftlora.AdapterError, match="trains embeddings of single tokens beside its matrices"):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
