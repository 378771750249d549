"""A recipe: which model, which data, which adapter, how to train, where to write; from a file, or by its built-in name.

    model:   demo | smollm2 | path | hub id | {path, dtype, load_in_4bit, load_in_8bit, quantization, task, attn_implementation}
    data:    demo | path | the keys of `weftlora.data.DataConfig`
    adapter: a recipe name | {recipe: name, its fields} | {structure: ..., the other axes, r, ...} | none
    train:   steps or epochs, batch_size, lr, ...
    out:     the run folder

A built-in recipe, which `weftlora train NAME` runs without a file, is one method on the bundled model and tasks, with the settings
of the demo. On another model, or other rows, it is the method alone: what was not said are the defaults of every recipe. An unknown
key anywhere is a `ConfigError` that names the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

import yaml
from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from weftlora.data.config import DataConfig, RecipeSection, Task
from weftlora.data.paths import checked_path, locate
from weftlora.errors import ConfigError, RunError, suggest
from weftlora.foreign_text import shortened
from weftlora.recipes import check_fields
from weftlora.runs import quantisation
from weftlora.runs.run import Run, check_continues, check_extends
from weftlora.settings import MOST_THREADS, is_number


@dataclass(frozen=True)
class Builtin:
    """A method that a recipe can name, and what it is given on the demo: fields of the adapter, and a rate."""

    name: str
    about: str
    paper: str | None
    demo: dict[str, Any]
    demo_lr: float


BUILTIN = {
    entry.name: entry
    for entry in (
        Builtin("lora", "plain LoRA: the baseline", "arXiv:2106.09685", {"r": 16}, 5e-3),
        Builtin("hydralora", "one A, several B heads mixed per token by a router", "arXiv:2404.19245", {"r": 8}, 5e-3),
        Builtin(
            "tied_lora",
            "one A and B shared by all layers, with vectors of its own for each",
            "arXiv:2311.09578",
            {},
            1e-2,
        ),
        Builtin("lora_dash", "LoRA, then gains along the directions of W it moved most", "arXiv:2409.01035", {}, 5e-3),
        Builtin(
            "lora_init",
            "LoRA, restarted along the directions of W that training moves most",
            "arXiv:2409.01035",
            {"after": 10},
            5e-3,
        ),
        Builtin("lora_tsd", "LoRA-Init and LoRA-Dash at once", "arXiv:2409.01035", {"after": 10}, 5e-3),
        Builtin("alora", "LoRA whose rank moves to the modules where it is worth most", "arXiv:2403.16187", {}, 5e-3),
        Builtin(
            "flexora", "LoRA on the blocks that a search on held-out rows selects", "arXiv:2408.10774", {"r": 16}, 5e-3
        ),
        Builtin("peft:lora", "stock peft LoRA, as a control", "arXiv:2106.09685", {"r": 16}, 5e-3),
        Builtin("peft:adalora", "stock peft AdaLoRA, as a control", "arXiv:2303.10512", {}, 5e-3),
        Builtin("none", "no adapter: the frozen base, to evaluate only", None, {}, 1e-3),
    )
}
DEMO_LENGTH, DEMO_STEPS, DEMO_BATCH = 64, 150, 32
"""What the demo's short rows and small model are trained with."""


def builtin(name: str) -> dict[str, Any]:
    """What a built-in name says whatever model and rows are: the method, and where to write. The model and rows are the demo's."""
    return {
        "model": "demo",
        "data": {"train": "demo"},
        "adapter": {"recipe": name},
        "out": f"runs/{name.replace(':', '-')}",
    }


