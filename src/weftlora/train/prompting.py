"""What a prompt becomes: what the rows were that a run was trained on.

    conversations     the user's turn in the chat template, after a system turn where one is given; or whole messages. A run whose
                      rows had it folded into the first user's turn (data.system) gets it there
    prompt rows       data.prompt_template filled in, or the prompt as it stands
    text              the text as it stands
    raw               the text as it stands, whatever the run was trained on

A model that learned to answer in its chat template has learned nothing about bare text: it ends its answer at once, or babbles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from weftlora.data import encode_prompt
from weftlora.data.config import template_columns
from weftlora.data.encode import as_text, fold_system, render
from weftlora.data.examples import messages_of, tools_of
from weftlora.disk.ownership import PROMPTS
from weftlora.errors import AdapterError, ConfigError, DataError, ModelError, suggest
from weftlora.foreign_text import from_json
from weftlora.runs.load import Trained, recipe_of
from weftlora.runs.run import Run
from weftlora.settings import is_whole

Message = dict[str, Any]
Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text, the messages of a conversation, or the columns of a row."""

_WORDS = {"chat": "conversations", "prompt_completion": "prompts and answers", "text": "plain text"}


@dataclass(frozen=True)
class Prompting:
    """How the rows of a run were written out; `form` is None where nobody knows, as of an adapter folder without its run."""

    form: str | None = None
    template: str | None = None
    fold: bool = False
    """Whether a system turn goes before the text of the first user's, as `data.system: fold` has it."""
    max_length: int | None = None
    """What an adapter folder says its rows were held to."""
    labels: tuple[str, ...] = ()
    """The classes that an adapter folder says it tells apart."""

    @classmethod
    def of(cls, run: Run | None) -> Prompting:
        """What a run's record says."""
        if run is None:
            return cls()
        data = recipe_of(run).data
        return cls(run.data.get("format"), data.prompt_template, data.system == "fold")

    @classmethod
    def of_adapter(cls, folder: Path) -> Prompting:
        """What an adapter folder says that was taken out of its run.

        Raises:
            AdapterError: its `prompts.json` is damaged.
        """
        file = folder / PROMPTS
        if not file.is_file():
            return cls()
        try:
            said = from_json(file.read_text(encoding="utf-8"))
            form, template, fold = said["format"], said["prompt_template"], said["system"] == "fold"
            length, labels = said.get("max_length"), said.get("labels") or []
            known = form in (*_WORDS, "classification", None) and isinstance(template, str | None)
            counted = length is None or is_whole(length, 1)
            if not (known and counted and isinstance(labels, list) and all(isinstance(each, str) for each in labels)):
                raise ValueError("it holds other values than weftlora writes")
            if template is not None and not template_columns(template):
                raise ValueError("its template names no column")
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise AdapterError(
                f"{file} cannot be read ({type(error).__name__}): delete it, and give prompts with --messages or --raw."
            ) from None
        return cls(form, template, fold, length, tuple(labels))

    @property
    def trained_on(self) -> str:
        """What the run was trained on, in words."""
        return _WORDS.get(self.form or "", "something that this folder does not say")

    def written(self, prompt: Prompt, system: str | None = None, raw: bool = False) -> str | list[Message]:
        """The text or the messages that a prompt stands for.

        Raises:
            ConfigError: a system turn, messages or columns for a run that has no place for them, or a template with unfilled ones.
        """
        if raw:
            if not isinstance(prompt, str) or system is not None:
                raise ConfigError("raw takes a text as it is: leave out the messages and the system turn.")
            return prompt
        if isinstance(prompt, Mapping):
            return self._filled(prompt)
        if not isinstance(prompt, str):
            return self._conversation(list(prompt), system)
        if self.form == "chat" or (self.form is None and system is not None):
            return self._conversation([{"role": "user", "content": prompt}], system)
        if system is not None:
            raise ConfigError(
                f"a system turn is for runs that were trained on conversations, and this one was trained on {self.trained_on}: put it "
                "into the prompt."
            )
        if self.template is None:
            return prompt
        columns = list(dict.fromkeys(template_columns(self.template)))
        if len(columns) > 1:
            with suppress(ValueError):
                if isinstance(values := from_json(prompt, exact=True), dict):
                    return self._filled(values)
            raise ConfigError(
                f"this run's prompts are made of the columns {', '.join(columns)} (data.prompt_template): give them as JSON, such as "
                f"'{json.dumps(dict.fromkeys(columns, '...'))}', or the finished text with --raw."
            )
        return self._filled({columns[0]: prompt})

    def _filled(self, values: Mapping[str, Any]) -> str:
        if self.form == "chat" or self.template is None:
            raise ConfigError(
                f"a prompt of several columns fills a data.prompt_template, and this run was trained on {self.trained_on}, without "
                "one: give the whole prompt as one string."
            )
        columns = list(dict.fromkeys(template_columns(self.template)))
        for name in columns:
            if name not in values:
                raise ConfigError(
                    f"the prompt lacks the column {name!r} of data.prompt_template: give all of {columns}."
                )
        for name in values:
            if name not in columns:
                raise ConfigError(f"data.prompt_template has no column {name!r}: {suggest(str(name), columns)}")
        return self.template.format(**values)

    def _conversation(self, messages: Sequence[Mapping[str, Any]], system: str | None) -> list[Message]:
        if self.form in ("prompt_completion", "text"):
            raise ConfigError(
                f"messages are for runs that were trained on conversations, and this one was trained on {self.trained_on}: give the "
                "prompt as one text."
            )
        turns = checked(messages)
        if system is not None:
            if turns[0]["role"] in ("system", "developer"):
                raise ConfigError("the messages begin with a system turn, and another is given: keep one of the two.")
            turns = [{"role": "system", "content": system}, *turns]
        return list(fold_system(turns)) if self.fold else turns

    def reason(self, tokenizer: PreTrainedTokenizerBase, raw: bool) -> str:
        """Why an answer may have ended at once, as far as that is known, and what to do."""
        if self.form == "chat" and raw:
            return (
                "this run was trained on conversations, and a raw prompt is not in its chat template: leave out --raw"
            )
        if self.form is None and getattr(tokenizer, "chat_template", None):
            return (
                "this folder does not say what it was trained on, and its tokenizer has a chat template: give the run's folder, or "
                "the prompt as --messages"
            )
        if self.form == "text":
            return "this run was trained on whole texts, which may end after a text like this"
        return "why is not known; `weftlora data` on the run shows what its prompts look like"


