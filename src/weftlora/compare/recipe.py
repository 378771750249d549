"""A comparison's recipe file: one model and data set, several methods, and what is equal between them.

    model, data   as in a recipe to train
    train         steps or epochs, batch_size, ...; lr only where no `rates` are tried
    methods       names | {recipe or axes, fields, name} | {control: random_layers, count} | none
    budget        {equal: parameters, r: 8} | {equal: steps, r: 8}
    scale         alpha / r of every method | own
    seeds         a number | a list
    rates         {values: [...], seeds: 1}
    metric        loss, accuracy, ...
    answers       false: only the loss is measured, no answers are generated
    out           the comparison's folder

An unknown key anywhere is a `ConfigError` that names the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from weftlora.compare import record
from weftlora.data.config import RecipeSection
from weftlora.data.paths import checked_path
from weftlora.errors import ConfigError
from weftlora.runs.recipe import Subject, TrainConfig, read_file
from weftlora.settings import is_number, is_whole

MOST_SEEDS = 1000
RATES = (5e-4, 2e-3, 8e-3)
"""Learning rates that are tried where a recipe names none: each four times the one before."""


class Budget(RecipeSection):
    """What is equal: trainable parameters, as plain LoRA of rank `r` has them, or optimiser steps, a search's cost included."""

    where: ClassVar[str] = "budget"
    equal: Literal["parameters", "steps"] = "parameters"
    r: int = Field(default=8, gt=0, le=2**20)


class Rates(RecipeSection):
    """The learning rates that are tried for every method alike, on validation loss, over `seeds` that are not reported."""

    where: ClassVar[str] = "rates"
    values: list[float] = Field(default=list(RATES), min_length=1)
    seeds: int = Field(default=1, gt=0, le=MOST_SEEDS)

    @field_validator("values")
    @classmethod
    def _positive_and_different(cls, values: list[float]) -> list[float]:
        for value in values:
            if not value > 0:
                raise ConfigError(f"rates.values has {value:g}, which is not a learning rate: use numbers above 0.")
        if len({f"{value:g}" for value in values}) < len(values):
            raise ConfigError(f"rates.values={values} names a rate twice, to six figures: keep one of the two.")
        return sorted(values)


class CompareRecipe(Subject):
    """A whole comparison. Made by `CompareRecipe.read`; `model_dump()` is what `compare.json` keeps."""

    where: ClassVar[str] = "the comparison"
    train: TrainConfig = Field(default_factory=TrainConfig)
    methods: list[str | dict[str, Any]] = Field(min_length=1)
    baseline: str | None = None
    budget: Budget = Field(default_factory=Budget)
    scale: float | Literal["own"] = 2.0
    seeds: int | list[int] = 5
    rates: Rates | None = None
    metric: record.Name | None = None
    answers: bool | None = None
    """Whether test answers are generated, for exact match, BLEU and ROUGE-L, which may take longer than all else; none is yes."""
    out: Annotated[str, Field(min_length=1), AfterValidator(checked_path)]

    @field_validator("scale", mode="before")
    @classmethod
    def _is_scale(cls, value: Any) -> Any:
        if value == "own" or (is_number(value) and value > 0):
            return value
        raise ConfigError(
            f"scale={value!r} is not a scale: give lora_alpha / r as a number above 0, or own for each recipe's."
        )

    @field_validator("seeds", mode="before")
    @classmethod
    def _are_seeds(cls, value: Any) -> Any:
        if is_whole(value, 1) and value <= MOST_SEEDS:
            return value
        if (
            isinstance(value, list)
            and 0 < len(value) <= MOST_SEEDS
            and all(is_whole(seed, 0) and seed < 2**32 for seed in value)
        ):
            if len(set(value)) == len(value):
                return value
            raise ConfigError(f"seeds={value} names a seed twice: it would count twice, and is one run.")
        raise ConfigError(
            f"seeds={value!r}: give how many, such as 5 and at most {MOST_SEEDS}, or a list of whole numbers from 0 to 2**32 - 1."
        )

    @model_validator(mode="after")
    def _owned(self) -> Self:
        given = self.train.model_fields_set
        if "seed" in given:
            raise ConfigError("train.seed is one seed, and a comparison has several: give seeds instead.")
        if self.train.freeze_down:
            raise ConfigError(
                "train.freeze_down trains fewer parameters than the budget gives a method, so a comparison cannot be "
                "fair to it: leave it "
                "out, and compare two runs of weftlora train instead."
            )
        named = [method if isinstance(method, str) else str(method.get("recipe")) for method in self.methods]
        if self.train.lora_plus_ratio and (stock := [name for name in named if name.startswith("peft:")]):
            raise ConfigError(
                f"train.lora_plus_ratio={self.train.lora_plus_ratio:g} is for weftlora's methods, and {stock[0]} is peft's own: leave "
                "one of the two out."
            )
        if self.train.lr is not None and self.rates is not None:
            raise ConfigError(f"train.lr={self.train.lr:g} and rates are both given: keep one of them.")
        if self.answers is False and self.metric and record.METRICS[self.metric].of == "answers":
            raise ConfigError(
                f"metric={self.metric} is measured on answers, and answers=false generates none: drop one of the two."
            )
        return self

    @property
    def all_seeds(self) -> list[int]:
        """The reported seeds."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def all_rates(self) -> list[float]:
        """The rates that are tried, in ascending order; a single one is simply used."""
        if self.rates is not None:
            return self.rates.values
        return list(RATES) if self.train.lr is None else [self.train.lr]

    @classmethod
    def read(
        cls, source: str | Path | Mapping[str, Any] | CompareRecipe, *overrides: str, base_dir: Path | None = None
    ) -> CompareRecipe:
        """The comparison of a YAML file, a mapping or a recipe, with `key=value` overrides applied.

        Raises:
            ConfigError: an unknown key or file; a value of the wrong type; an override that is not `key=value`.
        """
        if isinstance(source, CompareRecipe):
            found, content = source.base_dir, source.model_dump(exclude_unset=True)
        elif isinstance(source, Mapping):
            found, content = Path.cwd(), dict(source)
        else:
            found, content = Path(source).parent, _from_file(Path(source))
        return cls._made(content, overrides, base_dir or found, _MISSING)


_MISSING = {
    "data": "name a file (data: rows.jsonl) or the built-in tasks (data: demo).",
    "methods": "list some (methods: [lora, hydralora, none]).",
    "out": "name the folder (out: runs/comparison).",
}


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"there is no comparison file {str(path)!r}.")
    return read_file(path, "comparison", "model, data, methods and out")
