"""Merging into weights: one rounding of an fp32 sum, and the truth about what it loses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import weftlora
from families import FAMILIES, logits, randomise
from weftlora.data.demo import demo_model_path
from weftlora.errors import ConfigError, MergeError, ModelError
from weftlora.export import merged
from weftlora.export.merged import NF4, kept_by, round_nf4, site_loss

Adapted = Callable[..., PeftModel]
Jobs = list[Mapping[str, Any]]
NAME = "model.layers.1.self_attn.q_proj"


def update(model: PeftModel) -> Tensor:
    """(α/r) B A of the site NAME, in fp64 and rounded once."""
    site = model.get_base_model().get_submodule(NAME).site("default")
    return (2 * site.structure.B.detach().double() @ site.structure.A.detach().double()).float()


def test_an_update_below_half_a_step_is_lost_whole_and_one_of_whole_steps_not_at_all() -> None:
    w = torch.full((4, 4), 1.0)  # the next bfloat16 is 1 + 2⁻⁷
    assert site_loss("s", w, torch.full((4, 4), 2.0**-9), torch.bfloat16).lost == 1.0
    assert site_loss("s", w, torch.full((4, 4), 2.0**-7), torch.bfloat16).lost == 0.0
    assert site_loss("s", w, torch.full((4, 4), 1.5 * 2.0**-7), torch.bfloat16).lost == pytest.approx(1 / 3)
    assert site_loss("s", w, torch.full((4, 4), 2.0**-9), torch.float32).lost == 0.0
    assert site_loss("s", w, torch.zeros(4, 4), torch.bfloat16).lost == 0.0


def test_what_rounding_does_to_the_base_itself_is_not_the_updates_loss() -> None:
    torch.manual_seed(0)
    w, delta = torch.randn(64, 64), torch.zeros(64, 64)
    assert torch.equal(kept_by(torch.bfloat16, w, delta), delta.double())


def test_nf4_takes_the_nearest_of_sixteen_values_per_block() -> None:
    torch.manual_seed(0)
    w = torch.cat([torch.randn(64), 100 * torch.randn(64), torch.zeros(16)]).view(9, 16)
    rounded = round_nf4(w).flatten()
    for block in (slice(0, 64), slice(64, 128)):
        scaled, largest = w.flatten()[block], w.flatten()[block].abs().max()
        table = torch.tensor(NF4) * largest
        nearest = table[(scaled[:, None] - table).abs().argmin(1)]
        assert torch.allclose(rounded[block], nearest)
    assert not rounded[128:].any()
    assert len(NF4) == 16
    assert NF4[7] == 0.0
    assert list(NF4) == sorted(NF4)


def test_the_folder_holds_the_fp32_sum_rounded_once(adapted: Adapted, in_process: Jobs, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2))
    layer: Any = model.get_base_model().get_submodule(NAME)
    wanted = layer.base_layer.weight.detach() + update(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = tmp_path / str(dtype)
        found = weftlora.merge(model, out, dtype)
        stored = load_file(out / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {dtype}
        assert torch.equal(stored[f"{NAME}.weight"], wanted.to(dtype))
        assert found.dtype == str(dtype).removeprefix("torch.")
        assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype
    exact, half = (weftlora.merge(model, tmp_path / d, d) for d in ("float32", "bfloat16"))
    assert exact.proof
    assert exact.proof.error < 1e-5
    assert exact.lost < 1e-6
    assert half.proof
    assert half.proof.tolerance is None
    assert 1e-3 < half.lost < 0.1
    whole = math.sqrt(sum(s.norm**2 for s in half.sites))
    assert half.lost == pytest.approx(math.sqrt(sum((s.lost * s.norm) ** 2 for s in half.sites)) / whole)
    assert half.lost_nf4 > half.lost
    card = (tmp_path / "bfloat16" / "README.md").read_text()
    assert f"{half.lost:.3%}" in card
    assert str(tmp_path) not in card


def test_the_dtype_is_that_of_the_weights_unless_another_is_named(adapted: Adapted, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2), dtype=torch.bfloat16)
    assert weftlora.merge(model, tmp_path / "a", verify=False).dtype == "bfloat16"
    assert weftlora.merge(model, tmp_path / "b", "float32", verify=False).lost < 1e-6
    with pytest.raises(ConfigError, match="not a dtype"):
        weftlora.merge(model, tmp_path / "c", "int4")


def test_settings_of_the_base_that_the_newest_rules_do_not_allow_come_along(
    adapted: Adapted, in_process: Jobs, tmp_path: Path
) -> None:
    """transformers loads such a generation_config and refuses to save it: no reason to fail after a training."""
    model = adapted(weftlora.PlainLoraConfig(r=2))
    settings = model.get_base_model().generation_config
    settings.temperature, settings.top_p, settings.do_sample = 0.6, 0.9, False
    with pytest.raises(ValueError, match="invalid"):
        settings.save_pretrained(tmp_path / "refused")
    merged_to = weftlora.merge(model, tmp_path / "merged").folder
    kept = json.loads((Path(merged_to) / "generation_config.json").read_text())
    assert (kept["temperature"], kept["top_p"]) == (0.6, 0.9)
    assert model.get_base_model().generation_config is settings
    again = AutoModelForCausalLM.from_pretrained(merged_to)
    assert again.generation_config.temperature == 0.6


def test_too_large_a_loss_is_refused_unless_it_is_accepted(adapted: Adapted, in_process: Jobs, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2), size=0.0005, dtype=torch.bfloat16)
    for verify, of in ((True, "change of the logits"), (False, "‖ΔW‖")):
        with pytest.raises(MergeError, match=rf"loses .*% of .*{of} \(limit: 10%.*--accept-loss"):
            weftlora.merge(model, tmp_path / "merged", verify=verify)
        assert list(tmp_path.iterdir()) == []
    found = weftlora.merge(model, tmp_path / "merged", accept_loss=True)
    assert found.accepted
    assert found.lost_logits
    assert found.lost_logits > merged.LIMIT
    assert "accepted" in (tmp_path / "merged" / "README.md").read_text()
    assert not weftlora.merge(model, tmp_path / "exact", "float32", accept_loss=True).accepted


def test_an_untrained_adapter_has_nothing_to_lose(llama_folder: Path, in_process: Jobs, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    found = weftlora.merge(get_peft_model(base, weftlora.PlainLoraConfig(r=2)), tmp_path / "merged", "bfloat16")
    assert (found.lost, found.lost_logits) == (0.0, 0.0)


def test_a_trained_head_and_a_tokenizer_come_along(in_process: Jobs, tmp_path: Path) -> None:
    model = get_peft_model(FAMILIES["bert"].build(), weftlora.PlainLoraConfig(r=2, modules_to_save=["classifier"]))
    randomise(model)
    weftlora.merge(model.eval(), tmp_path / "bert")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    assert torch.allclose(logits(loaded, FAMILIES["bert"].batch()), logits(model, FAMILIES["bert"].batch()), atol=1e-5)

    demo = get_peft_model(
        AutoModelForCausalLM.from_pretrained(demo_model_path()),
        weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]),
    )
    weftlora.merge(demo, tmp_path / "demo", verify=False)
    own, stored = (AutoTokenizer.from_pretrained(p) for p in (demo_model_path(), tmp_path / "demo"))
    assert own("mill turn kqzv ->") == stored("mill turn kqzv ->")


class FewBits(nn.Module):
    """A linear module that keeps its weight in four bits, as bitsandbytes' does: no floating-point weight to add to."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("kept", round_nf4(linear.weight.data))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept.T


