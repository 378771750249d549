import json
import os
import subprocess
import sys
from collections import Counter
from copy import deepcopy

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weftlora.data import IGNORE, DataConfig, encode_prompt, generation_prompts, load, loading, sampled, shown
from weftlora.errors import ConfigError, DataError, ModelError

BOS, EOS = 0, 1


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbers(count, start=0):
    return [{"prompt": f"{n}=", "completion": str(n)} for n in range(start, start + count)]


def add_up(loaded):
    for name, counts in loaded.counts.items():
        split = getattr(loaded, name)
        assert counts.read == counts.unused + counts.empty + counts.dropped + counts.kept
        assert counts.rows == len(split)
        assert counts.tokens == sum(map(len, split["input_ids"]))
        assert counts.truncated <= counts.kept


def load_in(folder, tokenizer, section, **more):
    loaded = load(DataConfig.parse(section), tokenizer, base_dir=folder, **more)
    add_up(loaded)
    return loaded


def test_rows_become_tokens_masks_and_raw_columns(tmp_path, letters, ids):
    jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "xy", "domain": "d"}, *numbers(3)])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: no column 'domain'"):
        load_in(tmp_path, letters, "a.jsonl")
    jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "xy", "domain": "d"}])
    loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "validation_fraction": 0})
    assert loaded.validation is loaded.test is None
    assert loaded.train[0] == {
        "input_ids": [BOS, *ids("pxy"), EOS],
        "attention_mask": [1] * 5,
        "labels": [IGNORE, IGNORE, *ids("xy"), EOS],
        "prompt": "p",
        "completion": "xy",
        "domain": "d",
    }
    assert loaded.domains == ["d"]
    assert (loaded.task, loaded.labels, loaded.counts["train"].answer_tokens) == ("causal", None, 3)


def test_test_rows_are_carved_before_the_validation_rows_and_all_three_differ(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", [*numbers(40), {"prompt": "", "completion": ""}])
    both = {"train": "a.jsonl", "validation_fraction": 0.1, "test_fraction": 0.25}
    loaded = load_in(tmp_path, letters, both)
    prompts = {name: set(getattr(loaded, name)["prompt"]) for name in ("train", "validation", "test")}
    assert [len(found) for found in prompts.values()] == [27, 3, 10]
    assert len(set.union(*prompts.values())) == 40
    assert loaded.counts["train"].empty == 1
    shorter = load_in(tmp_path, letters, both | {"validation_fraction": 0.3})
    assert set(shorter.test["prompt"]) == prompts["test"]  # whatever validation takes of the rest
    jsonl(tmp_path / "t.jsonl", numbers(2, 100))
    given = load_in(tmp_path, letters, both | {"test": "t.jsonl"})
    assert (len(given.train), len(given.test)) == (36, 2)


def test_validation_is_carved_and_the_test_rows_are_left_alone(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", numbers(40))
    jsonl(tmp_path / "t.jsonl", numbers(5, 100))
    loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "test": "t.jsonl"})
    assert [loaded.counts[name].rows for name in ("train", "validation", "test")] == [36, 4, 5]
    assert set(loaded.train["prompt"]).isdisjoint(loaded.validation["prompt"])
    assert sorted(loaded.hashes) == [str(tmp_path / "a.jsonl"), str(tmp_path / "t.jsonl")]
    again = load_in(tmp_path, letters, {"train": "a.jsonl", "test": "t.jsonl"})
    assert again.validation["prompt"] == loaded.validation["prompt"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.sampled_from("abcdef"), min_size=2, max_size=20), seed=st.integers(0, 3))
def test_no_row_is_on_both_sides_and_none_is_lost(tmp_path, letters, rows, seed):
    rows = [*rows, "yes", "no"]
    jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": row} for row in rows])
    loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "seed": seed, "validation_fraction": 0.3})
    train, held = Counter(loaded.train["completion"]), Counter(loaded.validation["completion"])
    assert train.keys().isdisjoint(held.keys())
    assert train + held == Counter(rows)


def test_rows_of_one_prompt_stay_together_when_asked(tmp_path, letters):
    rows = [{"prompt": f"{n % 10}=", "completion": str(n)} for n in range(60)]
    jsonl(tmp_path / "a.jsonl", rows)
    by_row = load_in(tmp_path, letters, {"train": "a.jsonl", "validation_fraction": 0.2})
    by_prompt = load_in(tmp_path, letters, {"train": "a.jsonl", "validation_fraction": 0.2, "split_on": "prompt"})
    assert set(by_row.train["prompt"]) & set(by_row.validation["prompt"])
    assert len(by_prompt.validation) == 12
    assert set(by_prompt.train["prompt"]).isdisjoint(by_prompt.validation["prompt"])