def checked(messages: Sequence[Any]) -> list[Message]:
    """Messages that an answer may follow, in the form that those of rows have. Raises DataError where they are none."""
    if not messages:
        raise DataError("there is no message to answer: give a list of messages with role and content.")
    return messages_of([dict(each) if isinstance(each, Mapping) else each for each in messages], "the prompt")


def read_messages(path: Path, text: str | None = None) -> tuple[list[Message], list[Any] | None]:
    """The messages and the tools of a JSON file: a list of messages, or an object with `messages` and `tools`. Raises DataError."""
    try:
        found = from_json(path.read_text(encoding="utf-8") if text is None else text, exact=True)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its path.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): write a list of messages with role and content.") from None
    tools: Any = None
    if isinstance(found, dict):
        tools, found = found.get("tools"), found.get("messages")
    if not isinstance(found, list):
        raise DataError(f"{path} holds no list of messages: write [{{'role': 'user', 'content': '...'}}].")
    return checked(found), tools_of(tools, str(path))


def prompt_ids(trained: Trained, written: str | list[Message], tools: list[Any] | None = None) -> list[int]:
    """The tokens of what `Prompting.written` gave, as training made them.

    Raises:
        DataError: bytes that are no text; messages or tools that the chat template refuses or leaves out.
    """
    if trained.task == "seq2seq" and isinstance(written, str):
        return list(trained.base.tokenizer(as_text(written))["input_ids"])
    return encode_prompt(trained.base.tokenizer, written, tools)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends the assistant's turn; None where it has none."""
    mark = "weft"
    turns = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
    try:
        [whole] = render(tokenizer, [turns], ["the chat template"], open_answer=False)
    except (DataError, ModelError):
        return None
    _, _, tail = whole.rpartition(mark)
    ids = list(tokenizer(tail, add_special_tokens=False)["input_ids"]) if tail else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    return ids[0] if ids and ids[0] in special else None


def stop_at_turns(trained: Trained, form: str | None) -> None:
    """Let answers of a run that was trained on conversations end where the template ends a turn, whatever the base ends texts with."""
    settings: Any = getattr(trained.model, "generation_config", None)
    if form != "chat" or settings is None or (end := end_of_turn(trained.base.tokenizer)) is None:
        return
    own = settings.eos_token_id
    named = own if isinstance(own, list) else [] if own is None else [own]
    if end not in named:
        settings.eos_token_id = [*named, end]
