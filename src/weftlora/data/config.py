"""The `data:` section of a recipe file, with paths as people write them: `~`, `${ENV}`, relative to the recipe's folder.

data: demo                                  # the bundled tasks
data: rows.jsonl                            # format and columns found from the first row
data: {train: "${WEFT_DATA}/tasks/sst2/train.tsv", quoting: none, fields: {text: sentence}}
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import string
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from weftlora.errors import ConfigError, DataError, ModelError
from weftlora.foreign_text import shortened
from weftlora.sections import RecipeSection

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def checked_path(written: str) -> str:
    """`written`, if a file could be called so. Raises ConfigError."""
    if "\0" in written:
        raise ConfigError(f"the path {written!r} holds a NUL, which no path can: write it again.")
    if (longest := max(len(os.fsencode(part)) for part in written.split("/"))) > 255 or len(
        os.fsencode(written)
    ) > 4000:
        raise ConfigError(
            f"the path {shortened(repr(written), 120)} has a name of {longest} bytes, and 255 can be had: shorten it."
        )
    if written.startswith("~"):
        try:
            Path(written).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"the path {written!r} names a user that this machine does not have: write it out."
            ) from None
    return written


def resolve_path(written: str, base_dir: str | os.PathLike[str] | None = None) -> Path:
    """`written` as an absolute path; relative ones start at `base_dir` (default: the working folder).

    Raises DataError when an environment variable in it is not set. Whether the file exists is not asked.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not (found := os.environ.get(name)):
            raise DataError(f"the path {written!r} needs the environment variable {name}, which is not set: export it.")
        return found

    path = Path(checked_path(_VARIABLE.sub(value, written))).expanduser()
    return Path(os.path.normpath(Path(base_dir or ".").absolute() / path))


def locate(path: str, base_dir: Path) -> str:
    """The folder behind `path` (absolute), or `path` itself where it can only be a hub id. Raises ModelError."""
    if path == "demo":
        from weftlora.data.demo import demo_model_path

        return str(demo_model_path())
    folder = _in_package(path) if path.startswith(_PACKAGE) else resolve_path(path, base_dir)
    if not folder.exists():
        if Path(path).is_absolute() or path.startswith((".", "~", "$")) or path.count("/") > 1:
            raise ModelError(f"there is no model folder {str(folder)!r}.")
        return path
    if not (folder / "config.json").is_file():
        raise ModelError(f"{str(folder)!r} is no model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{str(folder)!r} has a config but no weights: put its *.safetensors files there.")
    if missing := sorted(name for name in _sharded(folder) if not (folder / name).is_file()):
        raise ModelError(f"{str(folder)!r} lacks {missing[0]}, one of its weights files: copy it there.")
    return str(folder.resolve())


def _sharded(folder: Path) -> set[str]:
    """The weights files that a folder's index names. Raises ModelError where it is damaged, or names a file elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ModelError(f"{str(index)!r} is damaged: copy it again.") from None
    for name in names:
        if Path(name).name != name:
            raise ModelError(
                f"{str(index)!r} names the file {name!r}, which does not lie beside it: copy the model again."
            )
    return names


_PACKAGE = "package:"


def _in_package(path: str) -> Path:
    """The folder that `package:NAME/FOLDER` means: a model that an installed Python package carries."""
    name, _, inside = path.removeprefix(_PACKAGE).partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"the model {path!r} needs the Python package {name!r}, which is not installed: pip install it."
        )
    return Path(found.submodule_search_locations[0]) / inside


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
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"data.prompt_template={template!r} is not a valid template ({error}): write {{column}} for a column "
            "and {{ }} for literal braces."
        ) from None
    for name in names:
        if not name or any(mark in name for mark in ".[") or name.isdigit():
            raise ConfigError(
                f"data.prompt_template={template!r} has {{{name}}}: only plain column names may stand in braces."
            )
    return names
