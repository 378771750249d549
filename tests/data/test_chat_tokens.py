"""Of a conversation, what is trained on is what `apply_chat_template` makes of it, and what stands before an answer what is sent."""

import importlib.util
import json
from pathlib import Path

import pytest
from chat_tokenizers import BARE, BRACKETS, CHATML, FORGETS, TEMPLATES, TOOLS, byte_level, marked_words, slow
from hypothesis import given, settings
from hypothesis import strategies as st

from weftlora.data import IGNORE, DataConfig, encode_prompt, load
from weftlora.data.encode import Frame, chat, fold_system, takes_parts
from weftlora.data.examples import Example
from weftlora.errors import DataError

MADE = {}
KINDS = {"byte_level": byte_level, "marked_words": marked_words, "slow": slow}


def turns(*contents):
    return tuple({"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents))


TALK = turns("Who has the lamp?", "Mira has the lamp.", "And the rope? Say no more.", "Tomas has it")


def encoded(tokenizer, messages, *args, max_length=4096, **more):
    row = Example("", "x", None, 7, messages=tuple(messages), file="rows.jsonl", **more)
    return chat(Frame.of(tokenizer), max_length, "prompt", *args)([row])[0]


def sent(tokenizer, messages, tools=None):
    """What a server makes of a conversation that is to be answered."""
    return tokenizer.apply_chat_template(
        list(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]


def in_parts(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def whole(tokenizer, messages, tools=None):
    return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=True, return_dict=True)["input_ids"]


def begins(labels):
    """Where the stretches of labels begin."""
    return [at for at, label in enumerate(labels) if label != IGNORE and (at == 0 or labels[at - 1] == IGNORE)]


def learned(tokenizer, row):
    """The text of each stretch that is learned."""
    out = []
    for at in begins(row.labels):
        end = next((n for n in range(at, len(row.labels)) if row.labels[n] == IGNORE), len(row.labels))
        out.append(tokenizer.decode(row.labels[at:end]))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_training_tokens_are_those_of_one_tokenisation_and_prompts_what_is_sent(kind, template):
    tokenizer = KINDS[kind](TEMPLATES[template])
    (row,) = encoded(tokenizer, TALK)
    ids = whole(tokenizer, TALK)
    assert row.input_ids[: len(ids)] == ids
    assert row.input_ids[len(ids) :] == ([tokenizer.eos_token_id] if template == "plain" else [])
    starts = begins(row.labels)
    assert len(starts) == 2
    for turn, start in zip((1, 3), starts, strict=True):
        assert row.input_ids[:start] == sent(tokenizer, TALK[:turn]) == encode_prompt(tokenizer, TALK[:turn])
    assert not row.joined


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1), min_size=2, max_size=6
    )
)
@pytest.mark.parametrize("kind", ["byte_level", "marked_words"])
def test_whatever_is_said_the_tokens_are_those_of_the_template(kind, contents):
    tokenizer = MADE.setdefault(kind, KINDS[kind]())
    messages = turns(*contents[: len(contents) // 2 * 2])
    (row,) = encoded(tokenizer, messages) or [None]
    assert row.input_ids == whole(tokenizer, messages)
    for turn, start in zip(range(1, len(messages), 2), begins(row.labels), strict=True):
        before = sent(tokenizer, messages[:turn])
        assert row.input_ids[:start] == before or row.joined


def test_the_end_of_an_answer_is_learnt_and_the_line_break_after_it_is_not():
    tokenizer = byte_level()
    (row,) = encoded(tokenizer, TALK)
    assert learned(tokenizer, row) == ["Mira has the lamp.<|im_end|>", "Tomas has it<|im_end|>"]


def test_a_token_that_spans_prompt_and_answer_is_seen(tmp_path):
    tokenizer = byte_level(CHATML)
    talk = turns("Who has the lamp?", "\nMira")  # the header's line break and the answer's are one token
    (row,) = encoded(tokenizer, talk)
    start = begins(row.labels)[0]
    assert row.input_ids == whole(tokenizer, talk)
    assert row.joined
    assert row.input_ids[:start] != sent(tokenizer, talk[:1])
    assert not encoded(tokenizer, turns("Who has the lamp?", "Mira"))[0].joined
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    with pytest.warns(UserWarning, match="in 1 of the 1 train rows .* is not the prompt that a server sends"):
        load(DataConfig.parse({"train": "a.jsonl", "validation_fraction": 0}), tokenizer, base_dir=tmp_path)


def test_a_header_that_is_cut_otherwise_when_words_follow_is_seen():
    """GPT-2's way of cutting text takes two line breaks as one word only where nothing follows."""
    (row,) = encoded(byte_level(TEMPLATES["headers"], older=True), TALK)
    assert row.joined
    assert row.input_ids[: begins(row.labels)[0]] != sent(byte_level(TEMPLATES["headers"], older=True), TALK[:1])


def test_a_template_that_takes_contents_in_parts_is_given_parts():
    parts = BARE.replace(
        "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    )
    row, plain = encoded(byte_level(parts), TALK)[0], encoded(byte_level(BARE), TALK)[0]
    assert (row.input_ids, row.labels) == (plain.input_ids, plain.labels)
    marked = (
        "{{ messages | length }}{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content[0].text }}</s>{% else %}"
        "A:{% generation %}{{ m.content[0].text }}</s>{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    assert learned(byte_level(marked), encoded(byte_level(marked), TALK)[0]) == [
        "Mira has the lamp.</s>",
        "Tomas has it</s>",
    ]


def test_a_slow_tokenizer_that_joins_prompt_and_answer_is_refused():
    tokenizer = slow(CHATML.replace("assistant\n", "assistant:").replace("{{ m.role }}\n", "{{ m.role }}:"), [":y"])
    assert encoded(tokenizer, turns("hi", "no"))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 7: this tokenizer is a slow one"):
        encoded(tokenizer, turns("hi", "yes"))


def test_a_template_that_forgets_is_refused_and_two_ways_are_offered():
    tokenizer = byte_level(FORGETS)
    talk = [dict(message) for message in TALK]
    talk[1]["reasoning_content"] = "who was it"
    talk[3]["reasoning_content"] = "the other one"
    with pytest.raises(DataError, match=r"line 7: .*data\.answers=each .*data\.answers=last"):
        encoded(tokenizer, talk)
    (last,) = encoded(tokenizer, talk, "last")
    assert learned(tokenizer, last) == ["<think>the other one</think>Tomas has it<|im_end|>"]
    first, second = encoded(tokenizer, talk, "each")
    assert learned(tokenizer, first) == ["<think>who was it</think>Mira has the lamp.<|im_end|>"]
    assert second == last
    for row, turn in ((first, 1), (second, 3)):
        assert row.input_ids[: begins(row.labels)[0]] == sent(tokenizer, talk[:turn])
        assert row.input_ids == whole(tokenizer, talk[: turn + 1])


def test_a_template_that_marks_what_the_assistant_says_is_believed():
    marked = FORGETS.replace("{% if m.reasoning_content", "{% generation %}{% if m.reasoning_content")
    marked = marked.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endgeneration %}{{ br }}{% endfor %}")
    marked = "{% set br = '\n' %}" + marked.replace("<|im_start|>{{ m.role }}\n", "{{ '<|im_start|>' + m.role + br }}")
    marked = marked.replace(  # what users say is not marked
        "{% generation %}", "{% if m.role == 'user' %}{{ m.content + '<|im_end|>' }}{% else %}{% generation %}"
    ).replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
    tokenizer = byte_level(marked)
    talk = [dict(message) for message in TALK]
    talk[1]["reasoning_content"] = talk[3]["reasoning_content"] = "hm"
    (row,) = encoded(tokenizer, talk)
    assert learned(tokenizer, row) == ["Mira has the lamp.<|im_end|>", "<think>hm</think>Tomas has it<|im_end|>"]
    mask = tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)["assistant_masks"]
    assert [label != IGNORE for label in row.labels] == [bool(bit) for bit in mask]


def test_a_template_without_a_system_role_says_so_and_folds_it():
    tokenizer = byte_level(BRACKETS)
    talk = ({"role": "system", "content": "Be brief."}, *TALK)
    with pytest.raises(DataError, match=r"line 7: .*it takes no system message: set data\.system=fold"):
        encoded(tokenizer, talk)
    (row,) = encoded(tokenizer, talk, "all", True)
    folded = fold_system(talk)
    assert folded[0]["content"] == "Be brief.\n\nWho has the lamp?"
    assert row.input_ids == whole(tokenizer, folded)
    assert learned(tokenizer, row) == [" Mira has the lamp.</s>", " Tomas has it</s>"]


def test_a_template_that_drops_the_system_message_without_a_word_is_refused():
    tokenizer = byte_level(BARE.replace("in messages", "in messages if m.role != 'system'"))
    with pytest.raises(DataError, match=r"line 7: the chat template leaves the system message out"):
        encoded(tokenizer, ({"role": "system", "content": "Be brief."}, *TALK))


KNOWS = BARE.replace("in messages", "in messages if m.role in ['system', 'user', 'assistant'] and not m.tool_calls")
CALLED = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("talk", "what"),
    [
        (({"role": "developer", "content": "Be brief."}, *TALK), "the developer message out: put it before"),
        ((*TALK[:3], {"role": "tool", "content": "Mira"}, TALK[3]), "message 4, of the tool, out: give a template"),
        ((TALK[0], CALLED, TALK[3]), "message 2, of the assistant, whose text stands beside tool calls, out"),
    ],
)
def test_a_message_of_which_the_template_writes_nothing_is_refused(talk, what):
    tokenizer = byte_level(KNOWS)
    assert encoded(tokenizer, ({"role": "system", "content": "Be brief."}, *TALK))
    with pytest.raises(DataError, match=f"line 7: the chat template leaves {what}"):
        encoded(tokenizer, talk)
    with pytest.raises(DataError, match=f"the prompt: the chat template leaves {what}"):
        encode_prompt(tokenizer, talk)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_may_open_with_the_assistant(kind):
    tokenizer = KINDS[kind]()
    talk = ({"role": "assistant", "content": "Hello!"}, *TALK)
    (row,) = encoded(tokenizer, talk)
    assert row.input_ids == whole(tokenizer, talk)
    assert learned(tokenizer, row)[0].replace(" ", "") == "Hello!<|im_end|>"
    with pytest.raises(DataError, match="begin with the assistant: put the user's message"):
        encoded(KINDS[kind](BRACKETS), talk)


