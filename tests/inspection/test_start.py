"""What A and B are held beside: a start that is known exactly, another adapter, or the size of a fresh draw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from looking import train_a_little
from peft import PeftModel, get_peft_model

import weftlora
from families import FAMILIES
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import AdapterError


def layers(model: PeftModel) -> dict[str, WeftLinear]:
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, WeftLinear)}


def test_the_start_is_drawn_again_to_the_bit(run: Callable[..., Path]):
    """In the first step B = 0, so A has no gradient: after one step it must be where it started."""
    found = weftlora.inspect(run("lora", "train.steps=1"), spectra=0)
    assert found.factor_comparison.kind == "start drawn again"
    assert len(found.factor_comparison.sites) == len(found.sites)
    for site in found.factor_comparison.sites:
        assert site.A.relative_change == 0.0
        assert site.A.overlap == pytest.approx(1.0)
        assert max(site.A.angles) < 1e-4
        assert site.B is None


def test_a_trained_run_has_moved_a_little_from_its_start(hydra_run: Path):
    found = weftlora.inspect(hydra_run, rows=1, spectra=0)
    assert found.factor_comparison.kind == "start drawn again"
    assert all(0 < site.A.relative_change < 0.5 and site.A.overlap > 0.9 for site in found.factor_comparison.sites)


def test_a_search_that_restarts_is_drawn_again_from_its_seed(flexora_run: Path):
    found = weftlora.inspect(flexora_run, spectra=0)
    assert found.factor_comparison.kind == "start drawn again"
    assert all(site.A.overlap > 0.9 for site in found.factor_comparison.sites)


def test_slots_made_later_are_not_compared_with_a_start_they_do_not_have(alora_run: Path):
    found = weftlora.inspect(alora_run, spectra=0)
    assert found.factor_comparison.kind == "start drawn again"
    assert all(site.A.relative_change < 0.5 for site in found.factor_comparison.sites if site.A is not None)


def test_a_draw_that_is_not_the_start_is_not_shown_as_one(hydra_run: Path, tmp_path: Path):
    folder = shutil.copytree(hydra_run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "seed": 12345}))
    found = weftlora.inspect(folder, rows=1, spectra=0)
    assert found.factor_comparison.kind == "fresh draw"
    assert any("nothing in common" in sentence for sentence in found.left_out)


def test_another_torch_draws_other_numbers(hydra_run: Path, tmp_path: Path):
    folder = shutil.copytree(hydra_run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["versions"]["torch"] = "0.1"
    (folder / "run.json").write_text(json.dumps(record))
    assert weftlora.inspect(folder, rows=1, spectra=0).factor_comparison.kind == "fresh draw"


def test_lora_init_keeps_its_start(adapted: Callable[[str], PeftModel]):
    model = adapted("lora_init")
    found = weftlora.inspect(model, spectra=0)
    assert found.factor_comparison.kind == "stored start"
    site = found.factor_comparison.sites[0]
    own = layers(model)[site.site].site("default")
    moved = (own.structure.A - own.start.down).norm() / own.start.down.norm()
    assert site.A.relative_change == pytest.approx(float(moved), rel=1e-5)
    assert site.B.relative_change == pytest.approx(
        float((own.structure.B - own.start.up).norm() / own.start.up.norm()), rel=1e-5
    )


def test_without_a_start_the_size_is_compared_and_that_is_said(adapted: Callable[[str], PeftModel]):
    found = weftlora.inspect(adapted("lora"), spectra=0)
    assert found.factor_comparison.kind == "fresh draw"
    assert all(0.8 < site.norm_ratio < 1.3 for site in found.factor_comparison.sites)
    assert any("no file keeps the start of A" in sentence for sentence in found.left_out)


def test_adapters_of_one_seed_are_alike_in_a_and_those_of_two_are_not(tmp_path: Path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        torch.manual_seed(seed)
        train_a_little(
            weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]), steps=2 + seed, seed=seed
        ).save_pretrained(str(tmp_path / name))
    same = weftlora.inspect(tmp_path / "one", base=False, against=tmp_path / "same").factor_comparison
    other = weftlora.inspect(tmp_path / "one", base=False, against=tmp_path / "other").factor_comparison
    assert same.kind == other.kind == "adapter"
    for a, b in zip(same.sites, other.sites, strict=True):
        assert a.A.overlap == pytest.approx(1.0)
        assert a.B.cosine == pytest.approx(1.0)
        assert b.A.overlap < 0.3
        assert b.B is not None


def test_another_adapter_with_no_site_in_common_is_refused(saved: Callable[[str], Path], tmp_path: Path):
    train_a_little(weftlora.PlainLoraConfig(r=2, target_modules=["o_proj"]), steps=1).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="no module in common"):
        weftlora.inspect(saved("tied_lora"), base=False, against=tmp_path)


def test_sites_of_another_name_or_shape_are_not_compared_and_said(saved: Callable[[str], Path], tmp_path: Path):
    other = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2))
    other.save_pretrained(str(tmp_path / "smaller"))
    with pytest.raises(AdapterError, match="by name and shape"):
        weftlora.inspect(saved("lora"), base=False, against=tmp_path / "smaller")
    found = weftlora.inspect(saved("flexora"), base=False, against=saved("lora"))  # two blocks beside all four
    assert len(found.factor_comparison.sites) == len(found.sites) == 14
    assert any(sentence.startswith("14 modules of") for sentence in found.left_out)