def test_limits_leave_rows_unused_and_count_them(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", numbers(40))
    loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "limit": 10, "validation_limit": 2})
    assert (loaded.counts["train"].unused, len(loaded.train)) == (26, 10)
    assert (loaded.counts["validation"].unused, len(loaded.validation)) == (2, 2)


def test_one_limit_is_for_every_split_and_counts_rows_that_are_of_use(tmp_path, letters):
    """Rows that are empty or dropped are not among the drawn: others take their place while there are any."""
    good, useless = numbers(30), [{"prompt": f"q{n}", "completion": "x" * 20} for n in range(30)]
    jsonl(tmp_path / "a.jsonl", [row for pair in zip(useless, good, strict=True) for row in pair])
    jsonl(tmp_path / "t.jsonl", good)
    given = {"train": "a.jsonl", "test": "t.jsonl", "max_length": 10, "validation_fraction": 0.4}
    loaded = load_in(tmp_path, letters, {**given, "limit": 8})
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (8, 8, 8)
    for counts in loaded.counts.values():
        assert counts.read == counts.unused + counts.empty + counts.dropped + counts.kept
    assert loaded.counts["train"].dropped > 0
    order = [row["prompt"] for row in good]
    drawn = loaded.train["prompt"]
    assert drawn == sorted(drawn, key=order.index)
    own = load_in(tmp_path, letters, {**given, "limit": 8, "test_limit": 20, "validation_limit": 3})
    assert (len(own.train), len(own.validation), len(own.test)) == (8, 3, 20)
    few = load_in(tmp_path, letters, {**given, "limit": 25})
    assert len(few.train) < 25
    assert few.counts["train"].unused == 0


def test_every_row_is_accounted_for(tmp_path, letters):
    rows = [("p", "kept"), ("p", "kept"), ("p" * 9, "kept"), ("p", " "), ("p", "x" * 20), ("q", "kept")]
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]))
    loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "max_length": 10, "validation_fraction": 0})
    counts = loaded.counts["train"]
    assert (counts.read, counts.empty, counts.dropped, counts.kept) == (7, 2, 1, 4)
    assert (counts.truncated, counts.repeated) == (1, 1)
    assert counts.answer_tokens == 4 * 5
    assert all(any(label != IGNORE for label in labels) for labels in loaded.train["labels"])


def test_an_empty_row_is_never_the_validation_split(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", [*numbers(2), *[{"prompt": str(n), "completion": " "} for n in range(20)]])
    loaded = load_in(tmp_path, letters, "a.jsonl")
    assert (len(loaded.train), len(loaded.validation), loaded.counts["train"].empty) == (1, 1, 20)


def test_nothing_left_is_an_error(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "x" * 20}, {"prompt": "p", "completion": ""}])
    with pytest.raises(DataError, match=r"of 2, 1 are empty and 1 have no answer within data\.max_length"):
        load_in(tmp_path, letters, {"train": "a.jsonl", "max_length": 10, "validation_fraction": 0})


def test_copies_of_training_rows_in_a_given_split_are_counted_and_said(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", numbers(5))
    jsonl(tmp_path / "v.jsonl", numbers(4, 3))
    with pytest.warns(UserWarning, match=r"2 of the 4 rows of .*v\.jsonl are copies of training rows"):
        loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "validation": "v.jsonl"})
    assert loaded.counts["validation"].in_train == 2


def test_classes_are_numbered_the_same_in_every_split(tmp_path, framed_letters):
    labelled = {"a": "no", "b": "yes", "c": "no", "d": "um"}
    jsonl(tmp_path / "a.jsonl", [{"text": word, "label": label} for word, label in labelled.items()])
    jsonl(tmp_path / "v.jsonl", [{"text": "e", "label": "yes"}])
    section = {"train": "a.jsonl", "validation": "v.jsonl"}
    loaded = load_in(tmp_path, framed_letters, section)
    assert (loaded.task, loaded.labels) == ("classification", ["no", "um", "yes"])
    assert loaded.train["labels"] == [0, 2, 0, 1]
    assert loaded.validation["labels"] == [2]
    assert loaded.validation[0]["completion"] == "yes"
    assert generation_prompts(loaded.train) == []
    trained_before = load_in(tmp_path, framed_letters, section, labels=["yes", "no", "um"])
    assert trained_before.train["labels"] == [1, 0, 1, 2]


