"""Adapters that were saved before the package was renamed load unchanged and compute what they computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import weftlora  # noqa: F401
from weftlora.data.demo import demo_model_path

FOLDER = Path(__file__).parent / "before_the_name"
LOGITS = load_file(FOLDER / "logits.safetensors")
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.mark.parametrize("recipe", sorted(LOGITS))
def test_an_adapter_of_the_commit_before_gives_its_logits(recipe: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(demo_model_path()).eval()
    with torch.no_grad():
        frozen = base(input_ids=IDS).logits[:, -1]
        adapted = PeftModel.from_pretrained(base, str(FOLDER / recipe)).eval()(input_ids=IDS).logits[:, -1]
    # the same on the machine they were made on; other processors add in another order
    torch.testing.assert_close(adapted, LOGITS[recipe], rtol=0, atol=2e-5)
    assert not torch.allclose(adapted, frozen, rtol=0, atol=1e-2)
