from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from weftlora.errors import AdapterError, DataError, ModelError
from weftlora.runs import base_model
from weftlora.runs.base_model import check_same, fingerprint
from weftlora.runs.recipe import ModelConfig
from weftlora.train.evaluation import complete


def found(folder: Path, **fields: str) -> base_model.Base:
    return base_model.find(ModelConfig.parse({"path": str(folder), **fields}), Path.cwd())


def test_a_folder_without_weights_is_one_sentence(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(bases["llama"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="no weights"):
        found(folder)


def test_pickled_weights_are_not_read(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(bases["llama"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(bases["llama"] / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(
        ModelError, match=r"pytorch_model\.bin, a pickle, .*save_pretrained\(NEW_FOLDER\), which writes safetensors"
    ):
        found(folder)


def test_a_folder_that_is_no_model_or_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        found(tmp_path)
    with pytest.raises(ModelError, match="no model folder"):
        found(tmp_path / "missing")
    with pytest.raises(DataError, match="WEFT_NOWHERE"):
        base_model.locate("${WEFT_NOWHERE}/model", tmp_path)


def test_an_unknown_hub_name_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        base_model.find(ModelConfig(path="weft-tests/no-such-model"), tmp_path)
    assert "weft-tests/no-such-model" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_relative_folder_counts_from_the_recipe(bases: dict[str, Path]) -> None:
    assert base_model.locate("llama", bases["llama"].parent) == str(bases["llama"])


@pytest.mark.parametrize(
    ("base", "task", "says"),
    [
        ("bert", "causal", "encoder and cannot generate"),
        ("bert", "seq2seq", "not an encoder-decoder"),
        ("llama", "seq2seq", "not an encoder-decoder"),
        ("t5", "causal", "is an encoder-decoder"),
    ],
)
def test_the_wrong_task_for_a_model(bases: dict[str, Path], base: str, task: base_model.Task, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        base_model.load(found(bases[base]), task)


def test_a_type_without_a_classification_form(bases: dict[str, Path]) -> None:
    base = found(bases["llama"])
    base.settings.model_type = "vits"
    with pytest.raises(ModelError, match="no classification form"):
        base_model.load(base, "classification", ["a", "b"])


def test_a_new_head_is_drawn_from_the_seed(bases: dict[str, Path]) -> None:
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made = base_model.load(found(bases["bert"]), "classification", ["a", "b", "c"])
        heads.append(made.classifier.weight.detach())
    assert heads[0].shape == (3, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert made.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_missing_tensors_are_not_drawn_at_random(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "partial"
    shutil.copytree(bases["llama"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        base_model.load(found(folder), "causal")


def test_a_tokenizer_without_padding_gets_its_end_token(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "padless"
    shutil.copytree(bases["llama"], folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("pad_token_id", None)
        settings.pop("pad_token", None)
        (folder / name).write_text(json.dumps(settings))
    base = found(folder)
    assert base.tokenizer.pad_token == "</s>"
    assert base_model.load(base, "classification", ["a", "b"]).config.pad_token_id == 2


def test_a_fingerprint_knows_weights_not_their_dtype(bases: dict[str, Path], tmp_path: Path) -> None:
    one = fingerprint(base_model.load(found(bases["llama"]), "causal"))
    assert fingerprint(base_model.load(found(bases["llama"], dtype="bfloat16"), "causal")) == one
    other = fingerprint(base_model.load(found(tiny.llama(tmp_path / "other", seed=1)), "causal"))
    wider = fingerprint(base_model.load(found(tiny.llama(tmp_path / "wider", hidden=48)), "causal"))
    with pytest.raises(AdapterError, match="other weights"):
        check_same(one, other, "runs/a", "other")
    with pytest.raises(AdapterError, match=r"hidden_size=32.*hidden_size=48"):
        check_same(one, wider, "runs/a", "wider")


def test_a_fingerprint_does_not_depend_on_the_head_drawn(bases: dict[str, Path]) -> None:
    marks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        marks.append(fingerprint(base_model.load(found(bases["bert"]), "classification", ["a", "b"])))
    assert marks[0] == marks[1]


SMALL: dict[str, Any] = {"vocab_size": 11, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TABLES: dict[str, tuple[type, Any, int]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_positions=8, n_embd=4, n_layer=1, n_head=1, **SMALL), 8),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            max_position_embeddings=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, ffn_dim=4,
            word_embed_proj_dim=4, **SMALL,
        ),
        8,
    ),
    "roberta": (
        RobertaForMaskedLM,
        RobertaConfig(
            max_position_embeddings=10, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4, **SMALL
        ),
        8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", TABLES)
def test_rows_fit_the_table_of_places(family: str) -> None:
    """As many tokens as it says are taken, one more is what torch falls over."""
    kind, config, most = TABLES[family]
    model = kind(config).eval()
    assert base_model.places(model) == most
    model.vision_model = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(3, 4)})  # of images
    assert base_model.places(model) == most
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))
    base_model.check_places(model, Dataset.from_dict({"input_ids": [[5] * most], "labels": [[5]]}), None)
    with pytest.raises(ModelError, match=f"rows have up to 9 tokens, .* has places for 8: set data.max_length={most}"):
        base_model.check_places(model, Dataset.from_dict({"input_ids": [[5], [5] * 9], "labels": [3, 4]}))


def test_an_answer_ends_with_the_places(bases: dict[str, Path]) -> None:
    kind, config, most = TABLES["gpt2"]
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    model = kind(config).eval()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    answers = complete(model, tokenizer, [[5] * 6, [5]], 100)
    assert [len(answer) for answer in answers] == [most - 6] * 2
    for length in (most, most + 1):
        with pytest.raises(ModelError, match=f"the prompt has {length} tokens, and the model has places for 8"):
            complete(model, tokenizer, [[5] * length], 1)
    assert base_model.places(base_model.load(found(bases["llama"]), "causal")) is None
