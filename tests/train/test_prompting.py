"""What a run was trained on decides what a prompt becomes, wherever one is given."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import weftlora
from weftlora.errors import AdapterError, ConfigError, DataError
from weftlora.runs.run import Run
from weftlora.train import evaluation
from weftlora.train.prompting import Prompting, end_of_turn, read_messages

Make = Callable[..., dict[str, Any]]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose turns end with </s>."""
    folder = tiny.llama(tmp_path_factory.mktemp("chat") / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spoken(chat_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on conversations: the answer is the letter of the question, twice."""
    folder = tmp_path_factory.mktemp("spoken")
    rows = [
        {
            "messages": [
                {"role": "user", "content": chr(97 + n % 8)},
                {"role": "assistant", "content": 2 * chr(97 + n % 8)},
            ]
        }
        for n in range(64)
    ]
    return weftlora.train(
        {
            "model": str(chat_base),
            "data": {"train": str(tiny.write_rows(folder / "chat.jsonl", rows)), "validation_fraction": 0},  # type: ignore[arg-type]
            "adapter": {"recipe": "lora", "r": 8},
            "train": {"steps": 80, "batch_size": 16, "lr": 2e-2, "save_every": 0, "samples": "c"},
            "out": str(folder / "run"),
        }
    )


def test_a_chat_adapter_answers(spoken: Run) -> None:
    """The prompt is the user's turn of the template that it was trained in; as bare text it means nothing to it."""
    found = weftlora.generate(spoken, "c", max_new_tokens=6)
    assert (found.text, found.finished, found.note) == ("cc", True, "")
    assert found.given == "u c</s>a "
    (sample,) = spoken.samples()
    assert (sample["step"], sample["given"], sample["text"], sample["finished"]) == (80, found.given, "cc", True)
    raw = weftlora.generate(spoken, "c", raw=True, max_new_tokens=6)
    assert raw.given == "c"
    assert raw.text != "cc"
    assert weftlora.generate(spoken, "u c</s>a ", raw=True, max_new_tokens=6).given.endswith("u c</s>a ")


def test_the_adapter_folder_of_a_run_answers_as_the_run_wherever_it_goes(
    spoken: Run, chat_base: Path, tmp_path: Path
) -> None:
    assert weftlora.generate(spoken.adapter_folder, "c", max_new_tokens=6).text == "cc"
    alone = shutil.copytree(spoken.adapter_folder, tmp_path / "alone")
    assert weftlora.generate(alone, "c", max_new_tokens=6).text == "cc"
    exported = weftlora.export_lora(spoken.folder, tmp_path / "out" / "lora", verify=False).folder
    again = weftlora.export_lora(alone, tmp_path / "again", verify=False).folder
    for folder in (exported, again):
        assert weftlora.generate(folder, "c", base=str(chat_base), max_new_tokens=6).text == "cc"
    (alone / "prompts.json").write_text('{"format": "chat", "prompt_template": 3, "system": "keep"}')
    with pytest.raises(AdapterError, match=r"prompts\.json cannot be read"):
        weftlora.generate(alone, "c")
    (alone / "prompts.json").unlink()
    assert weftlora.generate(alone, "c", max_new_tokens=6).given == "c"  # nobody knows; messages still work
    messages = [{"role": "user", "content": "c"}]
    assert weftlora.generate(alone, messages, max_new_tokens=6).text == "cc"
    assert weftlora.generate(alone, "c", system="b", max_new_tokens=6).given == "s b</s>u c</s>a "


def test_a_system_turn_and_whole_conversations(spoken: Run) -> None:
    assert weftlora.generate(spoken, "c", system="be kind", max_new_tokens=1).given == "s be kind</s>u c</s>a "
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "aa"},
        {"role": "user", "content": "b"},
    ]
    assert weftlora.generate(spoken, talk, max_new_tokens=1).given == "u a</s>a aa</s>u b</s>a "
    with pytest.raises(ConfigError, match="begin with a system turn, and another is given"):
        weftlora.generate(spoken, [{"role": "system", "content": "x"}, *talk], system="y")
    with pytest.raises(DataError, match="did you mean 'user'"):
        weftlora.generate(spoken, [{"role": "usr", "content": "x"}])
    with pytest.raises(DataError, match="the prompt: it has tools, which the chat template leaves out"):
        weftlora.generate(spoken, talk, tools=[{"name": "look"}])
    with pytest.raises(ConfigError, match="tools are written by a chat template, and this prompt is a text"):
        weftlora.generate(spoken, "a", raw=True, tools=[{"name": "look"}])
    with pytest.raises(ConfigError, match="raw takes a text as it is"):
        weftlora.generate(spoken, talk, raw=True)


def test_a_system_turn_goes_where_the_rows_had_it() -> None:
    talk = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "cc"}, {"role": "user", "content": "d"}]
    folded = Prompting("chat", fold=True)
    assert folded.written("c", system="be kind") == [{"role": "user", "content": "be kind\n\nc"}]
    assert folded.written(talk, system="s") == [{"role": "user", "content": "s\n\nc"}, *talk[1:]]
    assert folded.written([{"role": "system", "content": "s"}, *talk])[0] == {"role": "user", "content": "s\n\nc"}
    assert folded.written(talk) == talk


