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
    row = {"instruction": "i", "source": "s", "output": "o"}
    with pytest.raises(ConfigError, match=r"instruction and source .* could both be the prompt"):
        of(row)
    row = {"instruction": "i", "input": "", "output": "o"}
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
        (GOOD, {"prompt": "p", "completion": True}, "column 'completion' holds True, not text"),
        (GOOD, {"prompt": "p", "completion": {"a": 1}}, "column 'completion' holds {'a': 1}, not text"),
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

    def names(*labels):
        return label_names([row.answer for row in of(*[{"text": "t", "label": n} for n in labels])[1]], source)

    assert names(10, 9, -1, 9) == ["-1", "9", "10"]
    assert names("b", "10", "9") == ["10", "9", "b"]
    long = "1" * 5000  # more digits than Python makes a number of
    assert names(long, "9") == [long, "9"]
    with pytest.raises(DataError, match=r"has 1 class \(x\)"):
        names("x")


def test_columns_are_decided_by_all_rows():
    plain = {"prompt": "p", "completion": "c"}
    columns, rows = of(plain, {**plain, "tools": [{"name": "f"}]})
    assert columns.format == "chat"
    assert columns.of == {"completion": "completion", "prompt": "prompt", "tools": "tools"}
    assert [row.tools for row in rows] == [None, [{"name": "f"}]]


def test_what_is_made_of_the_columns_is_one_line():
    columns, _ = of({"id": 1, "instruction": "i", "input": "j", "output": "o", "meta": "m"}, ignore=["meta"])
    assert str(columns) == (
        "format prompt_completion: prompt from instruction and input, completion from output; not used: id; ignored: meta"
    )


@pytest.mark.parametrize("column", ["system", "system_prompt", "history", "tools", "context", "input", "images"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c"},
        {"messages": [TURN]},
        {"text": "t"},
        {"text": "t", "label": "l"},
        {"instruction": "p", "output": "c"},
        {"question": "p", "answer": "c"},
    ],
)
def test_a_column_that_matters_is_used_or_refused_and_never_dropped(row, column):
    value = [{"name": "seen"}] if column == "tools" else [["seen", "a"]] if column == "history" else "seen"
    try:
        _, made = of(row, {**row, column: value})
    except ConfigError as error:
        assert f"the column {column} of rows.jsonl holds values" in str(error)  # noqa: PT017
        assert f"data.ignore={column}" in str(error)  # noqa: PT017
    else:
        assert "seen" in repr(made[1])
    columns, made = of(row, {**row, column: value}, ignore=column)
    assert "seen" not in repr(made[1])
    assert columns.ignored == (column,)
    assert "seen" not in repr(of({**row, column: ""}, row)[1])  # empty in every row: nothing is lost


def talk(*said):
    return [{"role": role, "content": content} for role, content in said]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [("user", "q"), ("assistant", "a")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]}, TURN]},
         [("user", "q!"), ("assistant", "c")]),
        ({"conversation": ["q", "a"]}, [("user", "q"), ("assistant", "a")]),
        ({"system": "s", "prompt": "q", "completion": "a"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"system": "s", "messages": [TURN]}, [("system", "s"), ("assistant", "c")]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        ({"instruction": "q", "input": "", "output": "a", "history": [["q0", "a0"]]},
         [("user", "q0"), ("assistant", "a0"), ("user", "q"), ("assistant", "a")]),
        ({"prompt": talk(("user", "q")), "completion": talk(("assistant", "a"))}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "chosen": talk(("user", "q"), ("assistant", "a")), "rejected": talk(("user", "q"), ("assistant", "b"))},
         [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "chosen": talk(("assistant", "a")), "rejected": []}, [("user", "q"), ("assistant", "a")]),
        ({"messages": json.dumps(talk(("user", "q"), ("assistant", "a")))}, [("user", "q"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_conversations_in_the_usual_forms_become_messages(row, messages):
    columns, (example,) = of(row)
    assert columns.format == "chat"
    assert list(example.messages) == talk(*messages)
    taught = [
        message["content"] for message, learn in zip(example.messages, example.learned or [], strict=False) if learn
    ]
    assert example.learned is None or taught == [messages[-1][1]]
    assert example.answer == messages[-1][1]


def test_only_what_is_to_be_learnt_of_a_conversation_is():
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "b", "train": True},
    ]
    (example,) = of({"messages": turns})[1]
    assert example.learned == (False, False, False, True)
    assert example.answer == "b"
    assert all(set(message) == {"role", "content"} for message in example.messages)
    assert of({"messages": [{**turns[1]}]})[1][0].empty
    with pytest.raises(DataError, match=r"line 1: message 1 has weight 0\.5; only 0 and 1"):
        of({"messages": [{**turns[1], "weight": 0.5}]})


def test_calls_of_tools_are_kept_in_one_form():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    turns = [
        TURN | {"role": "user"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        TURN,
    ]
    (first,) = of({"messages": turns, "tools": json.dumps([{"type": "function", "function": {"name": "f"}}])})[1]
    assert first.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert first.messages[1]["content"] == ""
    assert first.tools == [{"type": "function", "function": {"name": "f"}}]
    shared = [
        {"from": "human", "value": "c"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "c"},
    ]
    (second,) = of({"conversations": shared})[1]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "tool", "assistant"]
    assert second.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}


def test_reasoning_has_one_name():
    for key in ("reasoning", "thinking", "reasoning_content"):
        assert of({"messages": [{**TURN, key: "hm"}]})[1][0].messages[0] == {**TURN, "reasoning_content": "hm"}


def test_numbers_are_answers_as_they_are_written():
    assert [row.answer for row in of(*[{"question": "q", "answer": n} for n in (4, 0.5, -1)])[1]] == ["4", "0.5", "-1"]


def test_preferred_texts_have_their_prompt_in_common():
    row = {"chosen": "Human: hi\n\nAssistant: hello", "rejected": "Human: hi\n\nAssistant: go away"}
    (example,) = of(row)[1]
    assert (example.prompt, example.answer) == ("Human: hi\n\nAssistant: ", "hello")


def test_answers_that_are_marked_bad_are_not_learnt_unseen():
    rows = [{"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "d", "label": False}]
    with pytest.raises(ConfigError, match=r"label of rows\.jsonl says which answers are good"):
        of(*rows)
    assert len(of(*rows, ignore="label")[1]) == 2


def test_parts_that_are_no_text_are_named():
    part = {"type": "image", "image": "a.png"}
    with pytest.raises(DataError, match=r"line 1: message 1 has a part of type 'image'; only parts of text"):
        of({"messages": [{"role": "user", "content": [part]}, TURN]})
