"""The `data:` section of a recipe file, and what every section of one is.

data: demo                                  # the bundled tasks
data: rows.jsonl                            # format and columns found from all rows
data: {train: "${WEFT_DATA}/tasks/sst2/train.tsv", quoting: none, fields: {text: sentence}}
data: {train: {chats.jsonl.gz: 1, maths.parquet: 0.5}}          # several files, the second at half weight
data: {train: "owner/name:config", split: train}                # a data set of the Hugging Face hub
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import to_jsonable_python

from weftlora.data.paths import resolve_path
from weftlora.errors import ConfigError, DataError, unknown_key

DEMO = "demo"
SPLITS = ("train", "validation", "test")
HUB = re.compile(r"(?:hub:)?(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")
"""A data set of the hub: `name`, `owner/name`, either with `:config`. What is on disk goes first; `hub:` in front leaves no doubt."""
Written = str | list[str] | dict[str, Annotated[float, Field(gt=0, le=1000)]]
"""How a recipe names rows: one file, folder or data set; several; or several with a weight each."""
Task = Literal["causal", "seq2seq", "classification"]
"""What a model is trained to do: continue a text, answer another one, or name its class."""
Format = Literal["prompt_completion", "chat", "text", "classification"]


class RecipeSection(BaseModel):
    """Base of every section of a recipe file: frozen, no unknown keys (the nearest valid one is named), no strings read as numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)
    where: ClassVar[str] = "this section"

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise unknown_key(str(key), cls.model_fields, cls.where)
        return data

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Validate `data`; a failure is one `ConfigError` sentence naming the field and the value given."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
                raise cause from None
            field = ".".join(cls._keys(first["loc"])) or cls.where
            if first["type"] == "missing":
                raise ConfigError(f"{cls.where} lacks {field}: add it.") from None
            alike = [each for each in error.errors() if cls._keys(each["loc"]) == cls._keys(first["loc"])]
            nearest = max(
                alike, key=lambda each: len(each["loc"])
            )  # of several kinds of value, the one that fits furthest
            raise ConfigError(
                f"{cls.where}: {field}={nearest.get('input')!r} is not valid: {_it(nearest['msg'])}."
            ) from None

    def with_newer_keys(self, dump: Mapping[str, Any]) -> dict[str, Any]:
        """`dump`, which an older version may have made of such a section, with the defaults of keys that did not exist then."""
        whole = dict(dump)
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in whole and not field.is_required():
                whole[name] = to_jsonable_python(field.get_default(call_default_factory=True))
            elif isinstance(value, RecipeSection) and isinstance(whole.get(name), Mapping):
                whole[name] = value.with_newer_keys(whole[name])
        return whole

    @classmethod
    def _keys(cls, loc: Sequence[Any]) -> list[str]:
        """The keys of a recipe in the place of an error, without pydantic's words for the kinds of value that were tried."""
        keys: list[str] = []
        section: type[BaseModel] | None = cls
        for part in loc:
            if not isinstance(part, int):  # which is a place in a list
                if section is None or part not in section.model_fields:
                    break
                section = _section_in(section.model_fields[part].annotation)
            keys.append(str(part))
        return keys


def _it(said: str) -> str:
    """What pydantic says of an input, as the end of a sentence about it."""
    return f"it{said.removeprefix('Input')}" if said.startswith("Input should") else said


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that values of a field are, or hold in a list; None where there is none, or several kinds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [section for each in get_args(annotation) if (section := _section_in(each)) is not None]
    return found[0] if len(found) == 1 else None


class Fields(RecipeSection):
    """Role → column name. A role left out is looked for under its own name, then under the names of `rows.ALIASES`."""

    where: ClassVar[str] = "data.fields"

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    label: str | None = None
    domain: str | None = None


