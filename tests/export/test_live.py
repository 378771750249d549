"""The outputs that exports are compared with: every logit, in full fp32, whatever its caller has switched on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertModel

import weftlora
from families import FAMILIES
from weftlora.errors import AdapterError
from weftlora.export import live
from weftlora.export.live import Outputs
from weftlora.export.proof import Prover

Adapted = Callable[..., PeftModel]


@pytest.mark.parametrize("where", [0, 1])
def test_a_value_that_is_no_number_is_a_difference_in_any_batch(where: int) -> None:
    one = Outputs([torch.ones(1, 2), torch.ones(1, 2)], [])
    other = Outputs([torch.ones(1, 2), torch.ones(1, 2)], [])
    other.logits[where][0, 1] = math.nan
    assert math.isnan(one.furthest(other))


def test_a_folder_that_computes_no_numbers_on_a_later_batch_is_not_kept(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stock(self: Prover, *_: Any) -> Outputs:
        return Outputs([self.exact.logits[0], torch.full_like(self.exact.logits[1], math.nan)], [])

    monkeypatch.setattr(Prover, "of_adapter", stock)
    batch = FAMILIES["llama"].batch()
    with pytest.raises(AdapterError, match="differs from the live one by nan"):
        weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "lora", inputs=[batch, batch])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("through", ["one switch for all", "the backend's own"])
def test_tf32_and_autocast_of_the_caller_do_not_reach_it(through: str, adapted: Adapted) -> None:
    model, batch = adapted(weftlora.PlainLoraConfig(r=2)), FAMILIES["llama"].batch()
    plain, matmul = live.forward_all(model, [batch]), torch.backends.cuda.matmul
    seen: list[tuple[str, bool]] = []
    model.get_base_model().lm_head.register_forward_hook(
        lambda *_: seen.append((matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
    )
    before: Any = matmul.fp32_precision
    try:
        if through == "one switch for all":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = live.forward_all(model, [batch])
            assert torch.is_autocast_enabled("cpu")
        assert matmul.fp32_precision == "tf32"
        if through == "one switch for all":
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before
    assert seen == [("ieee", False)]
    assert plain.furthest(found) == 0


def test_a_model_without_logits_cannot_be_proved_and_says_so(tmp_path: Path) -> None:
    net = get_peft_model(BertModel(FAMILIES["bert"].build().config), weftlora.PlainLoraConfig(r=2))
    with pytest.raises(AdapterError, match=r"a BertModel gives no logits.*use verify=False"):
        weftlora.export_lora(net, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
    assert weftlora.export_lora(net, tmp_path / "lora", verify=False).proof is None
