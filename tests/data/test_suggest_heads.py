"""`suggest_heads`: planted clusters are counted, structureless texts are not, and the same texts always give the same answer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import weftlora
from weftlora.data import DataConfig, texts
from weftlora.data.suggest_heads import bends, words
from weftlora.errors import ConfigError, DataError


def topics(count: int, each: int = 30, words: int = 8) -> list[str]:
    """Texts of so many topics, each with words of its own."""
    draw = random.Random(0)
    vocabulary = [[f"topic{t}word{w}" for w in range(words)] for t in range(count)]
    return [" ".join(draw.sample(vocabulary[t], 5)) for t in range(count) for _ in range(each)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_planted_topics_are_counted(count: int):
    found = weftlora.suggest_heads(topics(count), largest=8)
    assert (found.heads, found.clear) == (count, True)
    assert found.sizes == [30] * count
    assert len(found.sse) == len(found.bend) == 8
    assert found.sse[0] > found.sse[count - 1]
    assert found.margin > 0
    assert str(count) in str(found)


def test_texts_without_anything_in_common_have_no_elbow():
    found = weftlora.suggest_heads([f"one{i} two{i} three{i}" for i in range(60)], largest=8)
    assert not found.clear
    assert "no clear number of clusters" in str(found)


@pytest.mark.parametrize(
    "script",
    [
        (["天气", "晴天", "下雨", "温度"], ["股票", "市场", "价格", "投资"], ["足球", "比赛", "球员", "进球"]),
        (["ฝนตก", "อากาศ", "ลมแรง", "หนาว"], ["ตลาด", "ราคา", "หุ้น", "เงิน"], ["กีฬา", "ฟุตบอล", "ทีม", "ชนะ"]),
    ],
)
def test_topics_are_counted_in_scripts_without_spaces(script: tuple[list[str], ...]):
    draw = random.Random(0)
    given = ["".join(draw.choices(topic, k=6)) for _ in range(30) for topic in script]
    found = weftlora.suggest_heads(given, largest=8)
    assert (found.heads, found.clear, found.sizes) == (3, True, [30, 30, 30])


def test_words_keep_their_vowel_signs():
    assert words("मौसम की बारिश") == ["मौसम", "की", "बारिश"]
    assert words("A b cd! 天気がいい x好") == ["cd", "天気", "気が", "がい", "いい", "好"]


@pytest.mark.filterwarnings("error")
def test_texts_that_repeat_are_counted_without_a_warning():
    found = weftlora.suggest_heads(["warp thread", "Weft, yarn!", "loom beam", "weft yarn"] * 10)
    assert (found.heads, found.clear, found.sizes) == (3, True, [20, 10, 10])
    assert found.sse[2:] == pytest.approx([0.0] * 8, abs=1e-9)


def test_an_iterator_of_texts_is_read_once():
    assert weftlora.suggest_heads(iter(topics(3)), largest=6) == weftlora.suggest_heads(topics(3), largest=6)


def test_the_same_texts_give_the_same_answer():
    given = topics(4)
    assert weftlora.suggest_heads(given, seed=3) == weftlora.suggest_heads(list(given), seed=3)


def test_a_sample_is_drawn_from_many_texts_and_said():
    found = weftlora.suggest_heads(topics(3, each=100), rows=60, largest=6)
    assert (found.rows, found.of, found.heads) == (60, 300, 3)
    assert "60 drawn of 300" in str(found)


def test_the_bend_is_the_distance_below_the_chord():
    assert bends([10.0, 4.0, 2.0, 1.0, 0.0]) == pytest.approx(
        [0.0, (0.75 - 0.4) / 2**0.5, (0.5 - 0.2) / 2**0.5, (0.25 - 0.1) / 2**0.5, 0.0]
    )
    assert bends([3.0, 3.0, 3.0]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["same text"] * 9, "1 different texts have no clusters"),
        (["same text", "Same: text!", "SAME TEXT"], "1 different texts have no clusters"),
        ([], "0 different texts"),
        (["?", "!", "…"], "no words of two letters"),
        ("one string", "takes a list of strings"),
        ([1, 2, 3], "takes a list of strings"),
        (None, "takes a list of strings"),
        ({"text": ["one"]}, "takes a list of strings"),
    ],
)
def test_texts_that_cannot_be_clustered_are_refused(given: object, sentence: str):
    with pytest.raises(DataError, match=sentence):
        weftlora.suggest_heads(given)


@pytest.mark.parametrize("setting", [{"largest": 2}, {"rows": 0}, {"seed": -1}, {"seed": 2**40}, {"largest": 2.5}])
def test_settings_out_of_range_are_refused(setting: dict[str, object]):
    with pytest.raises(ConfigError, match=r"out of range|is not a seed"):
        weftlora.suggest_heads(topics(3), **setting)


def test_rows_of_every_format_are_read_as_text(tmp_path: Path):
    def read(name: str, content: str) -> list[str]:
        path = tmp_path / name
        path.write_text(content)
        return texts(DataConfig(train=str(path)))

    assert read("a.jsonl", '{"prompt": "ask", "completion": "tell"}\n') == ["ask\ntell"]
    assert read("b.jsonl", '{"text": "some words", "label": "x"}\n') == ["some words"]
    chat = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
    assert read("c.jsonl", chat) == ["hi\nho"]
    assert read("d.txt", "a line of text\n") == ["a line of text"]


def test_the_demo_tasks_are_its_clusters():
    held = texts(DataConfig())
    assert weftlora.suggest_heads(held, rows=400, largest=8).heads == 4
