"""Where an export may go: never over what no export wrote, and nothing is left of one that fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import weftlora
from weftlora.disk.files import TEMPORARY_FOR
from weftlora.disk.lock import beside, holding
from weftlora.disk.ownership import temporary
from weftlora.errors import AdapterError, RunError
from weftlora.export import folder as files
from weftlora.export import proof

Adapted = Callable[..., PeftModel]
Jobs = list[Mapping[str, Any]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_looks_like_an_export_and_is_none_is_not_replaced(
    adapted: Adapted, llama_folder: Path, tmp_path: Path
) -> None:
    """A trained adapter has an adapter_config.json too, a base model a config.json."""
    model = adapted(weftlora.PlainLoraConfig(r=2))
    model.save_pretrained(tmp_path / "trained")
    shutil.copytree(llama_folder, tmp_path / "base")
    for name in ("trained", "base"):
        before = contents(tmp_path / name)
        for leave in (weftlora.export_lora, weftlora.merge):
            with pytest.raises(RunError, match=r"is not an export of weftlora, so it is not replaced"):
                leave(model, tmp_path / name, overwrite=True, verify=False)
        assert contents(tmp_path / name) == before


def test_an_export_of_either_kind_is_replaced_where_that_is_asked_for(adapted: Adapted, tmp_path: Path) -> None:
    model, out = adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "out"
    for leave, file in ((weftlora.export_lora, "adapter_config.json"), (weftlora.merge, "config.json")) * 2:
        leave(model, out, overwrite=out.exists(), verify=False)
        assert (out / file).is_file()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_base_is_not_replaced_even_if_an_export_wrote_it(adapted: Adapted, tmp_path: Path) -> None:
    base = tmp_path / "merged"
    weftlora.merge(adapted(weftlora.PlainLoraConfig(r=2)), base, verify=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), weftlora.PlainLoraConfig(r=2))
    for out in (base, tmp_path):
        with pytest.raises(RunError, match="it holds the base model"):
            weftlora.merge(model, out, overwrite=True, verify=False)


def test_a_link_means_the_folder_that_it_leads_to(adapted: Adapted, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for _ in range(2):
        weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), link, overwrite=True, verify=False)
    assert link.is_symlink()
    assert (real / "adapter_config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_the_current_folder_is_not_renamed_away(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (".", tmp_path, "new/.."):
        with pytest.raises(RunError, match="it holds the current folder"):
            weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), out, verify=False)


def test_a_failed_export_takes_the_folders_that_it_made_along(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "run_jobs", lambda jobs, scratch: ["no" for _ in jobs])
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new" / "deep" / "lora", tmp_path / "there" / "lora"):
        with pytest.raises(AdapterError):
            weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), out)
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_a_full_disk_is_one_sentence(adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(RunError, match=r"cannot write .*no space left on device.*free space"):
        weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "lora", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_folder_do_not_mix(adapted: Adapted, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2))
    with (
        holding(tmp_path, "weftlora export", beside(tmp_path / "lora")),
        pytest.raises(RunError, match=r"is in use by process \d+ on .*weftlora export"),
    ):
        weftlora.export_lora(model, tmp_path / "lora", verify=False)
    weftlora.export_lora(model, tmp_path / "lora", verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_an_export_that_a_kill_left_moved_aside_comes_back_if_the_next_one_fails(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "lora"
    weftlora.export_lora(model, out, verify=False)
    before = contents(out)
    aside = temporary(out)  # killed between the two renames of a replacement
    aside.mkdir()
    (aside / TEMPORARY_FOR).write_text("lora")
    out.rename(aside / "old")
    monkeypatch.setattr(proof, "run_jobs", lambda jobs, scratch: ["no" for _ in jobs])
    with pytest.raises(RunError, match="is not empty"):
        weftlora.export_lora(model, out)
    with pytest.raises(AdapterError):
        weftlora.export_lora(model, out, overwrite=True)
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_what_the_proof_needed_does_not_stay(adapted: Adapted, in_process: Jobs, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2))
    weftlora.export_lora(model, tmp_path / "lora", base="memory", dtype="bfloat16")
    assert contents(tmp_path / "lora").keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