def test_a_class_that_training_never_saw_is_named(tmp_path, framed_letters):
    jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}])
    jsonl(tmp_path / "v.jsonl", [{"text": "c", "label": "no"}, {"text": "d", "label": "maybe"}])
    with pytest.raises(DataError, match=r"v\.jsonl, line 2: label 'maybe' is not among .*no, yes"):
        load_in(tmp_path, framed_letters, {"train": "a.jsonl", "validation": "v.jsonl"})
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: label 'yes' is not among the model's classes"):
        load_in(tmp_path, framed_letters, "a.jsonl", labels=["no", "maybe"])


@pytest.mark.parametrize(
    ("rows", "task", "says"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "causal", "format classification does not fit"),
        ([{"text": "a"}, {"text": "b"}], "seq2seq", "format text does not fit the task seq2seq"),
        (numbers(3), "classification", "no column for the text of format classification"),
        (numbers(3), "regression", "there is no task 'regression'"),
    ],
)
def test_data_for_another_task_is_refused(tmp_path, letters, rows, task, says):
    jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError) as error:
        load_in(tmp_path, letters, "a.jsonl", task=task)
    assert says in str(error.value)


def test_a_split_of_what_has_none_is_refused(tmp_path, letters):
    """It would be trained on the whole file."""
    jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "xyz"}])
    with pytest.raises(
        ConfigError, match=r"data\.split='dev' names a split .* and data\.train='a\.jsonl' has no splits"
    ):
        load_in(tmp_path, letters, {"train": "a.jsonl", "split": "dev"})
    Dataset.from_list([{"prompt": "ab", "completion": "xyz"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="is one saved split, not several, so it has no 'dev'"):
        load_in(tmp_path, letters, {"train": "saved", "split": "dev"})


def test_an_encoder_decoder_gets_prompt_and_answer_apart(tmp_path, framed_letters, ids):
    jsonl(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "xyz"}])
    loaded = load_in(tmp_path, framed_letters, {"train": "a.jsonl", "validation_fraction": 0}, task="seq2seq")
    assert loaded.train[0]["input_ids"] == [BOS, *ids("ab"), EOS]
    assert loaded.train[0]["labels"] == [*ids("xyz"), EOS]
    assert loaded.counts["train"].answer_tokens == 4
    assert generation_prompts(loaded.train)[0].input_ids == [BOS, *ids("ab"), EOS]


def test_generation_prompts_hold_what_stood_before_the_answer(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", numbers(5))
    loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "validation_fraction": 0})
    prompts = generation_prompts(loaded.train, limit=2)
    assert [(p.prompt, p.reference, p.domain) for p in prompts] == [("0=", "0", None), ("1=", "1", None)]
    assert [p.input_ids for p in prompts] == [encode_prompt(letters, "0="), encode_prompt(letters, "1=")]


def test_text_has_nothing_to_generate_and_blocks_fit_the_length(tmp_path, letters):
    (tmp_path / "a.txt").write_text("".join(f"line {n}\n" for n in range(50)))
    loaded = load_in(tmp_path, letters, {"train": "a.txt", "max_length": 20})
    assert loaded.format == "text"
    assert generation_prompts(loaded.train) == []
    rows = [*loaded.train["input_ids"], *loaded.validation["input_ids"]]
    assert max(map(len, rows)) <= 20
    assert all(row[0] == BOS and row[-1] != EOS for row in rows)
    assert sum(len(row) - 1 for row in rows) == len((tmp_path / "a.txt").read_text()) - 1


def test_the_length_is_held_to_what_the_model_takes(tmp_path, letters):
    tokenizer = deepcopy(letters)
    tokenizer.model_max_length = 12
    jsonl(tmp_path / "a.jsonl", [{"prompt": "p" * 30, "completion": "c"}])
    assert load_in(tmp_path, tokenizer, {"train": "a.jsonl", "validation_fraction": 0}).max_length == 12
    with pytest.warns(UserWarning, match="12 is used"):
        load_in(tmp_path, tokenizer, {"train": "a.jsonl", "validation_fraction": 0, "max_length": 100})
    tokenizer.model_max_length = 2
    with pytest.raises(ModelError, match="leaves no room"):
        load_in(tmp_path, tokenizer, {"train": "a.jsonl", "validation_fraction": 0})


