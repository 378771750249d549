"""Every adapter that can be merged leaves as stock LoRA, in every layout, and as merged weights: stock libraries alone agree.

All folders of all cells are run by one process in which weftlora cannot be imported.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import CELLS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import weftlora
from weftlora.export import proof

# one worker runs them all: the folders of all cells are made once and run by one process
pytestmark = pytest.mark.grid

LAYOUTS: dict[str, dict[str, Any]] = {"pattern": {}, "uniform": {"uniform": True}, "server": {"server_ranks": True}}
FORMS = [*LAYOUTS, "merged"]
MUTANT = "own ranks and scales"
"""The cell whose alpha_pattern is dropped; its ranks differ from site to site."""
Results = dict[tuple[str, str], tuple[Tensor, Tensor]]


def live_logits(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    whole = model.float() if next(model.parameters()).dtype == torch.bfloat16 else model
    with torch.no_grad():
        return whole.get_base_model()(**batch).logits


def job(model: Any, base: Path | str, adapter: Path | None, place: Path, head: dict[str, Any]) -> dict[str, Any]:
    cls = type(model)
    return {
        "base": str(base),
        "model_class": cls.__name__,
        "load": {"attn_implementation": "sdpa" if cls.__name__ != "T5ForConditionalGeneration" else "eager", **head},
        "dtype": str(model.dtype).removeprefix("torch.") if adapter else "float32",
        "pad_token_id": 0,
        "adapter": None if adapter is None else str(adapter),
        "sites": None,
        "inputs": str(place / "inputs.safetensors"),
        "outputs": f"{adapter or base}.outputs",
        "device": "cpu",
        "threads": 1,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, dict[tuple[str, str], Any]]:
    """(cell, form) → logits of the live adapter and of the folder; and the records of the exports."""
    top = tmp_path_factory.mktemp("cells")
    truth, jobs, records = {}, {}, {}
    for number, (name, cell) in enumerate(CELLS.items()):
        place = top / str(number)
        place.mkdir()
        model, batch = cell.trained(top)
        base = model.get_base_model()
        head = {"num_labels": base.config.num_labels} if "Sequence" in type(base).__name__ else {}
        save_file({f"0.{key}": value.clone() for key, value in batch.items()}, place / "inputs.safetensors")
        for form in FORMS:
            out = place / form
            if form == "merged":
                options = {"dtype": "float32"} if name == "sixteen bits" else {}
                records[name, form] = weftlora.merge(model, out, verify=False, **options)
                jobs[name, form] = job(base, out, None, place, head)
            else:
                records[name, form] = weftlora.export_lora(model, out, verify=False, **LAYOUTS[form])
                jobs[name, form] = job(base, base.name_or_path, out, place, head)
        if name == MUTANT:
            config = json.loads((place / "pattern" / "adapter_config.json").read_text())
            shutil.copytree(place / "pattern", place / "mutant")
            (place / "mutant" / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {}}))
            jobs[name, "mutant"] = job(base, base.name_or_path, place / "mutant", place, head)
        truth[name] = live_logits(model, batch)
    said = proof.run_jobs(list(jobs.values()), top)
    assert dict(zip(jobs, said, strict=True)) == dict.fromkeys(jobs)
    results = {key: (truth[key[0]], load_file(each["outputs"])["0.logits"]) for key, each in jobs.items()}
    return results, records


def error(pair: tuple[Tensor, Tensor]) -> float:
    live, stock = pair
    return float((live - stock).abs().max() / live.abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CELLS)
def test_stock_libraries_alone_compute_what_the_live_adapter_does(name: str, form: str, exported: Any) -> None:
    assert error(exported[0][name, form]) < 1e-5


def test_without_alpha_pattern_the_proof_fails(exported: Any) -> None:
    assert error(exported[0][MUTANT, "mutant"]) > 1e-2
    assert error(exported[0][MUTANT, "pattern"]) < 1e-5


def test_the_ranks_are_the_closed_forms(exported: Any) -> None:
    def ranks(name: str, form: str = "pattern") -> set[int]:
        return set(exported[1][name, form].ranks.values())

    assert ranks("plain-kaiming-none-uniform-all") == {3}
    assert ranks("plain-kaiming-dash-uniform-all") == {3 + 2}
    assert ranks("plain-directions-none-uniform-all") == {2 * 3}
    assert ranks("plain-directions-dash-uniform-all") == {
        2 * 3
    }  # the launched directions are those of the frozen twins
    assert ranks("before the launch") == ranks("before the switch") == ranks("untrained") == {3}
    assert ranks("without twins") == {3}
    assert ranks("own ranks and scales") == {1, 3, 5}
    assert ranks("own ranks and scales", "uniform") == {5}
    assert ranks("own ranks and scales", "server") == {8}
    assert len(ranks("plain-kaiming-none-reallocate-all")) > 1
    assert ranks("two adapters") == {2, 3 + 2, 3 + 2 + 2}


def test_a_site_without_a_slot_is_no_target(exported: Any) -> None:
    for form in LAYOUTS:
        record = exported[1]["rank-0 sites", form]
        assert record.left_out == ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
        assert not set(record.left_out) & record.ranks.keys()
        config = json.loads((record.folder / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(record.ranks)


def test_the_files_are_stock(exported: Any) -> None:
    for (name, form), record in exported[1].items():
        if form == "merged":
            continue
        config = json.loads((record.folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert not config["use_rslora"]
        assert config["base_model_name_or_path"] is None  # a folder of this machine
        assert config["lora_alpha"] == config["r"] == max(record.ranks.values())
        assert config["rank_pattern"] == config["alpha_pattern"]
        assert bool(config["rank_pattern"]) == (form == "pattern" and len(set(record.ranks.values())) > 1)
        assert sorted(p.name for p in record.folder.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert str(record.folder.parent) not in (record.folder / "README.md").read_text()
        assert ("classifier" in record.whole_modules) == name.startswith("bert")
