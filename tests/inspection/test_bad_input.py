"""What cannot be inspected is refused in one sentence that says what to do."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from looking import train_a_little
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import weftlora
from families import FAMILIES
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import AdapterError, ConfigError, DataError, MissingExtraError, ModelError, RunError, WeftError
from weftlora.inspection.inspecting import _check_finite
from weftlora.inspection.subject import live_subject
from weftlora.report.inspection import page


def refused(error: type[WeftError], *arguments: Any, **settings: Any) -> str:
    with pytest.raises(error) as raised:
        weftlora.inspect(*arguments, **settings)
    sentence = str(raised.value)
    assert sentence.endswith((".", "?")), sentence
    assert "\n" not in sentence
    return sentence


def test_a_folder_that_is_no_adapter(tmp_path: Path):
    assert "there is no folder" in refused(AdapterError, tmp_path / "nowhere")
    assert "no adapter_config.json" in refused(AdapterError, tmp_path)


def test_damaged_files(saved: Callable[[str], Path], tmp_path: Path):
    folder = shutil.copytree(saved("lora"), tmp_path / "adapter")
    tensors = folder / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:100])
    assert "cannot be read" in refused(AdapterError, folder, base=False)
    tensors.unlink()
    assert "adapter_model.safetensors" in refused(AdapterError, folder, base=False)
    tensors.write_bytes(whole)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "structure": {"kind": "hydra", "heads": 3}}))
    assert "do not fit its config" in refused(AdapterError, folder, base=False)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "format_version": 99}))
    assert "upgrade weftlora" in refused(AdapterError, folder, base=False)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused(AdapterError, folder, base=False)


def test_adapters_of_other_methods(tmp_path: Path):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    get_peft_model(FAMILIES["llama"].build(), config).save_pretrained(str(tmp_path))
    assert "DoRA" in refused(AdapterError, tmp_path, base=False)
    assert "no weftlora or plain LoRA adapter" in refused(AdapterError, FAMILIES["llama"].build())


def test_an_adapter_must_be_named_where_several_are_active():
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2))
    model.add_adapter("other", weftlora.PlainLoraConfig(r=3))
    model.base_model.set_adapter(["default", "other"])
    assert "default, other" in refused(AdapterError, model)
    assert "did you mean 'other'" in refused(AdapterError, model, "othr")
    assert {site.rank for site in weftlora.inspect(model, "other", spectra=0).sites} == {3}


def test_an_adapter_that_diverged_is_named(tmp_path: Path):
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2))
    site = next(m for m in model.modules() if isinstance(m, WeftLinear)).site("default")
    for value in (float("nan"), float("inf")):
        site.structure.B.data[0, 0] = value
        assert "q_proj holds values" in refused(AdapterError, model)
    model.save_pretrained(str(tmp_path))
    assert "not finite" in refused(AdapterError, tmp_path, base=False)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e300), (torch.float8_e4m3fn, 1.0)])
def test_values_are_finite_in_the_type_that_they_have(dtype: torch.dtype, value: float):
    """Beyond what fp32 holds, and in a type that has no such test of its own."""
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2))
    a = next(m for m in model.modules() if isinstance(m, WeftLinear)).site("default").structure.A
    subject = live_subject(model, None, "here")
    a.data = torch.full(a.shape, value, dtype=torch.float64).to(dtype)
    _check_finite(subject)
    a.data = torch.full(a.shape, float("nan")).to(dtype)
    with pytest.raises(AdapterError, match="not finite"):
        _check_finite(subject)


@pytest.mark.parametrize(
    "wrap", [lambda b: b, lambda b: {"low": b}, lambda b: [b["input_ids"]], lambda b: "rows.jsonl"]
)
def test_inputs_that_are_no_list_of_batches(wrap: Callable[[Any], Any]):
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.HydraLoraConfig(r=2, heads=2))
    assert "give inputs=[batch]" in refused(ConfigError, model, inputs=wrap(FAMILIES["llama"].batch()))


def test_settings_out_of_range(saved: Callable[[str], Path]):
    assert "spectra=-1" in refused(ConfigError, saved("lora"), spectra=-1)
    assert "rows=0" in refused(ConfigError, saved("lora"), rows=0)
    assert "base does not go with a model in memory" in refused(ConfigError, FAMILIES["llama"].build(), base="x")
    assert "adapter does not go with a folder" in refused(ConfigError, saved("lora"), "default")


def test_a_base_or_data_that_was_named_must_be_there(saved: Callable[[str], Path], hydra_run: Path, tmp_path: Path):
    assert "no model folder" in refused(ModelError, saved("lora"), base=tmp_path / "gone")
    assert "does not exist" in refused(DataError, hydra_run, data=tmp_path / "gone.jsonl")
    assert "needs the base" in refused(AdapterError, saved("hydralora"), base=False, data="rows.jsonl")


def test_a_run_without_its_adapter(hydra_run: Path, tmp_path: Path):
    folder = shutil.copytree(hydra_run, tmp_path / "run")
    shutil.rmtree(folder / "adapter")
    assert "--resume" in refused(AdapterError, folder)


def test_a_run_that_was_killed_points_to_its_last_checkpoint(run: Callable[..., Path], tmp_path: Path):
    folder = shutil.copytree(run("lora", "train.steps=1"), tmp_path / "run")
    for step, complete in ((2, True), (10, True), (12, False)):
        checkpoint = shutil.copytree(folder / "adapter", folder / "checkpoints" / f"checkpoint-{step}")
        if complete:
            (checkpoint / "complete.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(folder / "adapter")
    sentence = refused(AdapterError, folder)
    last = folder / "checkpoints" / "checkpoint-10"
    assert f"look at its last checkpoint, {last}." in sentence
    assert weftlora.inspect(last, base=False).sites


def test_a_base_of_other_weights_is_left_out_unless_it_was_named(hydra_run: Path, tmp_path: Path):
    folder = shutil.copytree(hydra_run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["base"]["values"] = "0" * 16
    (folder / "run.json").write_text(json.dumps(record))
    found = weftlora.inspect(folder)
    assert found.base is None
    assert any("other weights" in sentence for sentence in found.left_out)
    assert "other weights" in refused(AdapterError, folder, base="demo")


def test_an_adapter_merged_into_w_says_so():
    model = train_a_little(weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]), steps=1)
    model.merge_adapter()
    assert "unmerge" in refused(AdapterError, model)


def test_a_page_without_its_extra_names_it(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    found: Any = weftlora.inspect(saved("lora"), base=False)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match=r'needs vl-convert-python, .*: pip install "weftlora\[report\]"'):
        page.write_page(found, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_page_is_written_whole_or_not_at_all(saved: Callable[[str], Path], tmp_path: Path):
    found = weftlora.inspect(saved("lora"), base=False)
    (tmp_path / "page.html").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        page.write_page(found, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_models_adapter_stays_usable_after_a_refusal(adapted: Callable[[str], PeftModel]):
    model = adapted("lora")
    refused(AdapterError, model, "nobody")
    assert weftlora.inspect(model, spectra=0).sites


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2), (32, 5)])
@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_stock_lora_whose_factors_are_no_matrices_that_fit(tmp_path: Path, letter: str, shape: tuple[int, ...]):
    get_peft_model(FAMILIES["llama"].build(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if f"lora_{letter}" in key)
    save_file({**tensors, name: torch.ones(shape)}, file)
    assert "not factors of one update" in refused(AdapterError, tmp_path, base=False)


def test_settings_nested_too_deep(saved: Callable[[str], Path], tmp_path: Path):
    folder = shutil.copytree(saved("lora"), tmp_path / "adapter")
    (folder / "adapter_config.json").write_text('{"a":' * 3000)
    assert "no adapter_config.json that describes an adapter" in refused(AdapterError, folder, base=False)
