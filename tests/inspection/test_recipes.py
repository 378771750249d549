"""The adapter of every recipe, inspected in memory and from its folder alone: the same numbers wherever both can know them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from looking import CONFIGS, STEPS, demo_batch, train_a_little
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import weftlora
from weftlora.adapted.layer import WeftLinear
from weftlora.data.demo import demo_model_path
from weftlora.inspection.record import Inspection
from weftlora.report.inspection.page import page


def layers(model: PeftModel) -> dict[str, WeftLinear]:
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, WeftLinear)}


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_are_those_of_the_update_itself(name: str, adapted: Callable[[str], PeftModel]):
    model = adapted(name)
    found = weftlora.inspect(model, spectra=0)
    assert [site.site for site in found.sites] == list(layers(model))
    for site in found.sites:
        layer = layers(model)[site.site]
        if site.mergeable:
            delta, w = layer.site("default").delta_weight(), layer.base_matrix()
            assert site.norm == pytest.approx(float(delta.norm()), rel=1e-4, abs=1e-7)
            assert site.relative == pytest.approx(float(delta.norm() / w.norm()), rel=1e-4, abs=1e-7)
            share = torch.linalg.svdvals(delta.double()).square()
            share = share / share.sum()
            if site.norm > 0:
                assert site.effective_rank == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-3)
    assert found.steps in (None, STEPS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_alone_says_what_the_live_adapter_says(
    name: str, adapted: Callable[[str], PeftModel], saved: Callable[[str], Path]
):
    live, bare = weftlora.inspect(adapted(name), spectra=0), weftlora.inspect(saved(name), base=False)
    assert bare.base is None
    assert any("base" in sentence for sentence in bare.left_out)
    assert bare.method == live.method
    assert dataclasses.replace(bare.parameters, base=None) == dataclasses.replace(live.parameters, base=None)
    theirs = {site.site: site for site in live.sites}
    assert theirs.keys() == {site.site for site in bare.sites}
    for site in bare.sites:
        known = theirs[site.site]
        assert dataclasses.replace(site, relative=None, norm=0, effective_rank=0) == dataclasses.replace(
            known, relative=None, norm=0, effective_rank=0
        )
        assert site.norm == pytest.approx(known.norm, rel=1e-5)
        assert site.effective_rank == pytest.approx(known.effective_rank, rel=1e-5)
    assert {head.site: head.mean for head in bare.heads} == pytest.approx({head.site: head.mean for head in live.heads})
    assert {tuple(sorted(group.sites)): group.stored for group in bare.groups} == {
        tuple(sorted(group.sites)): group.stored for group in live.groups
    }
    assert {d.site: d.chosen for d in bare.directions if d.chosen} == {
        d.site: d.chosen for d in live.directions if d.chosen
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_trained_numbers_are_those_that_an_optimiser_would_hold(name: str, adapted: Callable[[str], PeftModel]):
    found, model = weftlora.inspect(adapted(name), spectra=0), adapted(name)
    held = sum(p.numel() for layer in layers(model).values() for p in layer.site("default").parameters())
    if name == "alora":  # room for slots that are not live is no trainable parameter
        live = {n: len(layer.site("default").live()) for n, layer in layers(model).items()}
        shapes = {n: layer.base_matrix().shape for n, layer in layers(model).items()}
        held = sum(live[n] * sum(shapes[n]) for n in live)
    assert found.parameters.trained == held
    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    assert found.parameters.base == sum(p.numel() for p in base.parameters())


def test_a_base_packed_into_4_bits_is_counted_in_numbers():
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(demo_model_path()), weftlora.PlainLoraConfig(r=2))
    whole = weftlora.inspect(model, spectra=0).parameters.base
    norm = model.base_model.model.model.norm.weight  # as bitsandbytes packs a weight
    norm.quant_state = SimpleNamespace(shape=torch.Size((2 * len(norm), 1)))
    assert weftlora.inspect(model, spectra=0).parameters.base == whole + len(norm)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_record_is_plain_json_with_finite_numbers(name: str, adapted: Callable[[str], PeftModel]):
    found = weftlora.inspect(adapted(name), spectra=1)

    def check(value: object) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                check(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                check(inner)
        else:
            assert value is None or isinstance(value, (str, int, bool)) or math.isfinite(value)  # type: ignore[arg-type]

    check(found.record())
    assert json.loads(json.dumps(found.record()))["parameters"]["trained"] == found.parameters.trained
    assert found.verdict
    assert all(sentence.endswith(".") for sentence in found.verdict + found.left_out)


@pytest.mark.parametrize("name", ["hydralora", "lora_tsd", "tied_lora"])
def test_looking_changes_nothing(name: str, adapted: Callable[[str], PeftModel]):
    model = adapted(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained, random_state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    weftlora.inspect(model, inputs=[demo_batch()], spectra=1) if name == "hydralora" else weftlora.inspect(
        model, spectra=1
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()


def test_looking_at_folders_draws_no_random_number(hydra_run: Path, saved: Callable[[str], Path], tmp_path: Path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(demo_model_path()), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(str(tmp_path))
    before = torch.get_rng_state()
    weftlora.inspect(hydra_run, rows=1, spectra=0)
    weftlora.inspect(saved("tied_lora"), base=False)
    weftlora.inspect(tmp_path, base=False)
    weftlora.inspect(model, spectra=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_dash_shows_its_directions_and_gains(adapted: Callable[[str], PeftModel]):
    model = adapted("lora_dash")
    found = weftlora.inspect(model, spectra=0)
    assert {site.phase for site in found.directions} == {"launched"}
    for site in found.directions:
        term = layers(model)[site.site].site("default").boost
        assert [c.index for c in site.chosen] == term.index.tolist()
        assert [c.gain for c in site.chosen] == term.gain.tolist()
    assert any("gains" in sentence for sentence in found.verdict)


def test_dash_that_has_not_launched_says_so():
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(demo_model_path()), weftlora.LoraDashConfig(r=2, directions=2)
    )
    assert any("before the launch" in sentence for sentence in weftlora.inspect(model, spectra=0).verdict)


@pytest.mark.parametrize("name", ["lora", "lora_dash"])
def test_spectra_are_those_of_weft_directions(name: str, adapted: Callable[[str], PeftModel]):
    model = adapted(name)
    found = weftlora.inspect(model, spectra=2)
    held = [site for site in found.directions if site.sigma is not None]
    assert len(held) == 2
    most = sorted(found.sites, key=lambda site: -(site.relative or 0))[:2]
    assert {site.site for site in held} == {site.site for site in most}
    theirs = {s.site: s for s in weftlora.directions(model, full=True).adapters[0].sites}
    for site in held:
        assert site.sigma == pytest.approx(theirs[site.site].spectrum.sigma)
        assert site.rate == pytest.approx(theirs[site.site].spectrum.rate)
    assert any("--spectra 28" in sentence for sentence in found.left_out)


def test_tied_groups_are_named_with_what_they_save(adapted: Callable[[str], PeftModel]):
    found = weftlora.inspect(adapted("tied_lora"), spectra=0)
    assert [(group.parts, len(group.sites)) for group in found.groups] == [("A, B", 4)] * 3
    q = next(group for group in found.groups if "q_proj" in group.sites[0])
    assert q.untied == 4 * q.stored == 4 * 2 * (128 + 128)


@pytest.mark.parametrize("group", ["module_type", "shape", "fused_qkv"])
def test_a_tied_folder_alone_finds_the_shapes_that_its_tensors_fix(group: str, tmp_path: Path):
    model = train_a_little(weftlora.TiedLoraConfig(r=2, group=group), steps=2)
    model.save_pretrained(str(tmp_path))
    bare, live = weftlora.inspect(tmp_path, base=False), weftlora.inspect(model, spectra=0)
    norms = {site.site: site.norm for site in live.sites}
    assert {site.site: site.norm for site in bare.sites} == pytest.approx({s.site: norms[s.site] for s in bare.sites})
    missing = norms.keys() - {site.site for site in bare.sites}
    assert bool(missing) == any(
        str(len(missing)) in sentence and "tied sites" in sentence for sentence in bare.left_out
    )


def test_stock_lora_is_inspected_too(tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(str(tmp_path))
    live, bare = weftlora.inspect(model, spectra=0), weftlora.inspect(tmp_path, base=False)
    layer = base.model.layers[0].self_attn.q_proj
    assert live.sites[0].norm == pytest.approx(float(layer.get_delta_weight("default").norm()), rel=1e-4)
    assert [site.norm for site in bare.sites] == pytest.approx([site.norm for site in live.sites])
    assert live.method == bare.method == "stock LoRA"
    assert live.sites[0].scale is None
    assert live.sites[0].rank == 3


def test_a_stock_record_is_plain_json_and_its_model_stays_trainable():
    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    trained = [p.requires_grad for p in model.parameters()]
    record = weftlora.inspect(model, spectra=0).record()
    assert json.loads(json.dumps(record))["settings"]["target_modules"] == ["k_proj", "q_proj"]
    assert [p.requires_grad for p in model.parameters()] == trained


@pytest.mark.parametrize(
    ("targets", "settings", "count", "first"),
    [(["q_proj", "embed_tokens"], {}, 2, "model.embed_tokens"), (["q_proj"], {"lora_bias": True}, 4, "model.layers.0")],
)
def test_tensors_of_a_stock_adapter_that_are_not_shown_are_said(
    targets: list[str], settings: dict[str, bool], count: int, first: str, tmp_path: Path
):
    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, **settings))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    for found in (weftlora.inspect(model, spectra=0), weftlora.inspect(tmp_path, base=False)):
        assert {site.module for site in found.sites} == {"self_attn.q_proj"}
        assert any(s.startswith(f"{count} tensors") and f"such as {first}" in s for s in found.left_out)
        assert found.parameters.saved_modules == 0


def test_gains_of_an_imported_lora_dash_are_shown_though_its_file_names_no_directions(tmp_path: Path):
    model = train_a_little(CONFIGS["lora_dash"]())
    for layer in layers(model).values():
        dash = layer.site("default").boost
        dash.index.fill_(-1)
        dash.sigma.zero_()
        dash.rate.zero_()
    model.save_pretrained(str(tmp_path))
    for found in (weftlora.inspect(model, spectra=1), weftlora.inspect(tmp_path, base=False)):
        assert len(found.directions) == len(found.sites)
        for site in found.directions:
            gains = layers(model)[site.site].site("default").boost.gain.tolist()
            assert [(c.index, c.sigma, c.rate, c.gain) for c in site.chosen] == [(None, None, None, g) for g in gains]
        assert any("gains" in sentence for sentence in found.verdict)
        assert page(found)


def test_what_needs_the_base_is_named_when_it_is_not_there(saved: Callable[[str], Path], tmp_path: Path):
    def said(found: Inspection) -> str:
        return " ".join(found.left_out)

    folder = shutil.copytree(saved("hydralora"), tmp_path / "moved")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/away"}))
    assert "there is no model folder '/gone/away'" in said(weftlora.inspect(folder))
    assert "left out" in said(weftlora.inspect(folder, base=False))
    with_base = weftlora.inspect(folder, base=demo_model_path(), spectra=0)
    assert with_base.sites[0].relative is not None
    assert "Router usage: it needs rows" in said(with_base)
    assert all(site.norm_kind == "uniform gate" for site in with_base.sites)


def test_patterns_of_rank_and_alpha_hold_without_the_base(tmp_path: Path):
    config = weftlora.PlainLoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"layers\.1\..*q_proj": 5},
        alpha_pattern={"v_proj": 1.0},
    )
    model = train_a_little(config, steps=1)
    model.save_pretrained(str(tmp_path))
    live, bare = weftlora.inspect(model, spectra=0), weftlora.inspect(tmp_path, base=False)
    shown = {site.site: (site.rank, site.scale) for site in bare.sites}
    assert shown == {site.site: (site.rank, site.scale) for site in live.sites}
    assert shown["model.layers.1.self_attn.q_proj"] == (5, 4 / 5)
    assert shown["model.layers.0.self_attn.v_proj"] == (2, 0.5)