def on_the_demo(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A built-in recipe with the demo's settings, where both model and rows are the demo's and nothing else was said."""
    model, data, adapter, train = (content.get(key) for key in ("model", "data", "adapter", "train"))
    is_demo = (model.get("path", "demo") if isinstance(model, dict) else model) == "demo"
    data = {"train": data} if isinstance(data, str) else data
    if not is_demo or not isinstance(data, dict) or data.get("train", "demo") != "demo":
        return content
    entry, train = BUILTIN[name], train if isinstance(train, dict) else {}
    length = {} if "steps" in train or "epochs" in train else {"steps": DEMO_STEPS}
    method = isinstance(adapter, dict) and adapter.get("recipe") == name
    return content | {
        "data": {"train": "demo", "max_length": DEMO_LENGTH, **data},
        "adapter": {"recipe": name, **entry.demo, **adapter} if method and isinstance(adapter, dict) else adapter,
        "train": {**length, "batch_size": DEMO_BATCH, "lr": entry.demo_lr, **train},
    }


def own(name: str) -> dict[str, Any]:
    """A built-in recipe for a model and rows of one's own, as a file would hold it with the defaults written out."""
    return {
        "model": "path/to/model",
        "data": {"train": "rows.jsonl", "max_length": DataConfig.model_fields["max_length"].default},
        "adapter": {"recipe": name, **({"r": 8} if name != "none" else {})},
        "train": {"epochs": 1, "batch_size": TrainConfig.model_fields["batch_size"].default},
        "out": f"runs/{name.replace(':', '-')}",
    }


MOST_OF_ALL, MOST_ROWS = 2**31 - 1, 10**6
"""Bounds of steps, and of rows at a time: beyond them libraries fail in ways of their own, or machines hang."""
Dtype = Literal["float32", "bfloat16", "auto"]


class ModelConfig(RecipeSection):
    """The frozen base. `path` is a folder or a GGUF file (relative to the recipe file), a hub id, `demo`, `smollm2`,
    `package:NAME/FOLDER` or `package:NAME/FILE.gguf`."""

    where: ClassVar[str] = "model"
    path: Annotated[str, AfterValidator(checked_path)] = "demo"
    dtype: Dtype | None = None
    """Of the weights; none is float32, or bfloat16 where that is the checkpoint's own and faster (`weftlora.runs.precision`)."""
    load_in_4bit: bool = False
    """NF4 with double quantisation, as QLoRA has it."""
    load_in_8bit: bool = False
    quantization: dict[str, Any] | None = None
    """As transformers' quantisation configs have it (`weftlora.runs.quantisation`)."""
    task: Literal["auto", "causal", "seq2seq", "classification"] = "auto"
    trust_remote_code: Literal[False] = False
    attn_implementation: str | None = None

    @model_validator(mode="after")
    def _one_quantiser(self) -> Self:
        quantisation.asked(self.load_in_4bit, self.load_in_8bit, self.quantization, "float32")
        return self


class TrainConfig(RecipeSection):
    """The training section. Give `steps` (optimiser steps) or `epochs`, not both; neither means one epoch."""

    where: ClassVar[str] = "train"
    steps: int | None = Field(default=None, gt=0, le=MOST_OF_ALL)
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, gt=0, le=MOST_ROWS)
    accumulation: int = Field(default=1, gt=0, le=MOST_ROWS)
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; none takes the one for the method and the size of the model (`weftlora.runs.rates`)."""
    schedule: str = "linear"
    warmup: float = Field(default=0.0, ge=0)
    """Optimiser steps; below 1, a fraction of the run."""
    weight_decay: float = Field(default=0.0, ge=0)
    lora_plus_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Factor on the rate of B (LoRA+: 16); none, and 1, train A and B alike."""
    freeze_down: bool = False
    """Freeze A and train the rest (LoRA-FA)."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    optimizer: str = "adamw_torch"
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool | Literal["reentrant", "non_reentrant"] = False
    eval_every: int | None = Field(default=None, gt=0, le=MOST_OF_ALL)
    """Optimiser steps between validation losses; none measures it once, at the end."""
    eval_rows: Annotated[int, Field(gt=0, le=MOST_OF_ALL)] | Literal["all"] | None = None
    """Validation rows that are measured each time, drawn from the seed; none bounds them, so that it costs a part of the training."""
    samples: Annotated[int, Field(ge=0, le=1000)] | list[str] = 0
    """Prompts that are answered at every measurement and at the end: of so many validation rows, or a list of one's own."""
    sample_tokens: int = Field(default=64, gt=0, le=10**6)
    """Tokens that such an answer may have."""
    follow_heads: bool = False
    """Record at every measurement how alike routed heads are and what their routers do, by domain, in events.jsonl."""
    save_every: int | None = Field(default=None, ge=0, le=MOST_OF_ALL)
    """Optimiser steps between checkpoints; none makes about five in a run, 0 makes none."""
    keep: int = Field(default=2, gt=0, le=MOST_OF_ALL)
    """How many complete checkpoints stay on disk."""
    logging_every: int = Field(default=10, gt=0, le=MOST_OF_ALL)
    group_by_length: bool | None = None
    """Whether rows of like length are put into one batch; none does it where random batches would be padded much."""
    num_threads: int | None = Field(default=None, gt=0, le=MOST_THREADS)
    report_to: str | list[str] = "none"
    trainer: Literal["auto", "trainer", "sft"] = "auto"
    best: bool = False
    """Keep the adapter of the checkpoint with the lowest validation loss, instead of the last one."""
    early_stopping: int | None = Field(default=None, gt=0, le=MOST_OF_ALL)
    """Stop after so many measurements without a lower validation loss, and keep the best; none trains to the end."""
    from_adapter: Annotated[str, AfterValidator(checked_path)] | None = None
    """An adapter, or a run, whose values are where training begins; in files and on the command line also `from`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Passed on to transformers' TrainingArguments (trl's SFTConfig with `trainer: sft`)."""

    @field_validator("samples", mode="before")
    @classmethod
    def _one_sample(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _from(cls, data: Any) -> Any:
        if isinstance(data, dict) and "from" in data:
            rest = {key: value for key, value in data.items() if key != "from"}
            return {**rest, "from_adapter": data["from"]}
        return data

    @model_validator(mode="after")
    def _keeps_what_it_measures(self) -> Self:
        if not (self.best or self.early_stopping):
            return self
        if self.save_every == 0:
            raise ConfigError(
                "train.best keeps a checkpoint, and train.save_every=0 makes none: leave one of them out."
            )
        if self.save_every and self.eval_every and self.save_every % self.eval_every:
            raise ConfigError(
                f"train.save_every={self.save_every} is not a multiple of train.eval_every={self.eval_every}, so the best of what was "
                "measured may not be saved: leave save_every out."
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"train has steps={self.steps} and epochs={self.epochs}: keep one of them.")
        return self


class Subject(RecipeSection):
    """What every recipe begins with: the frozen model, the rows, and the folder that their relative paths count from."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    _base_dir: Path = PrivateAttr(default_factory=Path.cwd)

    @field_validator("model", mode="before")
    @classmethod
    def _model_shorthand(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _data_shorthand(cls, value: Any) -> Any:
        return value if isinstance(value, DataConfig) else DataConfig.parse(value)

    @property
    def base_dir(self) -> Path:
        """What relative model and data paths count from: the recipe file's folder, else the working folder."""
        return self._base_dir

    def check_places(self) -> None:
        """Refuse a model folder or a data file that is not there. Raises ModelError or DataError."""
        locate(self.model.path, self.base_dir)
        self.data.check_files(self.base_dir)

    @classmethod
    def _made(
        cls, content: dict[str, Any], overrides: Iterable[str], base_dir: Path, needed: Mapping[str, str]
    ) -> Self:
        """The recipe of `content` with `overrides`; `needed` has the keys that must be there, and what to do where one is not."""
        for override in overrides:
            content = apply(content, override)
        for key, hint in needed.items():
            if key not in content and set(content) <= set(cls.model_fields):
                raise ConfigError(f"{cls.where} has no {key!r}: {hint}")
        recipe = cls.parse(content)
        try:
            recipe._base_dir = base_dir.resolve()
        except (ValueError, OSError) as error:  # a record may name what no path can be
            raise ConfigError(f"{cls.where} has no folder for its relative paths ({error}): give it another.") from None
        return recipe


class Recipe(Subject):
    """A whole recipe. Made by `Recipe.read`; `recipe.model_dump()` is what the run folder keeps."""

    where: ClassVar[str] = "the recipe"
    adapter: dict[str, Any]
    train: TrainConfig = Field(default_factory=TrainConfig)
    out: Annotated[str, Field(min_length=1), AfterValidator(checked_path)]
    _from_folder: bool = PrivateAttr(default=False)

    @field_validator("adapter", mode="before")
    @classmethod
    def _adapter_shorthand(cls, value: Any) -> Any:
        return {"recipe": value} if isinstance(value, str) else value

    @property
    def from_folder(self) -> bool:
        """Whether it is what a run folder says, and not the user's own: terms of other packages in it need trust."""
        return self._from_folder

    @classmethod
    def read(
        cls,
        source: str | Path | Mapping[str, Any] | Recipe,
        *overrides: str,
        base_dir: Path | None = None,
        from_folder: bool = False,
    ) -> Recipe:
        """The recipe of a YAML file, a built-in name, a mapping or a recipe, with `key=value` overrides applied.

        Args:
            from_folder: the mapping is what a run folder has kept.

        Raises:
            ConfigError: unknown key, name or file; a value of the wrong type; an override that is not `key=value`.
        """
        if isinstance(source, Recipe):
            found, content = source.base_dir, source.model_dump()
        elif isinstance(source, Mapping):
            found, content = Path.cwd(), dict(source)
        elif is_builtin(source):
            found, content = Path.cwd(), builtin(str(source))
            for override in overrides:
                content = apply(content, override)
            overrides, content = (), on_the_demo(content, str(source))
        else:
            found, content = _from_file(source)
        recipe = cls._made(content, overrides, base_dir or found, _MISSING)
        recipe._from_folder = from_folder or (isinstance(source, Recipe) and source.from_folder)
        return recipe

    def with_train(self, **values: Any) -> Recipe:
        """The recipe with these values in its train section."""
        return self.model_copy(update={"train": self.train.model_copy(update=values)})

    def with_dtype(self, dtype: str) -> Recipe:
        """The recipe with its base's weights in this type."""
        return self.model_copy(update={"model": self.model.model_copy(update={"dtype": dtype})})

    def settled(self, kept: Mapping[str, Any]) -> Recipe:
        """The recipe with what it leaves to model, rows and machine, and the run that keeps `kept` has decided: rate, type, order."""
        lr, dtype = kept.get("train", {}).get("lr"), kept.get("model", {}).get("dtype")
        recipe = self if self.train.lr is not None or not is_number(lr) else self.with_train(lr=float(lr))
        if recipe.train.group_by_length is None:  # a run of before there was a choice drew its rows at random
            recipe = recipe.with_train(group_by_length=kept.get("train", {}).get("group_by_length") is True)
        return recipe if self.model.dtype is not None or dtype not in get_args(Dtype) else recipe.with_dtype(dtype)


def asked(
    source: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str] = (), resume: bool = False
) -> tuple[Recipe, Run | None]:
    """The recipe to train and, when resuming, the run so far; a run folder names its own recipe.

    What is wrong with names, keys and places is said here, before anything that takes seconds to load.

    Raises:
        ConfigError, DataError, ModelError, RunError: as their names say.
    """
    before = None
    if resume and isinstance(source, (str, Path)) and _is_folder(Path(source)):
        before = Run.load(source).whole()
        recipe = Recipe.read(before.recipe, *overrides, base_dir=Path(before.base_dir), from_folder=True)
        recipe = recipe.model_copy(update={"out": str(source)})
    else:
        recipe = Recipe.read(source, *overrides)
        if resume:
            before = Run.load(Path(recipe.out).expanduser()).whole()
    if before is not None:
        recipe = recipe.settled(before.recipe)
        # with the defaults of keys that are newer than the run
        told = Recipe.read(before.recipe).settled(before.recipe).model_dump(mode="json")
        check_continues(dataclasses.replace(before, recipe=told), recipe.model_dump(mode="json"))
    if before is None or before.status != "complete":
        check_fields(recipe.adapter)
        recipe.check_places()
    return recipe, before


