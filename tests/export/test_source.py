"""What is exported, by the folder it lies in: a run, one of its checkpoints, a bare adapter; and what the card then says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
import torch
from peft import PeftModel, get_peft_model

import weftlora
from families import FAMILIES, logits, randomise
from weftlora.errors import AdapterError, ConfigError
from weftlora.export.folder import hub_id
from weftlora.train import train

Jobs = list[Mapping[str, Any]]


@pytest.fixture(scope="module")
def run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, a checkpoint after each."""
    top = tmp_path_factory.mktemp("run")
    tiny.write_rows(top / "rows.jsonl", tiny.answers(24))
    recipe = {
        "model": str(llama_folder),
        "adapter": {"recipe": "lora", "r": 2},
        "data": {"train": str(top / "rows.jsonl")},
        "train": {"steps": 3, "batch_size": 4, "save_every": 1, "lr": 1e-2},
        "out": str(top / "run"),
    }
    train(recipe)
    return top / "run"


def test_where_the_runs_data_is_gone_that_is_said_without_its_folder(run: Path, in_process: Jobs, tmp_path: Path):
    rows = run.parent / "rows.jsonl"
    rows.rename(run.parent / "gone")
    try:
        with pytest.warns(UserWarning, match=r"random token ids: .*rows\.jsonl does not exist"):
            found = weftlora.export_lora(run, tmp_path / "lora")
        with pytest.warns(UserWarning, match="random token ids"):
            weftlora.merge(run, tmp_path / "merged")
    finally:
        (run.parent / "gone").rename(rows)
    assert found.proof
    assert found.proof.inputs == "random token ids (seed 0) (the run's own data could not be read)"
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert str(run.parent).encode() not in file.read_bytes()


def test_a_checkpoint_is_not_given_the_figures_of_the_whole_run(run: Path, tmp_path: Path) -> None:
    for name, source in (("run", run), ("adapter", run / "adapter"), ("step", run / "checkpoints" / "checkpoint-2")):
        weftlora.export_lora(source, tmp_path / name, verify=False)
    cards = {path.name: (path / "README.md").read_text() for path in tmp_path.iterdir()}
    assert cards["run"] == cards["adapter"]
    for line in ("| optimiser steps | 3 |", "| validation loss |"):
        assert line in cards["run"]
        assert line.rpartition(" |")[0] not in cards["step"]
    assert "| taken from | checkpoint-2 of the run |" in cards["step"]
    assert "taken from" not in cards["run"]
    assert "| recipe | lora |" in cards["step"]


def test_the_run_of_an_adapter_is_found_from_inside_its_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run / "adapter")
    weftlora.export_lora(".", tmp_path / "lora", verify=False)
    assert "| optimiser steps | 3 |" in (tmp_path / "lora" / "README.md").read_text()


def test_the_weights_in_memory_are_not_those_of_a_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the folder of its base"):
        weftlora.export_lora(run, tmp_path / "lora", base="memory")


@pytest.mark.parametrize("labels", [2, 3])
def test_a_bare_adapter_of_a_classifier_brings_as_many_labels_as_its_head_has(
    labels: int, in_process: Jobs, tmp_path: Path
) -> None:
    cls: Any = type(FAMILIES["bert"].build())
    FAMILIES["bert"].build().save_pretrained(tmp_path / "base")  # of three labels
    tiny.save_tokenizer(tmp_path / "base")
    base = cls.from_pretrained(tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True)
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"]))
    randomise(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    found = weftlora.export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert found.proof
    assert found.proof.error < 1e-5
    again = cls.from_pretrained(tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True)
    stock = PeftModel.from_pretrained(again, tmp_path / "lora").eval()
    given = {"input_ids": FAMILIES["bert"].batch()["input_ids"]}
    assert torch.allclose(logits(stock, given), logits(model, given), atol=1e-5)


@pytest.mark.parametrize(
    ("base", "public"),
    [("gpt2", True), ("org/Model-1.5_b", True), ("/models/llama", False), ("./models/llama", False), ("../llama", False),
     ("~/llama", False), ("my/models/llama", False), ("C:\\llama", False), (None, False)],
)  # fmt: skip
def test_only_what_can_be_a_hub_id_is_written_into_the_folder(base: str | None, public: bool) -> None:
    assert hub_id(base) == (base if public else None)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("more", [5, -5])
def test_a_resized_vocabulary_is_there_again_or_is_refused(
    when: str, more: int, llama_folder: Path, in_process: Jobs, tmp_path: Path
) -> None:
    """A LoRA holds no embeddings; an adapter that peft has saved holds them in full, for a base that was resized, too."""
    cls: Any = type(FAMILIES["llama"].build())
    base = cls.from_pretrained(llama_folder)
    tokens = base.config.vocab_size
    if when == "before":
        base.resize_token_embeddings(tokens + more)
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=2)).eval()
    if when == "after":
        model.resize_token_embeddings(tokens + more)
    randomise(model, size=0.1)
    model.save_pretrained(tmp_path / "saved")
    for verify in (True, False):
        with pytest.raises(
            AdapterError, match=f"vocabulary of {tokens + more} tokens and its base .* one of {tokens} "
        ):
            weftlora.export_lora(model, tmp_path / "lora", verify=verify)
    with pytest.raises(AdapterError, match=f"a vocabulary of {tokens + more} tokens, and the base has {tokens}: "):
        weftlora.export_lora(tmp_path / "saved", tmp_path / "lora")
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}

    resized = cls.from_pretrained(llama_folder)
    resized.resize_token_embeddings(tokens + more)
    resized.load_state_dict(weights_below(model))
    resized.save_pretrained(tmp_path / "base")
    tiny.save_tokenizer(tmp_path / "base")
    found = weftlora.export_lora(tmp_path / "saved", tmp_path / "lora", base=tmp_path / "base")
    assert found.proof
    assert found.proof.error < 1e-5 < found.proof.adapter_effect
    assert weftlora.export_lora(model, tmp_path / "memory", base="memory").proof
    assert weftlora.merge(model, tmp_path / "merged").proof
    assert cls.from_pretrained(tmp_path / "merged").config.vocab_size == tokens + more


def weights_below(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of the base below an adapter, by their own names."""
    state = model.get_base_model().state_dict()
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".weft_" not in key}
