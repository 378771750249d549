import json

import pytest

from weftlora.data.config import DataConfig
from weftlora.data.examples import examples, find_columns, label_names
from weftlora.data.read import Row, Source
from weftlora.errors import ConfigError, DataError


def of(*rows, **settings):
    source = Source("rows.jsonl", [Row(values, line) for line, values in enumerate(rows, start=1)], {})
    columns = find_columns(source, DataConfig.parse({"train": "rows.jsonl", **settings}))
    return columns, examples(source, columns)


@pytest.mark.parametrize(
    ("row", "format_"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"question": "p", "answer": "c"}, "prompt_completion"),
        ({"messages": [{"role": "assistant", "content": "c"}]}, "chat"),
        ({"text": "c"}, "text"),
        ({"sentence": "p", "label": "c"}, "classification"),
    ],
)
def test_the_format_is_told_from_the_columns(row, format_):
    columns, (example,) = of(row)
    assert columns.format == format_
    assert example.answer == "c"
    assert example.prompt == ("p" if "p" in row.values() else "")


def test_columns_that_could_both_be_the_prompt_are_never_guessed():
    row = {"instruction": "i", "input": "", "output": "o"}
    with pytest.raises(ConfigError, match=r"instruction and input .* could both be the prompt"):
        of(row)
    assert of(row, fields={"prompt": "instruction"})[1][0].prompt == "i"
    assert of(row, prompt_template="{instruction} {input}->")[1][0].prompt == "i ->"


def test_a_template_fills_columns_of_text_and_numbers():
    row = {"story": "Snow-man", "question": "who?", "answer": "a", "section": 1}
    assert of(row, prompt_template="{story} {section} question: {question} answer:")[1][0].prompt == (
        "Snow-man 1 question: who? answer:"
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fields": {"completion": "reply", "prompt": "qestion"}}, "rows.jsonl, line 1: no column 'qestion'"),
        ({"format": "chat"}, "no column for the messages of format chat (its columns: question, reply)"),
        ({}, "cannot tell the format of rows.jsonl from its columns (question, reply)"),
        ({"format": "text", "fields": {"prompt": "question"}}, "data.fields.prompt plays no part in format text"),
    ],
)
def test_columns_that_do_not_fit_are_named(settings, says):
    with pytest.raises((ConfigError, DataError)) as error:
        of({"question": "q", "reply": "r"}, **settings)
    assert says in str(error.value)


GOOD = {"prompt": "p", "completion": "c"}
TURN = {"role": "assistant", "content": "c"}


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        (GOOD, {"prompt": "p"}, "no column 'completion' (it has prompt)"),
        (GOOD, {"prompt": "p", "completion": 3}, "column 'completion' holds 3, not text"),
        (GOOD, {"prompt": None, "completion": "c"}, "column 'prompt' holds None, not text"),
        (GOOD, json.loads('{"prompt": "p", "completion": "\\ud800"}'), "half a surrogate pair"),
        ({**GOOD, "domain": "d"}, {**GOOD, "domain": ""}, "domain '' is not a name"),
        ({"text": "t", "label": 0}, {"text": "t", "label": ""}, "label column 'label' is empty"),
        ({"text": "t", "label": 0}, {"text": "t", "label": None}, "label column 'label' is empty"),
        ({"text": "t", "label": 0}, {"text": "t", "label": 0.5}, "neither text nor a whole number"),
        ({"messages": [TURN]}, {"messages": []}, "'messages' is not a list of messages"),
        ({"messages": [TURN]}, {"messages": "hi"}, "'messages' is not a list of messages"),
        ({"messages": [TURN]}, {"messages": [{"role": "user"}]}, "message 1 of 'messages' lacks"),
        ({"messages": [TURN]}, {"messages": [{**TURN, "role": "asistant"}]}, "did you mean 'assistant'?"),
        ({"messages": [TURN]}, {"messages": [{**TURN, "role": "user"}]}, "no assistant message"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(good, bad, says):
    with pytest.raises(DataError) as error:
        of(good, good, bad)
    assert str(error.value).startswith("rows.jsonl, line 3: ")
    assert says in str(error.value)


def test_class_names_are_sorted_as_numbers_or_as_words():
    source = Source("rows.jsonl", [], {})
    assert label_names(of(*[{"text": "t", "label": n} for n in (10, 9, -1, 9)])[1], source) == ["-1", "9", "10"]
    assert label_names(of(*[{"text": "t", "label": n} for n in ("b", "10", "9")])[1], source) == ["10", "9", "b"]
    long = "1" * 5000  # more digits than Python makes a number of
    assert label_names(of(*[{"text": "t", "label": n} for n in (long, "9")])[1], source) == [long, "9"]
    with pytest.raises(DataError, match=r"has 1 class \(x\)"):
        label_names(of({"text": "t", "label": "x"})[1], source)