def test_only_messages_that_are_to_be_learnt_are():
    tokenizer = byte_level()
    (row,) = encoded(tokenizer, TALK, learned=(False, False, False, True))
    assert learned(tokenizer, row) == ["Tomas has it<|im_end|>"]
    assert row.input_ids == whole(tokenizer, TALK)
    (row,) = encoded(tokenizer, TALK, learned=(False, True, False, False))
    assert row.input_ids == whole(tokenizer, TALK[:2])


CALL = [{"type": "function", "function": {"name": "look", "arguments": {"where": "river"}}}]


def test_tool_calls_and_tools_reach_the_template_or_are_refused():
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    talk = (
        {"role": "user", "content": "Where is the boat?"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "at the river", "tool_call_id": "1"},
        {"role": "assistant", "content": "At the river."},
    )
    tokenizer = byte_level(TOOLS)
    (row,) = encoded(tokenizer, talk, tools=tools)
    assert row.input_ids == whole(tokenizer, talk, tools)
    assert learned(tokenizer, row) == [
        '<tool_call>look {"where": "river"}</tool_call><|im_end|>',
        "At the river.<|im_end|>",
    ]
    assert row.input_ids[: begins(row.labels)[1]] == sent(tokenizer, talk[:3], tools)
    with pytest.raises(
        DataError, match=r"line 7: a message of the assistant has the key 'tool_calls', which the chat template leaves"
    ):
        encoded(byte_level(), talk)
    with pytest.raises(DataError, match=r"line 7: it has tools, which the chat template leaves out"):
        encoded(byte_level(), TALK, tools=tools)
    named = ({"role": "user", "content": "hi", "name": "Mira"}, TALK[1])
    with pytest.raises(DataError, match=r"has the key 'name', .*data\.ignore=name"):
        encoded(byte_level(), named)