def asked_to_extend(source: str | Path | Mapping[str, Any] | Recipe, overrides: Iterable[str]) -> tuple[Recipe, Run]:
    """The recipe of a run that goes on with the run in a folder, and that run.

    Raises:
        ConfigError, DataError, ModelError, RunError: as their names say.
    """
    if not isinstance(source, (str, Path)):
        raise ConfigError("only a run can be extended: give its folder.")
    before, given = Run.load(source).whole(), list(overrides)
    if before.status != "complete":
        raise RunError(f"{before.folder} is {before.status}: finish it with --resume before it is extended.")
    kept = {**before.recipe, "train": dict(before.recipe["train"])}
    lengths = [text.partition("=")[2] for text in given if text.startswith(("train.steps=", "train.epochs="))]
    if not lengths:
        raise ConfigError("an extended run is longer: set train.steps=..., counting the steps already taken.")
    kept["train"] |= {"steps": None, "epochs": None}
    if not any(text.startswith("out=") for text in given):
        kept["out"] = f"{Path(source)}-{lengths[-1]}"
    recipe = Recipe.read(kept, *given, base_dir=Path(before.base_dir), from_folder=True).settled(before.recipe)
    told = Recipe.read(before.recipe).settled(before.recipe).model_dump(mode="json")
    check_extends(dataclasses.replace(before, recipe=told), recipe.model_dump(mode="json"))
    recipe.check_places()
    return recipe, before


