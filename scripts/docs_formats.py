"""The tables of docs/formats.md: rows and chat templates as people have them, read by weftlora, with what is learned of each.

Nothing in the tables is written by hand but the rows and the templates themselves; what a model is given comes from `weftlora.data`.
"""

from __future__ import annotations

import json
import string
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "+1?"},
    {"role": "assistant", "content": "5"},
]
BRIEF = [{"role": "system", "content": "Be brief."}, *TALK[:2]]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOL = {"type": "function", "function": {"name": "add"}}


def _open(header: str) -> str:
    return "{% if add_generation_prompt %}" + header + "{% endif %}"


CHATML = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}" + _open("<|im_start|>assistant\n")
)
_ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
_FORGETFUL = (
    "{% set n = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > n.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + _open("<|im_start|>assistant\n")
)

_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    + _open("<start_of_turn>model\n")
)
_HARMONY = (
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}<|start|>assistant"
    "<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
    + _open("<|start|>assistant")
)


@dataclass(frozen=True)
class Case:
    """A row, with the settings beside it that it needs."""

    name: str
    row: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    template: str = CHATML
    task: str | None = None


ROWS = (
    Case("prompt and completion", {"prompt": "2+2=", "completion": "4"}),
    Case("instruction and output", {"instruction": "2+2=", "output": "4"}),
    Case("Alpaca", {"instruction": "Add.", "input": "2 2", "output": "4"}),
    Case("Alpaca without input", {"instruction": "Add 2 and 2.", "input": "", "output": "4"}),
    Case(
        "Alpaca with system and history",
        {"instruction": "+1?", "input": "", "output": "5", "system": "Be brief.", "history": [["2+2?", "4"]]},
    ),
    Case("Dolly", {"instruction": "Who?", "context": "Mira runs.", "response": "Mira", "category": "qa"}),
    Case("question and answer", {"question": "2+2?", "answer": "4"}),
    Case("question, context and answer", {"question": "Who?", "context": "Mira runs.", "answer": "Mira"}),
    Case("numbers as answers", {"question": "2+2?", "answer": 4}),
    Case("query and response", {"query": "2+2?", "response": "4"}),
    Case("source and target", {"source": "two", "target": "zwei"}),
    Case("a prompt of several columns", {"a": "2", "b": "3", "output": "5"}, {"prompt_template": "{a}+{b}="}),
    Case("OpenAI messages", {"messages": TALK}),
    Case("messages with a system message", {"messages": BRIEF}),
    Case("a system message in its own column", {"system": "Be brief.", "messages": TALK[:2]}),
    Case("OpenOrca", {"system_prompt": "Be brief.", "question": "2+2?", "response": "4"}),
    Case(
        "contents in parts",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, TALK[1]]},
    ),
    Case("ShareGPT", {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}),
    Case(
        "ShareGPT with calls",
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ]
        },
    ),
    Case(
        "tools and tool calls",
        {
            "tools": [TOOL],
            "messages": [
                TALK[0],
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "1"},
                TALK[1],
            ],
        },
    ),
    Case("weight of a message", {"messages": [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]}),
    Case("train flags", {"messages": [TALK[0], {**TALK[1], "train": False}, TALK[2], {**TALK[3], "train": True}]}),
    Case("reasoning", {"messages": [TALK[0], {**TALK[1], "reasoning_content": "count"}]}),
    Case("texts in turns", {"conversation": ["2+2?", "4"]}),
    Case(
        "a conversation that the assistant opens", {"messages": [{"role": "assistant", "content": "Yes?"}, *TALK[:2]]}
    ),
    Case("prompt and completion as messages", {"prompt": TALK[:3], "completion": TALK[3:]}),
    Case("preference, with a prompt", {"prompt": "2+2=", "chosen": "4", "rejected": "5"}),
    Case("preference, as texts", {"chosen": "2+2? It is 4", "rejected": "2+2? It is 5"}),
    Case("preference, as messages", {"chosen": TALK[:2], "rejected": [TALK[0], TALK[3]]}),
    Case("plain text", {"text": "Mira runs."}),
    Case("labelled text", {"text": "Mira runs.", "label": "sport"}),
)
TALKED = {"messages": TALK}
TEMPLATES = (
    Case("ChatML", TALKED),
    Case(
        "Llama 2",
        TALKED,
        template="{{ bos_token }}{% for m in messages %}"
        + _ALTERNATE
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
    ),
    Case(
        "Mistral",
        TALKED,
        template="{{ bos_token }}{% for m in messages %}"
        + _ALTERNATE
        + "{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    ),
    Case(
        "Llama 3",
        TALKED,
        template="{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>{% endfor %}" + _open("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ),
    Case(
        "Gemma",
        TALKED,
        template=_GEMMA,
    ),
    Case(
        "Phi 3",
        TALKED,
        template="{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        + _open("<|assistant|>\n"),
    ),
    Case(
        "Zephyr",
        TALKED,
        template="{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        + _open("<|assistant|>\n"),
    ),
    Case(
        "Vicuna",
        TALKED,
        template="{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>"
        "{% endif %}{% endfor %}" + _open("ASSISTANT:"),
    ),
    Case(
        "headings, no special token",
        TALKED,
        template="{% for m in messages %}### {{ 'Human' if m.role == 'user' else 'Assistant' }}: {{ m.content }}\n{% endfor %}"
        + _open("### Assistant:"),
    ),
    Case(
        "DeepSeek",
        TALKED,
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
        "{{ m.content }}</s>{% endif %}{% endfor %}" + _open("<|Assistant|>"),
    ),
    Case(
        "Command R",
        TALKED,
        template="{{ bos_token }}{% for m in messages %}<|START|><|{{ 'USER' if m.role == 'user' else 'CHATBOT' }}|>{{ m.content }}<|END|>"
        "{% endfor %}" + _open("<|START|><|CHATBOT|>"),
    ),
    Case(
        "Harmony (final channel)",
        TALKED,
        template=_HARMONY,
    ),
    Case("Harmony (final channel)", TALKED, {"answers": "each"}, template=_HARMONY),
    Case(
        "GLM 4",
        TALKED,
        template="[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        + _open("<|assistant|>\n"),
    ),
    Case(
        "answers marked by the template",
        TALKED,
        template="{% for m in messages %}{% if m.role == 'user' %}U:{{ m.content }}</s>{% else %}A:{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% endif %}{% endfor %}" + _open("A:"),
    ),
    Case(
        "contents in parts only",
        TALKED,
        template="{% for m in messages %}{{ m.role | capitalize }}:{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}</s>{% endfor %}" + _open("Assistant:"),
    ),
    Case("earlier turns rewritten", TALKED, template=_FORGETFUL),
    Case("earlier turns rewritten", TALKED, {"answers": "each"}, template=_FORGETFUL),
    Case("earlier turns rewritten", TALKED, {"answers": "last"}, template=_FORGETFUL),
    Case("no system role", {"messages": BRIEF}, template=_GEMMA),
    Case("no system role", {"messages": BRIEF}, {"system": "fold"}, template=_GEMMA),
)


def tokenizer() -> Any:
    """A token a letter, and one for every mark of the templates above."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = "im_start im_end start_header_id end_header_id eot_id end start message channel return User Assistant user assistant system"
    marks += " START END USER CHATBOT"
    special = ["<s>", "</s>", "<unk>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[gMASK]", "<sop>"]
    special += [f"<|{name}|>" for name in marks.split()]
    vocabulary = {token: number for number, token in enumerate([*special, *string.printable])}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    bare.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": special[3:]})
    return made


def outcome(case: Case) -> tuple[str, bool]:
    """What is learned of a row, as Markdown, and whether it was read; else what is said of it."""
    from weftlora.data import DataConfig, load, shown
    from weftlora.errors import WeftError

    held = tokenizer()
    held.chat_template = case.template
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        rows = [case.row] if "label" not in case.row else [case.row, {**case.row, "text": "Rain.", "label": "weather"}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        section = {"train": "rows.jsonl", "validation_fraction": 0.0, **case.settings}
        try:
            loaded = load(DataConfig.parse(section), held, base_dir=folder)
        except WeftError as error:
            return f"*refused:* {str(error).replace(f'{folder}/', '').replace('|', chr(92) + '|')}", False
    if loaded.labels is not None:
        first = next(iter(shown(loaded.train, held, 1)))
        return f"{_pieces(first)} → class {loaded.train[0]['completion']!r}", True
    return "<br>".join(_pieces(pieces) for pieces in shown(loaded.train, held, 3)), True


def _pieces(pieces: list[tuple[str, bool]]) -> str:
    return " ".join(f"**{_code(text)}**" if learned else _code(text) for text, learned in pieces)


def _code(text: str) -> str:
    return "`" + text.replace("\n", "↵").replace("|", "\\|") + "`"


def _setting(case: Case) -> str:
    return "".join(f"<br>`{key}: {value}`" for key, value in case.settings.items())


def rows_table() -> str:
    """Rows, with the ChatML template where they are conversations."""
    lines = ["| rows | for example | what the model is given, **what it learns** |", "| --- | --- | --- |"]
    for case in ROWS:
        lines.append(f"| {case.name}{_setting(case)} | {_code(json.dumps(case.row))} | {outcome(case)[0]} |")
    return "\n".join(lines)


def templates_table() -> str:
    """Chat templates, with one conversation."""
    lines = ["| template | what the model is given, **what it learns** |", "| --- | --- |"]
    for case in TEMPLATES:
        lines.append(f"| {case.name}{_setting(case)} | {outcome(case)[0]} |")
    return "\n".join(lines)
