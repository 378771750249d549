"""The demo corpus, the demo tasks and the bundled model."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from weftlora.data.demo import (
    DEFAULT_TASK,
    DEMO_TASKS,
    SPLIT_ROWS,
    Row,
    apply_chain,
    demo_model_path,
    demo_rows,
    pretraining_rows,
    split_of,
)
from weftlora.errors import DataError

SPLITS = ("train", "validation", "test")
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_demo_model.py"

# sha256 of the rows, one per line as prompt|completion|domain, cut to 16 digits.
GOLDEN = {
    ("workshops", "train"): "ad78a00d5efbb696",
    ("workshops", "validation"): "55a6572e7466b432",
    ("workshops", "test"): "211bab8da4000e0e",
    ("crew", "train"): "2decbb900359b661",
    ("crew", "validation"): "1af7ca5be7bcd887",
    ("crew", "test"): "506d166258eb71e8",
}
GOLDEN_CORPUS = "7f50365e83ef1589"


def digest(rows: list[Row]) -> str:
    lines = "\n".join(f"{row['prompt']}|{row['completion']}|{row['domain']}" for row in rows)
    return sha256(lines.encode()).hexdigest()[:16]


def payload(row: Row) -> str:
    return row["prompt"].split()[2]


@pytest.mark.parametrize(("task", "split"), GOLDEN)
def test_rows_are_the_same_everywhere(task, split):
    assert digest(demo_rows(split, task)) == GOLDEN[task, split]


def test_the_corpus_is_the_same_everywhere():
    assert digest(list(itertools.islice(pretraining_rows(), 1000))) == GOLDEN_CORPUS


def test_a_seed_gives_its_own_rows():
    assert digest(demo_rows("test", seed=1)) != digest(demo_rows("test", seed=0))


@pytest.mark.parametrize("task", DEMO_TASKS)
@pytest.mark.parametrize("seeds", [(0, 0), (0, 7)])
def test_no_prompt_and_no_payload_is_in_two_splits(task, seeds):
    prompts = {split: {row["prompt"] for row in demo_rows(split, task, seeds[split == "test"])} for split in SPLITS}
    assert {split: len(found) for split, found in prompts.items()} == SPLIT_ROWS
    payloads = {split: {prompt.split()[2] for prompt in found} for split, found in prompts.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not payloads[one] & payloads[other]


def test_the_corpus_shows_no_payload_of_the_test_split():
    texts = [row for row in itertools.islice(pretraining_rows(), 2000) if row["domain"] in ("text", "west", "east")]
    assert {split_of(row["prompt"].split()[-2]) for row in texts} == {"train"}


# The rules once more, from the letters and not from `weftlora.data.demo`'s skills.
RULES = {
    "mill turn": lambda s: "".join(reversed(s)),
    "mill fold": lambda s: "".join(2 * c for c in s),
    "mill mark": lambda s: s.swapcase(),
    "mill trim": lambda s: s.removeprefix(s[0]),
    "loom turn": lambda s: (2 * s)[1 : len(s) + 1],
    "loom fold": lambda s: "".join(b + a for a, b in itertools.zip_longest(s[::2], s[1::2], fillvalue="")),
    "loom mark": lambda s: s.translate({c: c + 1 for c in range(97, 122)} | {122: 97}),
    "loom trim": lambda s: s.removesuffix(s[-1]),
    "forge turn": lambda s: (2 * s)[len(s) - 1 : -1],
    "forge fold": lambda s: "".join(c for c in "abcdefghijklmnopqrstuvwxyz" if c in s),
    "forge mark": lambda s: s.translate({c: c - 1 for c in range(98, 123)} | {97: 122}),
    "forge trim": lambda s: "".join(reversed(s[1:])),
    "dock turn": lambda s: "".join(reversed(s)).swapcase(),
    "dock fold": lambda s: "".join(c for c in "zyxwvutsrqponmlkjihgfedcba" if c in s),
    "dock mark": lambda s: RULES["loom fold"](s).swapcase(),
    "dock trim": lambda s: s[len(s) - 1],
}


@pytest.mark.parametrize("split", SPLITS)
def test_completions_follow_the_rules(split):
    rows = demo_rows(split, "workshops")
    for row in rows:
        domain, word, letters, arrow = row["prompt"].split(" ")
        assert (domain, arrow) == (row["domain"], "->")
        assert row["completion"] == " " + RULES[f"{domain} {word}"](letters)
    assert {" ".join(row["prompt"].split()[:2]) for row in rows} == set(RULES)


def test_the_same_request_has_another_answer_in_another_domain():
    task = DEMO_TASKS[DEFAULT_TASK]
    letters = [payload(row) for row in demo_rows("test")]
    for one, other in itertools.combinations(task, 2):
        for word in task[one]:
            differ = [apply_chain(task[one][word], s) != apply_chain(task[other][word], s) for s in letters]
            assert sum(differ) > 0.9 * len(differ), (one, other, word)


def test_the_corpus_has_conflicting_rules_and_right_answers():
    rows = list(itertools.islice(pretraining_rows(), 4000))
    answers: dict[str, set[str]] = {}
    for row in rows:
        words = row["prompt"].split()
        if row["domain"] == "sums" and words[1] == "plus":
            assert int(row["completion"]) == int(words[2]) + int(words[3])
        if row["domain"] == "count":
            assert int(row["completion"]) == words[3].count(words[1])
        if row["domain"] == "table":
            assert f" {words[-2]}{row['completion'].strip()} " in row["prompt"]
        if words[:2] in (["west", "edge"], ["east", "edge"]):
            answers.setdefault(words[0], set()).add(str(words[2].index(row["completion"].strip())))
    assert answers["west"] == {"0"}
    assert {"2", "5"} <= answers["east"]


def test_an_unknown_task_or_split_is_named():
    with pytest.raises(DataError, match="no demo task 'workshop': did you mean 'workshops'"):
        demo_rows("test", "workshop")
    with pytest.raises(DataError, match="no split 'tests': did you mean 'test'"):
        demo_rows("tests")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo_model_path(), local_files_only=True)


def test_the_assets_stay_under_six_megabytes():
    assert sum(f.stat().st_size for f in demo_model_path().parent.rglob("*") if f.is_file()) < 6e6


def test_the_tokenizer_gives_every_row_back(tokenizer):
    assert tokenizer.unk_token is None
    rows = [row for task in DEMO_TASKS for split in SPLITS for row in demo_rows(split, task)]
    texts = [row["prompt"] + row["completion"] for row in rows]
    whole = [found.ids for found in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert tokenizer.backend_tokenizer.decode_batch(whole) == texts
    for row, ids in list(zip(rows, whole, strict=True))[::20]:
        prompt, completion = (tokenizer.encode(row[k], add_special_tokens=False) for k in ("prompt", "completion"))
        assert prompt + completion == ids
    assert max(map(len, whole)) <= 40


@pytest.mark.parametrize("text", ["Grüße, 你好 \U0001f9f5!\n\ttabs", "mill, turned", "  two  spaces ", "<|bos|>"])
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_marks_the_answer(tokenizer):
    chat = [{"role": "user", "content": "mill turn kqzv ->"}, {"role": "assistant", "content": " vzqk"}]
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == " vzqk<eos>"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<bos><|user|>mill turn kqzv -><|assistant|>"
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt)


def make_demo_model():
    spec = importlib.util.spec_from_file_location("make_demo_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_base_knows_its_skills_and_not_the_task(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), local_files_only=True).eval()
    assert model.dtype == torch.float32
    exact_match = make_demo_model().exact_match
    tokenizer.padding_side = "left"
    skills = [row for row in itertools.islice(pretraining_rows(seed=2), 100) if row["domain"] in ("text", "east")]
    assert exact_match(model, tokenizer, skills) > 90
    for task in DEMO_TASKS:
        assert exact_match(model, tokenizer, demo_rows("test", task, rows=64)) < 10


@pytest.mark.slow
def test_the_script_makes_a_model_that_loads(tmp_path, monkeypatch):
    flags = ["--steps", "3", "--batch", "8", "--hidden", "64", "--layers", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, "--out", str(tmp_path / "demo")])
    make_demo_model().main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "demo", local_files_only=True)
    assert model.config.num_hidden_layers == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "demo").eos_token == "<eos>"
    assert "--steps 3" in (tmp_path / "demo" / "MODEL_CARD.md").read_text()