@pytest.mark.parametrize(
    "written",
    ["c.function.arguments", "'' + c.function.arguments", "c.function.arguments | tojson", "c.function | tojson"],
)
def test_arguments_of_calls_are_json_however_the_template_takes_them(written):
    """Some write them as JSON, some put down what they are given, which Python would write in quotes of its own."""
    tokenizer = byte_level(TOOLS.replace("c.function.arguments | tojson", written))
    (row,) = encoded(tokenizer, (TALK[0], {"role": "assistant", "content": "", "tool_calls": CALL}))
    assert '{"where": "river"}' in learned(tokenizer, row)[0]


SHIPPED = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_that_are_in_use(path):
    """Those that trl brings: each gives the tokens of one tokenisation with the right masks, or is refused in a sentence."""
    tokenizer = byte_level(path.read_text(encoding="utf-8"))
    for answers in ("all", "each"):
        try:
            rows = encoded(tokenizer, TALK, answers)
        except DataError as error:
            refused = str(error)
            assert "line 7: the chat template" in refused
            continue
        for number, row in enumerate(rows):
            messages = TALK if answers == "all" else TALK[: 2 * number + 2]
            messages = in_parts(messages) if takes_parts(tokenizer) else messages
            ids = whole(tokenizer, messages)
            assert row.input_ids[: len(ids)] == ids
            text = "".join(learned(tokenizer, row))
            assert "lamp?" not in text
            assert "rope" not in text
            assert ("Tomas has it" if answers == "all" or number else "Mira has the lamp.") in text
            if answers == "each" and not row.joined:
                assert row.input_ids[: begins(row.labels)[0]] == sent(tokenizer, messages[:-1])
