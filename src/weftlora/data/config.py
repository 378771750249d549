"""The `data:` section of a recipe file.

data: demo                                  # the bundled tasks
data: rows.jsonl                            # format and columns found from the first row
data: {train: "${WEFT_DATA}/tasks/sst2/train.tsv", quoting: none, fields: {text: sentence}}
"""

from __future__ import annotations

import os
import string
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from weftlora.data.paths import resolve_path
from weftlora.errors import ConfigError, DataError
from weftlora.sections import RecipeSection

DEMO = "demo"
Task = Literal["causal", "seq2seq", "classification"]
"""What a model is trained to do: continue a text, answer another one, or name its class."""
Format = Literal["prompt_completion", "chat", "text", "classification"]


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
    (write `./demo` for a file of that name). A `DatasetDict` folder or `demo` given as `train` also supplies the
    validation and test rows that are not given here.

    Long rows (`truncate`; every cut is counted):
    - `prompt` (default): the start of the prompt is cut, the answer stays whole; a row whose answer alone does not
      fit is dropped. In a chat, the oldest turns are cut.
    - `completion`: the end of the row is cut, first the answer's; a row with no answer token left is dropped.
    - `drop`: the row is dropped.
    A classified text is cut at its end unless `drop`. Plain text is never cut: a document longer than `max_length`
    becomes several rows. Encoder-decoder rows hold prompt and answer apart, each of at most `max_length`: `prompt`
    cuts the prompt's start and drops rows with a longer answer, `completion` cuts both at their ends.

    `.txt` files (`unit`): `block` gathers consecutive whole lines up to `max_length` tokens, `paragraph` reads one
    document between blank lines, `line` one per line. With `separator`, each line is `prompt<separator>completion`.

    `limit`, `validation_limit`, `test_limit` draw that many rows with `seed`, after the split, and keep file order.
    `split_on: prompt` keeps all rows with the same prompt on one side of the carved validation split.
    """

    where: ClassVar[str] = "data"

    train: str = DEMO
    validation: str | None = None
    test: str | None = None
    format: Literal["auto", "prompt_completion", "chat", "text", "classification"] = "auto"
    fields: Fields = Fields()
    separator: str | None = Field(default=None, min_length=1)
    quoting: Literal["csv", "none"] = "csv"
    unit: Literal["block", "paragraph", "line"] = "block"
    prompt_template: str | None = None
    max_length: int = Field(default=512, ge=8, le=2**24)
    truncate: Literal["prompt", "completion", "drop"] = "prompt"
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    split_on: Literal["row", "prompt"] = "row"
    limit: int | None = Field(default=None, ge=1, le=2**62)
    validation_limit: int | None = Field(default=None, ge=1, le=2**62)
    test_limit: int | None = Field(default=None, ge=1, le=2**62)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @classmethod
    def parse(cls, data: Any) -> Self:
        """As `RecipeSection.parse`; a bare string is short for `{train: <string>}`."""
        return super().parse({"train": data} if isinstance(data, str) else data)

    def check_files(self, base_dir: str | os.PathLike[str] | None = None) -> None:
        """Refuse a file that is not there. Raises DataError."""
        for written in (self.train, self.validation, self.test):
            if written is not None and written != DEMO and not (path := resolve_path(written, base_dir)).exists():
                raise missing(path)

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
                f"data.prompt_template={template!r} has a format behind {{{name}}}: columns are written as they are, so leave it out."
            )
        if not name or any(mark in name for mark in ".[") or name.isdigit():
            raise ConfigError(
                f"data.prompt_template={template!r} has {{{name}}}: only plain column names may stand in braces."
            )
    return names
