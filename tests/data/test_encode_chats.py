"""The template of these tests writes <s>[u]hi</s>[a]hey</s>; answers are opened by [a] and ended by </s>."""

import json
from copy import deepcopy

import pytest

from weftlora.data import IGNORE, DataConfig, encode_prompt, generation_prompts, load
from weftlora.data.encode import Frame, chat
from weftlora.data.examples import Example
from weftlora.errors import DataError, ModelError


def turns(*contents):
    return tuple({"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents))


def encode(tokenizer, messages, max_length=64, truncate="prompt", answers="all", fold=False, **more):
    (rows,) = chat(Frame.of(tokenizer), max_length, truncate, answers, fold)(
        [Example("", "x", None, 7, messages=messages, file="rows.jsonl", **more)]
    )
    return rows


def spelled(tokenizer, labels):
    """The labelled letters, a dot for each masked one."""
    return "".join("." if label == IGNORE else tokenizer.convert_ids_to_tokens(label) for label in labels)


def test_the_loss_is_on_every_assistant_turn_and_its_end(chat_letters, ids):
    (row,) = encode(chat_letters, turns("hi", "hey", "and", "no"))
    assert row.input_ids == ids("<s>[u]hi</s>[a]hey</s>[u]and</s>[a]no</s>")
    assert spelled(chat_letters, row.labels) == "." * 10 + "hey</s>" + "." * 10 + "no</s>"
    assert (row.prompt, row.answer) == ("<s>[u]hi</s>[a]hey</s>[u]and</s>[a]", "no")


def test_what_follows_the_last_answer_is_left_out(chat_letters, ids):
    (row,) = encode(chat_letters, turns("hi", "hey", "and"))
    assert row.input_ids == ids("<s>[u]hi</s>[a]hey</s>")


def test_a_long_chat_loses_its_oldest_turns_or_its_end(chat_letters, ids):
    messages = turns("hi", "hey", "and", "no")
    (row,) = encode(chat_letters, messages, 13, "prompt")
    assert row.input_ids == ids("[u]and</s>[a]no</s>")
    assert spelled(chat_letters, row.labels) == "." * 10 + "no</s>"
    assert row.truncated
    (row,) = encode(chat_letters, messages, 16, "completion")
    assert spelled(chat_letters, row.labels) == "." * 10 + "hey</s>" + ".."
    assert (row.prompt, row.answer) == ("<s>[u]hi</s>[a]", "hey")
    assert encode(chat_letters, messages, 16, "drop") == []
    assert encode(chat_letters, messages, 10, "completion") == []
    assert encode(chat_letters, turns("hi", "a" * 20), 16, "prompt") == []


def test_generation_goes_on_from_the_assistants_header(chat_letters, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hey"}]}\n'
    )
    loaded = load(DataConfig.parse({"train": "a.jsonl", "validation_fraction": 0}), chat_letters, base_dir=tmp_path)
    assert loaded.format == "chat"
    (prompt,) = generation_prompts(loaded.train)
    assert (prompt.prompt, prompt.reference) == ("<s>[u]hi</s>[a]", "hey")
    assert prompt.input_ids == encode_prompt(chat_letters, [{"role": "user", "content": "hi"}])
    assert chat_letters.decode(prompt.input_ids) == "<s>[u]hi</s>[a]"


def test_a_chat_cut_in_a_users_turn_is_asked_for_its_last_whole_answer(chat_letters, tmp_path, ids):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns("hi", "hey", "and", "no")}))
    section = {"train": "a.jsonl", "validation_fraction": 0, "max_length": 16, "truncate": "completion"}
    (prompt,) = generation_prompts(load(DataConfig.parse(section), chat_letters, base_dir=tmp_path).train)
    assert (prompt.input_ids, prompt.reference) == (ids("<s>[u]hi</s>[a]"), "hey")


def test_a_template_that_ends_no_message_gets_an_end(letters):
    tokenizer = deepcopy(letters)
    body = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = body + "{% if add_generation_prompt %}[a]{% endif %}"
    (row,) = encode(tokenizer, turns("hi", "hey", "and", "no"))
    assert spelled(tokenizer, row.labels) == "." * 8 + "hey" + "." * 9 + "no</s>"


def test_a_tokenizer_without_a_template_is_refused(letters):
    with pytest.raises(ModelError, match="has no chat template"):
        encode(letters, turns("hi", "hey"))


def test_messages_the_template_refuses_are_named(chat_letters):
    tokenizer = deepcopy(chat_letters)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"rows\.jsonl, line 7: .*roles must alternate"):
        encode(tokenizer, turns("hi", "hey"))


def test_a_template_that_rewrites_earlier_turns_is_refused(chat_letters):
    tokenizer = deepcopy(chat_letters)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(DataError, match=r"line 7: the chat template rewrites earlier turns"):
        encode(tokenizer, turns("hi", "hey", "and", "no"))


@pytest.mark.parametrize(
    "broken",
    ["{{ 1 / 0 }}", "{% break %}", "{{ messages[9].x.y }}", "{{ 'x'.format_map(3).y.z }}"],
)
def test_a_template_that_fails_in_its_own_way_is_one_sentence(chat_letters, broken):
    tokenizer = deepcopy(chat_letters)
    tokenizer.chat_template = broken + tokenizer.chat_template
    with pytest.raises(DataError, match=r"line 7: the chat template re"):
        encode(tokenizer, turns("hi", "hey"))