class DataConfig(RecipeSection):
    """Which rows to read, how to turn them into tokens, and how to split them.

    Paths are read relative to the recipe file's folder, with `~` and `${ENV}` expanded; `demo` is the embedded data
    (write `./demo` for a file of that name). What is no path is a data set of the hub, `owner/name` or `owner/name:config`.
    A folder, a data set or `demo` given as `train` also supplies the validation and test rows that are not given here;
    `split` names the split of it that is trained on. Several are given as a list, or with a weight each: a row of weight 2
    is seen twice in a pass, of weight 0.5 half the rows are, drawn with `seed`.

    Long rows (`truncate`; every cut is counted):
    - `prompt` (default): the start of the prompt is cut, the answer stays whole; a row whose answer alone does not
      fit is dropped. In a chat, the oldest turns are cut.
    - `completion`: the end of the row is cut, first the answer's; a row with no answer token left is dropped.
    - `drop`: the row is dropped.
    In a conversation, `answers` says what is learned: `all` of the assistant's messages, the `last` one, or `each` as a row of its
    own, after what stood before it. That is for chat templates that write earlier turns otherwise once a later one follows.
    `system: fold` puts a system message before the first user's, for templates that take none.

    `packing` puts several training rows into one of up to `max_length` tokens, none of which sees the others: no step is spent on
    padding. It is for causal models, and tried on the model before training.

    `ignore` names columns, and keys of messages, that are meant to be left out.

    A classified text is cut at its end unless `drop`. Plain text is never cut: a document longer than `max_length`
    becomes several rows. Encoder-decoder rows hold prompt and answer apart, each of at most `max_length`: `prompt`
    cuts the prompt's start and drops rows with a longer answer, `completion` cuts both at their ends.

    `.txt` files (`unit`): `block` gathers consecutive whole lines up to `max_length` tokens, `paragraph` reads one
    document between blank lines, `line` one per line. With `separator`, each line is `prompt<separator>completion`.

    `limit`, `validation_limit`, `test_limit` draw that many rows with `seed`, after the split, and keep file order.
    `split_on: prompt` keeps all rows with the same prompt on one side of the carved validation split, and of the test split.

    `processes` encode the rows of a large file side by side. What was read from one is kept in the user's cache folder, unless `cache`
    is false, and a second start on the same rows, settings and tokenizer takes it from there.
    """

    where: ClassVar[str] = "data"

    train: Written = DEMO
    validation: Written | None = None
    test: Written | None = None
    split: str | None = None
    format: Literal["auto", "prompt_completion", "chat", "text", "classification"] = "auto"
    fields: Fields = Fields()
    separator: str | None = Field(default=None, min_length=1)
    quoting: Literal["csv", "none"] = "csv"
    unit: Literal["block", "paragraph", "line"] = "block"
    prompt_template: str | None = None
    answers: Literal["all", "last", "each"] = "all"
    system: Literal["keep", "fold"] = "keep"
    ignore: tuple[str, ...] = ()
    packing: bool = False
    max_length: int = Field(default=512, ge=8, le=2**24)
    truncate: Literal["prompt", "completion", "drop"] = "prompt"
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    test_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Share of the training rows that become test rows, where none are given; they are taken first."""
    split_on: Literal["row", "prompt"] = "row"
    limit: int | None = Field(default=None, ge=1, le=2**62)
    validation_limit: int | None = Field(default=None, ge=1, le=2**62)
    test_limit: int | None = Field(default=None, ge=1, le=2**62)
    seed: int = Field(default=0, ge=0, lt=2**32)
    streaming: bool | None = None
    """Take the first rows of a data set of the hub as they come, not all of it; none does so where it is large and `limit` is set."""
    processes: int = Field(default=1, ge=1, le=256)
    cache: bool = True

    @classmethod
    def parse(cls, data: Any) -> Self:
        """As `RecipeSection.parse`; a bare string is short for `{train: <string>}`."""
        return super().parse({"train": data} if isinstance(data, str | list) else data)

    def check_files(self, base_dir: str | os.PathLike[str] | None = None) -> None:
        """Refuse a file that is not there. Raises DataError."""
        for written in (self.train, self.validation, self.test):
            for name, _ in named(written):
                if name != DEMO and hub_name(name, path := resolve_path(name, base_dir)) is None and not path.exists():
                    raise missing(path)

    @field_validator("train", "validation", "test")
    @classmethod
    def _something_named(cls, written: Written | None) -> Written | None:
        if written is not None and not len(written):
            raise ConfigError(f"data names no rows ({written!r}): give a path, a data set, or a list of them.")
        return written

    @field_validator("ignore", mode="before")
    @classmethod
    def _ignore_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @field_validator("prompt_template")
    @classmethod
    def _named_columns_only(cls, template: str | None) -> str | None:
        if template is not None and not template_columns(template):
            raise ConfigError(
                f"data.prompt_template={template!r} names no column: write the columns in braces, "
                "as in '{question} answer:'."
            )
        return template

    @model_validator(mode="after")
    def _chat_has_no_template(self) -> Self:
        if self.format == "chat" and self.prompt_template is not None:
            raise ConfigError("data.prompt_template does not go with format: chat, whose text is the chat template's.")
        return self


def named(written: Written | None) -> list[tuple[str, float]]:
    """What a recipe names, each with its weight.

    >>> named(["a.jsonl", "b.jsonl"])
    [('a.jsonl', 1.0), ('b.jsonl', 1.0)]
    """
    if written is None:
        return []
    if isinstance(written, str):
        return [(written, 1.0)]
    return [*written.items()] if isinstance(written, dict) else [(name, 1.0) for name in written]


def hub_name(written: str, path: Path) -> tuple[str, str | None] | None:
    """(name, config) of a data set of the hub; None where `written` is a path, which is `path`."""
    found = HUB.fullmatch(written)
    if written.startswith("hub:"):
        if found is None:
            raise ConfigError(f"{written!r} names no data set: write hub:owner/name, or hub:owner/name:config.")
    elif found is None or path.exists() or written[0] in ".-" or is_file_name(written):
        return None
    elif "/" not in written and ":" not in written:
        return None  # a bare word is far more often a folder that is not there
    return found["name"], found["config"]


ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")
"""The kinds of file that are read, each also compressed with gzip (.gz), in any case."""


def ending(path: str | Path) -> str:
    """The kind of a file by its name: in lower case, without .gz.

    >>> ending("ROWS.JSONL.gz")
    '.jsonl'
    """
    return Path(str(path).lower().removesuffix(".gz")).suffix


def is_file_name(written: str) -> bool:
    """Whether a name is that of a file that we read."""
    return ending(written) in ENDINGS


def missing(path: Path) -> DataError:
    """The error for a data file that is not there."""
    return DataError(f"the data file {path} does not exist: check the path in the data section.")


def template_columns(template: str) -> list[str]:
    """The column names in `template`, in order. Raises ConfigError on a template that is not plain `{column}` text."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(
            f"data.prompt_template={template!r} is not a valid template ({error}): write {{column}} for a column "
            "and {{ }} for literal braces."
        ) from None
    names = [str(name) for _, name, _, _ in parts]
    for name, (_, _, form, conversion) in zip(names, parts, strict=True):
        if form or conversion:  # a width may be as large as memory
            raise ConfigError(
                f"data.prompt_template={template!r} has a format after {{{name}}}: columns are written as they are, so leave it out."
            )
        if not name or any(mark in name for mark in ".[") or name.isdigit():
            raise ConfigError(
                f"data.prompt_template={template!r} has {{{name}}}: only plain column names may stand in braces."
            )
    return names