def test_a_quantised_base_is_merged_into_its_original_or_not_at_all(
    llama_folder: Path, in_process: Jobs, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    for block in base.model.layers:
        block.self_attn.q_proj = FewBits(block.self_attn.q_proj)
        block.mlp.up_proj = FewBits(block.mlp.up_proj)  # no adapter on it
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    with pytest.raises(
        MergeError, match=r"FewBits, a base kept in fewer bits that.*original=.*or export the adapter as LoRA"
    ):
        weftlora.merge(model, tmp_path / "merged")
    with pytest.raises(ModelError, match="no model weights"):
        weftlora.merge(model, tmp_path / "merged", original=tmp_path)
    found = weftlora.merge(model, tmp_path / "merged", "float32", original=llama_folder, accept_loss=True)
    original = load_file(llama_folder / "model.safetensors")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(stored[f"{NAME}.weight"], original[f"{NAME}.weight"] + update(model))
    assert stored.keys() == original.keys()
    other = NAME.replace("self_attn.q_proj", "mlp.up_proj")
    assert torch.equal(stored[f"{other}.weight"], original[f"{other}.weight"])
    assert found.lost_logits
    assert found.lost_logits > 1e-3
    assert "unquantised checkpoint" in (tmp_path / "merged" / "README.md").read_text()


def test_what_has_no_merged_form(adapted: Adapted, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="depends on the token"):
        weftlora.merge(adapted(weftlora.HydraLoraConfig(r=2)), tmp_path / "merged")
    net = get_peft_model(FAMILIES["plain"].build(), weftlora.PlainLoraConfig(r=2, exclude_modules=["head"]))
    with pytest.raises(MergeError, match="merge_and_unload"):
        weftlora.merge(net, tmp_path / "merged")
    tied = FAMILIES["llama"].build(tie_word_embeddings=True)
    tied_model = get_peft_model(tied, weftlora.PlainLoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(MergeError, match="lm_head shares its weight"):
        weftlora.merge(tied_model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm())


def test_what_a_merge_loses_is_what_its_folder_computes(adapted: Adapted, in_process: Jobs, tmp_path: Path) -> None:
    model, given = adapted(weftlora.PlainLoraConfig(r=2)), FAMILIES["llama"].batch()
    found = weftlora.merge(model, tmp_path / "merged", "bfloat16", inputs=[given])
    live = logits(model, given)
    with model.disable_adapter():
        base = logits(model, given)
    folder = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval(), given)
    assert found.lost_logits == pytest.approx(far(folder, live) / far(live, base), rel=1e-3)
    assert found.proof
    assert found.proof.error == pytest.approx(float((folder - live).abs().max() / live.abs().max()), rel=1e-3)
    layer: Any = model.get_base_model().get_submodule(NAME)
    w, delta = layer.base_layer.weight.detach(), update(model)
    left = load_file(tmp_path / "merged" / "model.safetensors")[f"{NAME}.weight"].double() - w.bfloat16().double()
    site = next(s for s in found.sites if s.site == NAME)
    assert site.lost == pytest.approx(far(left, delta) / float(delta.norm()), rel=1e-5)
    assert site.norm == pytest.approx(float(delta.norm()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_logits_lost_to_four_bits_are_those_of_weights_in_four_bits(
    family: str, in_process: Jobs, tmp_path: Path
) -> None:
    head = ["lm_head"] if family == "llama" else None  # trained in full, so not in four bits
    config = weftlora.PlainLoraConfig(r=2, target_modules="all-linear", modules_to_save=head)
    model = get_peft_model(FAMILIES[family].build(), config)
    randomise(model)
    given = FAMILIES[family].batch()
    found = weftlora.merge(model.eval(), tmp_path / "merged", "float32", inputs=[given])
    live, merged = logits(model, given), type(model.get_base_model()).from_pretrained(tmp_path / "merged").eval()
    base = FAMILIES[family].build().eval()
    wanted, plain = logits(merged, given), logits(base, given)
    assert torch.allclose(wanted, live, atol=1e-4)
    for net in (merged, base):
        for site in found.sites:
            weight = net.get_submodule(site.site).weight
            whole = weight.T if family == "gpt2" else weight  # blocks run along the rows of [out, in]
            rounded = round_nf4(whole.detach())
            weight.data.copy_(rounded.T if family == "gpt2" else rounded)
    off = (logits(merged, given) - logits(base, given)) - (live - plain)
    assert found.lost_logits_nf4 == pytest.approx(float(off.norm() / (live - plain).norm()), rel=1e-3)
    assert found.lost_logits_nf4 > 0.01
    assert (
        f"{found.lost_logits_nf4:.1%} of the change of the logits would be lost"
        in (tmp_path / "merged" / "README.md").read_text()
    )
    assert weftlora.merge(model, tmp_path / "unproved", "float32", verify=False).lost_logits_nf4 is None


def test_a_head_that_another_adapter_trained_stays_out(
    adapted: Adapted, llama_folder: Path, in_process: Jobs, tmp_path: Path
) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2, modules_to_save=["lm_head"]))
    model.add_adapter("second", weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    randomise(model, seed=3)
    model.set_adapter("default")
    weftlora.merge(model, tmp_path / "second", adapter="second", verify=False)
    weftlora.merge(model, tmp_path / "default", verify=False)
    heads = [load_file(tmp_path / n / "model.safetensors")["lm_head.weight"] for n in ("second", "default")]
    own = load_file(llama_folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(heads[0], own)
    assert not torch.equal(heads[1], own)
    assert weftlora.export_lora(model, tmp_path / "lora", adapter="second").whole_modules == []
    assert weftlora.merge(model, tmp_path / "proved", adapter="second").proof.error < 1e-5
    assert model.get_base_model().lm_head.active_adapter == "default"