def _is_folder(source: Path) -> bool:
    """Whether a folder is meant, and not the built-in recipe of the same name."""
    return source.is_dir() and (str(source) not in BUILTIN or (source / "run.json").is_file())


_MISSING = {
    "data": "name a file (data: rows.jsonl) or the built-in tasks (data: demo).",
    "adapter": "name a method (adapter: hydralora) or the axes (adapter: {structure: ...}).",
    "out": "name the run folder (out: runs/first).",
}


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string; a learning rate is a number. What cannot be read is named with its line."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """A value; what Python cannot make of it is an error of YAML's."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MOST_BITS:
                raise ValueError("it has too many digits to be shown")
            return value
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            said = f"this is not a {node.tag.rpartition(':')[2]} that can be read ({shortened(str(error), 200)})"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from None


_MERGE = "tag:yaml.org,2002:merge"


def _mapping(loader: Any, node: Any) -> dict[Any, Any]:
    """A mapping whose keys are all different; YAML itself would keep the last. Keys of a merge (`<<`) give way to its own."""
    seen: set[str] = set()
    for key, _ in node.value:
        name = "<<" if key.tag == _MERGE else str(loader.construct_object(key, deep=True))
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
        seen.add(name)
    content: dict[Any, Any] = yaml.SafeLoader.construct_mapping(loader, node, deep=True)
    return content


