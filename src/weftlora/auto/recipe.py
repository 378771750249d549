"""A search's recipe: a model, rows, how long it may take, and which server is to run the adapter.

model, data   as in a recipe to train; where no test rows are given, a tenth of the training rows is kept for them
budget        wall time: 2h, 45m, 1h30m, 90s
serve         vllm | llama.cpp | any
metric        loss, accuracy, ...: what the verdict is about
train         as in a recipe to train, without lr and seed; without steps and epochs, the length is chosen too
methods       as in a comparison; by default those of `weftlora.auto.candidates`
r             plain LoRA's rank; by default from the tokens in the rows
out           the search's folder
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from weftlora.compare import record
from weftlora.data.paths import checked_path
from weftlora.errors import ConfigError
from weftlora.runs.recipe import Subject, TrainConfig, apply, on_the_demo, read_file

OUT = "runs/auto"
TEST_FRACTION = 0.1
"""Of the training rows, where no test rows are given."""
_TIME = re.compile(r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s)?")
LONGEST = 366 * 24 * 3600.0


def seconds(text: Any) -> float:
    """Seconds of a time with its units. Raises ConfigError.

    >>> seconds("1h30m"), seconds("45s")
    (5400.0, 45.0)
    """
    found = _TIME.fullmatch(text.replace(" ", "").lower()) if isinstance(text, str) else None
    if found is None or not any(found.groups()):
        raise ConfigError(f"budget={text!r} is not a time: give hours, minutes or seconds, such as 2h, 45m or 1h30m.")
    total = sum(float(found[unit] or 0) * size for unit, size in (("h", 3600), ("m", 60), ("s", 1)))
    if not 0 < total <= LONGEST:
        raise ConfigError(f"budget={text} leaves no time to train in: give one above 0 and up to a year, such as 2h.")
    return total


class AutoRecipe(Subject):
    """A whole search. Made by `AutoRecipe.read`."""

    where: ClassVar[str] = "the search"
    train: TrainConfig = Field(default_factory=TrainConfig)
    methods: list[str | dict[str, Any]] | None = Field(default=None, min_length=1)
    budget: str
    metric: record.Name | None = None
    serve: Literal["vllm", "llama.cpp", "any"] = "any"
    r: int | None = Field(default=None, gt=0, le=2**20)
    out: Annotated[str, Field(min_length=1), AfterValidator(checked_path)] = OUT

    @field_validator("budget", mode="before")
    @classmethod
    def _is_time(cls, value: Any) -> Any:
        seconds(value)
        return value

    @model_validator(mode="after")
    def _owned(self) -> Self:
        given = self.train.model_fields_set
        for key, why in (("lr", "the rate is what is searched first"), ("seed", "the search has seeds of its own")):
            if key in given and getattr(self.train, key) is not None:
                raise ConfigError(f"train.{key}={getattr(self.train, key)} is given, and {why}: leave it out.")
        return self

    @property
    def seconds(self) -> float:
        """The budget."""
        return seconds(self.budget)

    @property
    def has_length(self) -> bool:
        """Whether the user has said how long a run is."""
        return self.train.steps is not None or self.train.epochs is not None

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], *overrides: str) -> AutoRecipe:
        """The search of a YAML file, a mapping, or a first `key=value`, with further ones applied.

        Raises:
            ConfigError: an unknown key or file; a value of the wrong type; an override that is not `key=value`.
        """
        found: Path = Path.cwd()
        if isinstance(source, Mapping):
            content = dict(source)
        elif isinstance(source, str) and "=" in source and not Path(source).is_file():
            content, overrides = {}, (source, *overrides)
        else:
            path = Path(source)
            if not path.is_file():
                raise ConfigError(
                    f"there is no file {str(path)!r} of a search: give one, or key=value such as data.train=rows.jsonl."
                )
            found, content = path.parent, read_file(path, "search", "model, data and budget")
        for override in overrides:
            content = apply(content, override)
        return cls._made(_completed(content), (), found, _MISSING)


def _completed(content: dict[str, Any]) -> dict[str, Any]:
    """With the demo's settings where model and rows are the demo's, and with test rows where none are named."""
    given = content.get("train", {})
    whole = on_the_demo({"model": "demo", **content, "adapter": {"recipe": "lora"}}, "lora")
    del whole["adapter"]
    if isinstance(given, dict) and "train" in whole:
        whole["train"] = {key: value for key, value in whole["train"].items() if key != "lr" or key in given}
    else:
        whole |= {"train": given} if given else {}
    data = {"train": data} if isinstance(data := whole.get("data"), str | list) else data
    if isinstance(data, dict) and data.get("test") is None:
        whole["data"] = {"test_fraction": TEST_FRACTION, **data}
    return whole


_MISSING = {
    "data": "name a file (data.train=rows.jsonl) or the built-in tasks (data=demo).",
    "budget": "say how long it may take (budget=2h).",
}