def test_the_demo_brings_its_three_splits(letters):
    loaded = load_in(None, letters, {"train": "demo", "limit": 20})
    assert len(loaded.train) == 20
    assert len(loaded.validation) > 0
    assert len(loaded.test) > 0
    assert len(loaded.domains) > 1
    assert set(loaded.hashes) == {"demo train", "demo validation", "demo test"}
    assert not set(loaded.train["prompt"]) & set(loaded.test["prompt"])


def saved_dict(folder):
    splits = {
        name: [{"prompt": f"{name}{n}", "completion": "c"} for n in range(4)] for name in ("train", "dev", "test")
    }
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder / "saved")


def test_a_saved_dataset_dict_gives_its_three_splits(tmp_path, letters):
    saved_dict(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    loaded = load_in(tmp_path, letters, "saved")
    assert loaded.validation["prompt"] == [f"dev{n}" for n in range(4)]
    assert loaded.test["prompt"] == [f"test{n}" for n in range(4)]
    assert len(loaded.hashes) == 3
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


FRESH = """
import sys
from transformers import PreTrainedTokenizerFast
from weftlora.data import DataConfig, load
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1] + "/tokenizer")
for train in ("a.jsonl", "saved", "demo"):
    load(DataConfig.parse(train), tokenizer, base_dir=sys.argv[1])
"""


@pytest.mark.slow
def test_no_cache_is_written(tmp_path, letters):
    home = tmp_path / "home"
    home.mkdir()
    letters.save_pretrained(tmp_path / "tokenizer")
    jsonl(tmp_path / "a.jsonl", numbers(20))
    saved_dict(tmp_path)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    clean |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "TMPDIR": str(home)}
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], env=clean, check=True)
    assert list(home.rglob("*")) == []


def test_several_files_are_one_set_and_weights_say_how_often_they_are_seen(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", numbers(10))
    jsonl(tmp_path / "b.jsonl", [{"question": f"{n}?", "answer": n} for n in range(10)])
    even = load_in(tmp_path, letters, {"train": ["a.jsonl", "b.jsonl"], "validation_fraction": 0})
    assert even.train["completion"] == [str(n) for n in range(10)] * 2
    assert len(even.columns) == 2
    mixed = load_in(tmp_path, letters, {"train": {"a.jsonl": 2, "b.jsonl": 0.5}, "validation_fraction": 0})
    seen = Counter(mixed.train["prompt"])
    assert [seen[f"{n}="] for n in range(10)] == [2] * 10
    assert sorted(seen[f"{n}?"] for n in range(10)) == [0] * 5 + [1] * 5
    carved = load_in(tmp_path, letters, {"train": {"a.jsonl": 2, "b.jsonl": 1}, "validation_fraction": 0.2})
    assert len(carved.validation) == 4  # of the rows, not of their copies
    assert set(carved.validation["prompt"]).isdisjoint(carved.train["prompt"])
    jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": "assistant", "content": "c"}]}])
    with pytest.raises(ConfigError, match=r"c\.jsonl is read as chat and .*a\.jsonl as prompt_completion"):
        load_in(tmp_path, letters, ["a.jsonl", "c.jsonl"])
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": 1, "completion": null}\n')
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: column 'completion' holds None"):
        load_in(tmp_path, letters, ["a.jsonl", "d.jsonl"])


def test_a_weight_that_draws_nothing_is_named(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", [{"prompt": str(n), "completion": "x"} for n in range(4)])
    with pytest.raises(DataError, match=r"a\.jsonl is drawn with the weight that data\.train gives it"):
        load_in(tmp_path, letters, {"train": {"a.jsonl": 0.01}})


def test_a_column_that_only_the_test_rows_have_is_not_dropped(tmp_path, letters):
    jsonl(tmp_path / "a.jsonl", numbers(10))
    jsonl(tmp_path / "t.jsonl", [{"prompt": "p", "completion": "c", "context": "seen"}])
    with pytest.raises(ConfigError, match=r"the column context of .*t\.jsonl holds values"):
        load_in(tmp_path, letters, {"train": "a.jsonl", "test": "t.jsonl"})


def test_a_limit_is_of_rows_that_are_of_use_in_every_split(tmp_path, letters):
    rows = [{"prompt": f"{n}=", "completion": "x" * (30 if n % 2 else 1)} for n in range(200)]
    jsonl(tmp_path / "a.jsonl", rows)
    loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "max_length": 10, "limit": 20})
    assert len(loaded.train) == 20
    assert loaded.counts["train"].dropped > 0
    assert load_in(tmp_path, letters, {"train": "a.jsonl", "max_length": 10, "limit": 5}).counts["validation"].kept == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_large_split_is_encoded_into_a_file_and_found_again(tmp_path, monkeypatch, chat_letters, processes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [
        {
            "messages": [{"role": "user", "content": f"{n % 40}?"}, {"role": "assistant", "content": str(n)}],
            "domain": "d",
        }
        for n in range(90)
    ]
    rows[7]["messages"][1]["content"] = " "
    rows[8]["messages"][1]["content"] = "x" * 99
    jsonl(tmp_path / "a.jsonl", rows)
    section = {"train": "a.jsonl", "max_length": 40, "processes": processes, "validation_fraction": 0.2}
    small = load_in(tmp_path, chat_letters, section)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(loading, "LARGE", 50)
    monkeypatch.setattr(loading, "AT_ONCE", 16)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    environment, held = os.environ, dict(os.environ)
    large = load_in(tmp_path, chat_letters, section)
    assert os.environ is environment
    assert dict(environment) == held
    assert large.train.cache_files
    (entry,) = (tmp_path / "cache" / "weftlora" / "rows").iterdir()
    monkeypatch.setattr(loading, "_load", lambda *args: pytest.fail("it was encoded again"))
    again = load_in(tmp_path, chat_letters, section)
    for found in (large, again):
        assert found.counts == small.counts
        assert (found.hashes, found.columns, found.domains) == (small.hashes, small.columns, small.domains)
        assert [*found.train] == [*small.train]
        assert [*found.validation] == [*small.validation]
    assert small.counts["train"].empty + small.counts["train"].dropped == 2
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "LARGE", 50)
    rows[0]["messages"][1]["content"] = "other"
    jsonl(tmp_path / "a.jsonl", rows)
    assert (
        "other" in load_in(tmp_path, chat_letters, section).train["completion"]
        or "other" in load_in(tmp_path, chat_letters, section).validation["completion"]
    )
    (entry / "loaded.json").write_text("{")  # damaged: encoded again
    load_in(tmp_path, chat_letters, section)
    load_in(tmp_path, chat_letters, {**section, "cache": False})
    kept = len(list((tmp_path / "cache" / "weftlora" / "rows").iterdir()))
    assert kept == 2
    other = deepcopy(chat_letters)
    other.chat_template += "{# another #}"
    load_in(tmp_path, other, section)
    assert len(list((tmp_path / "cache" / "weftlora" / "rows").iterdir())) == 3