_Yaml.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))

MOST_BITS = 10_000
"""Of a whole number; Python shows none of more than 4,300 digits, which hexadecimal ones can have."""
LARGEST, DEEPEST, MOST = 10**6, 30, 10**5
"""Of a YAML text: characters, sections in sections, and values once every alias is written out."""


def read_yaml(text: str, where: str) -> Any:
    """The value written in `text`. Raises ConfigError naming `where` and the line."""
    if len(text) > LARGEST:
        raise ConfigError(f"{where} has {len(text):,} characters, and {LARGEST:,} are read: give a shorter one.")
    loader = None
    try:
        _check_depth(text)
        loader = _Yaml(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size, depth = _size(node, {}, set())
        if size > MOST or depth > 2 * DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, "its aliases expand to too many values", None)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{where}{line} is not valid YAML: {problem}.") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check_depth(text: str) -> None:
    """Refuse what is nested too deep for a reader that calls itself. Raises YAMLError."""
    depth = 0
    for event in _events(text):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                said = f"it is nested more than {DEEPEST} deep"
                raise yaml.constructor.ConstructorError(None, None, said, cast(Any, event.start_mark))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _events(text: str) -> Iterator[Any]:
    try:
        yield from yaml.parse(text, Loader=_Yaml)
    except (ValueError, OverflowError) as error:  # an escape beyond the last character, a version of many digits
        raise yaml.constructor.ConstructorError(None, None, str(error), None) from None


def _size(node: Any, known: dict[int, tuple[int, int]], above: set[int]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they lie. Raises YAMLError where it holds itself."""
    if id(node) in above:
        raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
    if id(node) not in known:
        inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        within = inner if isinstance(node, yaml.CollectionNode) else ()
        sizes = [_size(each, known, above | {id(node)}) for each in within]
        known[id(node)] = (1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0))
    return known[id(node)]


def read_file(path: Path, what: str, keys: str) -> dict[str, Any]:
    """The mapping in a YAML file, which should hold a `what` with `keys`. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the {what} {path} cannot be read: {error}.") from None
    content = read_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no {what}: it must be a mapping with {keys}.")
    return content


def is_builtin(source: str | Path) -> bool:
    """Whether a built-in recipe is meant, and not a file of its name."""
    return str(source) in BUILTIN and not Path(source).is_file()


def _from_file(source: str | Path) -> tuple[Path, dict[str, Any]]:
    path = Path(checked_path(str(source)))
    if path.is_file():
        return path.parent, read_file(path, "recipe", "model, data, adapter, train and out")
    name = str(source)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give a recipe file, or --resume to continue a run folder.")
    if path.suffix in (".yaml", ".yml") or os.sep in name:
        raise ConfigError(f"there is no recipe file {name!r}.")
    raise ConfigError(f"there is no recipe file and no built-in recipe {name!r}: {suggest(name, BUILTIN)}")


def apply(content: dict[str, Any], override: str) -> dict[str, Any]:
    """`content` with one `a.b=value` set; a section written in shorthand is spelled out first.

    Raises:
        ConfigError: the override is not `key=value`, or names a key below one that is no section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override: write key=value, for instance train.lr=1e-3.")
    parts = key.split(".")
    changed = dict(content)
    at = changed
    for depth, part in enumerate(parts[:-1]):
        section = at.get(part)
        if isinstance(section, str) and depth == 0 and part in _SHORTHAND:
            section = {_SHORTHAND[part]: section}
        elif section is not None and not isinstance(section, dict):
            raise ConfigError(
                f"{override!r} cannot be set: {'.'.join(parts[: depth + 1])} is {section!r}, not a section."
            )
        at[part] = dict(section or {})
        at = at[part]
    at[parts[-1]] = read_yaml(text, f"the override {override!r}")
    return changed


_SHORTHAND = {"model": "path", "data": "train", "adapter": "recipe"}

__all__ = ["ModelConfig", "Recipe", "Subject", "Task", "TrainConfig", "apply", "asked", "read_file", "read_yaml"]
