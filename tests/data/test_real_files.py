"""The real tasks load with the rows that their description states."""

import json

import pytest

from weftlora.data import IGNORE, DataConfig, generation_prompts, load

pytestmark = pytest.mark.data


def load_real(real, tokenizer, **section):
    paths = {name: f"{real}/tasks/{section[name]}" for name in ("train", "validation", "test") if name in section}
    loaded = load(DataConfig.parse({**section, **paths}), tokenizer)
    for counts in loaded.counts.values():
        assert counts.read == counts.unused + counts.empty + counts.dropped + counts.kept
    return loaded


def read_counts(loaded):
    return {name: counts.read for name, counts in loaded.counts.items()}


def test_e2e(real, stories):
    loaded = load_real(real, stories, train="e2e/train.txt", test="e2e/test.txt", separator="||")
    counts = read_counts(loaded)
    assert counts["train"] + counts["validation"] == 4672
    assert counts["test"] == 4693
    held = {(row["prompt"], row["completion"]) for row in loaded.validation}
    assert held.isdisjoint((row["prompt"], row["completion"]) for row in loaded.train)
    first = loaded.train[0]
    assert stories.decode([label for label in first["labels"] if label != IGNORE]) == first["completion"] + "</s>"
    (prompt,) = generation_prompts(loaded.train, 1)
    assert stories.decode(prompt.input_ids) == "<s> " + prompt.prompt


@pytest.mark.filterwarnings("ignore:73 of the 6735 rows")
def test_sst2_with_quoting_off(real, stories):
    files = {"train": "sst2/train.tsv", "validation": "sst2/dev.tsv", "test": "sst2/test.tsv"}
    limits = {"limit": 500, "validation_limit": 100, "test_limit": 100}
    loaded = load_real(real, stories, **files, **limits, quoting="none")
    assert read_counts(loaded) == {"train": 60614, "validation": 6735, "test": 872}
    assert (loaded.task, loaded.labels) == ("classification", ["0", "1"])
    assert loaded.counts["validation"].in_train == 73


def test_fairytale_questions(real, stories):
    loaded = load_real(
        real,
        stories,
        train="fairytaleqa/questions.train.jsonl",
        validation="fairytaleqa/questions.val.jsonl",
        test="fairytaleqa/questions.test.jsonl",
        prompt_template="{story} question: {question} answer:",
        limit=500,
    )
    assert read_counts(loaded) == {"train": 8548, "validation": 1025, "test": 1007}
    assert loaded.validation[0]["prompt"].endswith(" answer:")


def test_fairytale_stories(real, stories):
    loaded = load_real(
        real,
        stories,
        train="fairytaleqa/stories.val.jsonl",
        test="fairytaleqa/stories.test.jsonl",
        validation_fraction=0,
    )
    assert read_counts(loaded) == {"train": 23, "test": 23}
    assert loaded.format == "text"
    ids = stories(loaded_text(real), add_special_tokens=False)["input_ids"]
    rows = loaded.train["input_ids"][: -(-(len(ids) + 1) // 511)]
    assert [token for row in rows for token in row[1:]] == [*ids, stories.eos_token_id]


def loaded_text(real):
    with (real / "tasks/fairytaleqa/stories.val.jsonl").open() as file:
        return json.loads(file.readline())["text"]


def test_gsm8k(real, stories):
    files = {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}
    loaded = load_real(real, stories, **files, max_length=320, limit=500, truncate="completion")
    counts = read_counts(loaded)
    assert counts["train"] + counts["validation"] == 7473
    assert counts["test"] == 1319
    assert max(map(len, loaded.train["input_ids"])) <= 320
    assert loaded.counts["train"].truncated > 0


@pytest.mark.parametrize(
    ("task", "train", "test"), [("ARC-Easy", 2251, 2376), ("ARC-Challenge", 1119, 1172), ("openbookqa", 4957, 500)]
)
def test_commonsense(real, stories, task, train, test):
    files = {"train": f"commonsense/{task}/train.json", "test": f"commonsense/{task}/test.json"}
    loaded = load_real(real, stories, **files, limit=100, fields={"prompt": "instruction", "completion": "output"})
    counts = read_counts(loaded)
    assert (counts["train"] + counts["validation"], counts["test"]) == (train, test)


def test_shakespeare(real, stories):
    blocks = load_real(real, stories, train="shakespeare/input.txt")
    text = (real / "tasks/shakespeare/input.txt").read_text()
    tokens = sum(len(row) - 1 for split in (blocks.train, blocks.validation) for row in split["input_ids"])
    assert tokens == pytest.approx(len(stories(text, add_special_tokens=False)["input_ids"]), rel=0.01)
    assert blocks.counts["train"].truncated == 0
    lines = load_real(real, stories, train="shakespeare/input.txt", unit="line", validation_fraction=0, limit=100)
    assert lines.counts["train"].read == 40000