def test_a_run_says_whether_its_rows_had_a_system_turn_folded(spoken: Run) -> None:
    recipe = {**spoken.recipe, "data": {**spoken.recipe["data"], "system": "fold"}}
    assert Prompting.of(dataclasses.replace(spoken, recipe=recipe)).fold
    assert not Prompting.of(spoken).fold


def test_a_conversation_remembers(spoken: Run) -> None:
    talk = weftlora.chat(spoken, max_new_tokens=6)
    assert talk.remembers
    assert talk.say("c").text == "cc"
    assert talk.say("d").given == "u c</s>a cc</s>u d</s>a "
    talk.forget()
    assert talk.say("e").given == "u e</s>a "
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_evaluation_asks_as_training_did(spoken: Run, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": 2 * x}]} for x in "abcdefgh"]
    file = tiny.write_rows(tmp_path / "test.jsonl", rows)  # type: ignore[arg-type]
    assert weftlora.evaluate(spoken, f"data.test={file}").scores.exact_match == 1.0


@pytest.mark.parametrize(("raw", "why"), [(True, "leave out --raw"), (False, "`weftlora data` on the run")])
def test_an_answer_that_ends_at_once_is_said(
    spoken: Run, raw: bool, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluation, "complete", lambda *given: [[2]])
    found = weftlora.generate(spoken, "c", raw=raw)
    assert (found.text, found.finished) == ("", True)
    assert found.note.startswith("the answer is empty, because generation ended at once: ")
    assert why in found.note
    assert found.note in [record.getMessage() for record in caplog.records]


def test_prompt_rows_get_the_prompt_template(recipe: Make, tmp_path: Path) -> None:
    made = recipe()
    rows = [{"title": f"{chr(97 + n)}", "completion": "b"} for n in range(20)]
    made["data"] = {
        "train": str(tiny.write_rows(tmp_path / "titles.jsonl", rows)),
        "prompt_template": "to {title} ->",
    }
    run = weftlora.train(made)
    assert weftlora.generate(run, "c", max_new_tokens=1).given == "to c ->"
    assert weftlora.generate(run, {"title": "c"}, max_new_tokens=1).given == "to c ->"
    assert weftlora.generate(run, "c", raw=True, max_new_tokens=1).given == "c"
    assert not weftlora.chat(run).remembers
    with pytest.raises(ConfigError, match="did you mean 'title'"):
        weftlora.generate(run, {"title": "c", "titel": "d"})
    with pytest.raises(ConfigError, match="trained on prompts and answers: put it into the prompt"):
        weftlora.generate(run, "c", system="be kind")
    with pytest.raises(ConfigError, match="trained on prompts and answers: give the prompt as one text"):
        weftlora.generate(run, [{"role": "user", "content": "c"}])


def test_a_template_of_several_columns_asks_for_them() -> None:
    how = Prompting("prompt_completion", "{a}: {b} {a}")
    assert how.written({"a": 1, "b": "x"}) == "1: x 1"
    assert how.written('{"a": "1", "b": "x"}') == "1: x 1"
    with pytest.raises(ConfigError, match=r"made of the columns a, b \(data\.prompt_template\)"):
        how.written("x")
    with pytest.raises(ConfigError, match="lacks the column 'b'"):
        how.written({"a": "1"})


@pytest.mark.parametrize("form", ["prompt_completion", "text", None])
def test_text_stays_text(form: str | None) -> None:
    assert Prompting(form).written('{"a": 1}') == '{"a": 1}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "holds no list of messages"),
        ("[]", "no message to answer"),
        ("[1]", "the prompt: message 1 .* lacks a text role"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_file_of_messages(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    said = [{"from": "human", "value": [{"type": "text", "text": "a"}]}]  # as rows may have it
    file.write_text(json.dumps({"messages": said, "tools": '[{"name": "look"}]'}))
    assert read_messages(file) == ([{"role": "user", "content": "a"}], [{"name": "look"}])
    file.write_text(content)
    with pytest.raises(DataError, match=says):
        read_messages(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_messages(tmp_path / "none.json")


@pytest.mark.parametrize("template", ["no column", "{a.b}", 3])
def test_a_template_that_no_run_wrote_is_refused(template: Any, tmp_path: Path) -> None:
    said = {"format": "prompt_completion", "prompt_template": template, "system": None}
    (tmp_path / "prompts.json").write_text(json.dumps(said))
    with pytest.raises(AdapterError, match=r"prompts.json cannot be read .*delete it"):
        Prompting.of_adapter(tmp_path)


def test_the_token_that_ends_a_turn(chat_base: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(chat_base)
    assert end_of_turn(tokenizer) == 2
    tokenizer.chat_template = TEMPLATE.replace("</s>", "<end> ")
    assert end_of_turn(tokenizer) is None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<end>")
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


def test_a_model_by_itself_is_talked_to_in_its_chat_template(chat_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    find = evaluation.base_model.find
    monkeypatch.setattr(evaluation.base_model, "find", lambda wanted, at: read.append(wanted.path) or find(wanted, at))
    talk = weftlora.chat(chat_base, system="be kind", max_new_tokens=1)
    assert talk.remembers
    assert talk.say("c").given == "s be kind</s>u c</s>a "
    assert read == [str(chat_base)], "config and tokenizer are read once"
    with pytest.raises(ConfigError, match="is a model, not an adapter, so it has no other base"):
        weftlora.chat(chat_base, base="demo")