def test_a_row_that_cannot_be_used_is_named_from_every_process(tmp_path, monkeypatch, chat_letters):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "LARGE", 50)
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}]}
        for n in range(90)
    ]
    rows[77]["messages"][0]["name"] = "who"
    jsonl(tmp_path / "a.jsonl", rows)
    for processes in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl, line 78: a message of the user has the key 'name'"):
            load_in(tmp_path, chat_letters, {"train": "a.jsonl", "processes": processes, "validation_fraction": 0})
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_beginning_that_the_prompt_brings_is_not_put_twice(tmp_path, letters):
    rows = [{"prompt": "<s>p", "completion": "c"}, {"prompt": "p", "completion": "c</s>"}]
    jsonl(tmp_path / "a.jsonl", rows)
    loaded = load_in(tmp_path, letters, {"train": "a.jsonl", "validation_fraction": 0})
    assert loaded.train[0]["input_ids"] == loaded.train[1]["input_ids"]
    assert loaded.train[0]["input_ids"].count(BOS) == 1
    assert encode_prompt(letters, "<s>p") == encode_prompt(letters, "p")


def test_what_is_learnt_can_be_looked_at(tmp_path, letters, chat_letters, framed_letters):
    jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "cd"}])
    section = {"train": "a.jsonl", "validation_fraction": 0}
    plain = load_in(tmp_path, letters, section).train
    assert list(shown(plain, letters)) == [[("<s>p", False), ("cd</s>", True)]]
    assert sampled(plain, letters) == "<s>p⟦cd</s>⟧"
    pieces = list(shown(load_in(tmp_path, framed_letters, section, task="seq2seq").train, framed_letters))
    assert pieces == [[("<s>p</s>", False), ("cd</s>", True)]]
    jsonl(
        tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "cd"}]}]
    )
    assert list(shown(load_in(tmp_path, chat_letters, section).train, chat_letters)) == [
        [("<s>[u]p</s>[a]", False), ("cd</s>", True)]
    ]
    jsonl(tmp_path / "a.jsonl", [{"text": "p"}])
    assert list(shown(load_in(tmp_path, letters, section).train, letters)) == [[("<s>p</s>", True)]]
