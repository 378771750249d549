"""What a comparison runs: `compare.json`, written before the first run, and the runs that follow from it.

    tuning/<method>/lr<rate>-s<seed>/    a rate tried with a seed that is not reported
    runs/<method>/s<seed>/               a reported run at the rate with the lowest mean validation loss
    runs/none/base/                      the frozen base, measured once

A plan is a pure function of its recipe, the model and the data; which rate a method has, of the plan and the tuning folders.
"""

from __future__ import annotations

import math
import platform
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from weftlora.compare.at_once import expected
from weftlora.compare.budget import Scales, solve
from weftlora.compare.methods import contenders, drawn_blocks
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import FORMAT, METRICS, NONE, Method, Rate
from weftlora.data import generation_prompts
from weftlora.data import load as load_data
from weftlora.disk.files import read_json, write_json
from weftlora.disk.ownership import inside
from weftlora.errors import ConfigError, DataError, RunError, suggest
from weftlora.records import NUMBER, Record, check_kinds
from weftlora.runs import base_model as models
from weftlora.runs import scores
from weftlora.train import arguments
from weftlora.train.loop import PACKAGES, version

_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("recipe.model", "recipe.data", "recipe.train", "recipe.budget"), dict),
    **dict.fromkeys(("recipe.model.path", "recipe.data.train"), str),
    **dict.fromkeys(("recipe.train.num_threads", "recipe.budget.r"), int),
    "recipe.scale": (*NUMBER, str),
}
"""What is read of the recipe in compare.json."""
_SLUG = re.compile(r"(?![.])[\w.-]{1,200}")
"""What `Contender.slug` makes of a name."""
TUNING_SEED = 1000
"""The first seed that rates are tried with, unless it is reported."""


@dataclass(frozen=True)
class Job:
    """One run: which it is, its folder relative to the comparison's, and the recipe to train without `out` and its draws.

    Reading a comparison makes its jobs too, so that nothing here may need the classes of a method's choices.
    """

    method: str
    seed: int
    lr: float
    tuning: bool
    folder: str
    recipe: dict[str, Any]
    base_dir: str
    metric: str
    answers: bool

    @property
    def frozen(self) -> bool:
        """Whether there is nothing to train."""
        return bool(self.recipe["adapter"] == NONE)


@dataclass(frozen=True)
class Plan(Record):
    """A comparison before its first run: everything that was decided from its recipe, model and data. `compare.json` has it."""

    format_version: ClassVar[int | None] = FORMAT
    recipe: dict[str, Any]
    base_dir: str
    task: str
    metric: str
    baseline: str
    seeds: list[int]
    rates: list[float]
    tuning_seeds: list[int]
    """Empty where a single rate is used for all."""
    steps: int
    budget: int | None
    """Trainable parameters; None for a budget of steps."""
    methods: list[Method]
    slugs: dict[str, str]
    draws: dict[str, list[int]]
    """Method: the blocks that it draws from for every seed."""
    versions: dict[str, str]
    device: str
    hashes: list[str] = field(default_factory=list)
    """SHA-256 of the files of rows, by split."""
    jobs: list[int] = field(default_factory=list)
    """How many runs there were at once, in every session that had another number."""
    peak_bytes: int = 0
    """What a run is expected to take at most, before one was measured."""
    at_once: str = ""
    """Why there were as many at once, where that was left to us."""

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.metric].higher

    @property
    def runs(self) -> int:
        """How many runs there are in all."""
        return sum(len(self.reported_seeds(method)) + len(self.tuning(method)) for method in self.methods)

    def tuning(self, method: Method) -> list[Job]:
        """The runs that try rates for a method; none where there is one rate, or it has its own, or nothing to train."""
        if method.frozen or method.lr is not None:
            return []
        return [self._job(method, seed, lr, True) for lr in self.rates for seed in self.tuning_seeds]

    def reported(self, method: Method, lr: float) -> list[Job]:
        """The runs of a method that are reported; one for the frozen base."""
        return [self._job(method, seed, lr, False) for seed in self.reported_seeds(method)]

    def every_job(self) -> list[Job]:
        """All runs; the rate of a reported one is not known here, and its folder does not depend on it."""
        return [job for method in self.methods for job in (*self.tuning(method), *self.reported(method, self.rates[0]))]

    def every_run(self) -> list[str]:
        """Their folders."""
        return [job.folder for job in self.every_job()]

    def reported_seeds(self, method: Method) -> list[int]:
        """The seeds that a method is reported with; nothing of the frozen base depends on one."""
        return self.seeds[:1] if method.frozen else self.seeds

    def folder(self, method: str, seed: int, tried: float | None = None) -> str:
        """Where a run lies, relative to the comparison's folder; `tried`: the rate of a run that tries one."""
        if tried is not None:
            return f"tuning/{self.slugs[method]}/lr{tried:g}-s{seed}"
        name = "base" if self.of(method).frozen else f"s{seed}"
        return f"runs/{self.slugs[method]}/{name}"

    def of(self, name: str) -> Method:
        """The method of a name."""
        return next(method for method in self.methods if method.name == name)

    def trial(self, method: Method, seed: int, lr: float, steps: int, folder: str) -> Job:
        """A run of a method at a rate and a length that the plan itself does not have, judged by its validation loss."""
        job = self._job(method, seed, lr, True)
        train = job.recipe["train"] | {"steps": steps, "epochs": None}
        return replace(job, folder=folder, recipe=job.recipe | {"train": train})

    def _job(self, method: Method, seed: int, lr: float, tuning: bool) -> Job:
        rows = self.recipe["train"].get("eval_rows") or "all"  # rates are chosen by the loss on them
        train = self.recipe["train"] | {"lr": lr, "seed": seed, "eval_rows": rows}
        if method.steps:
            train |= {"steps": method.steps, "epochs": None}
        recipe = {
            "model": self.recipe["model"],
            "data": self.recipe["data"],
            "adapter": self._adapter(method, seed),
            "train": train,
        }
        folder = self.folder(method.name, seed, lr if tuning else None)
        generated = self.recipe.get("answers") is not False
        return Job(method.name, seed, lr, tuning, folder, recipe, self.base_dir, self.metric, generated)

    def _adapter(self, method: Method, seed: int) -> dict[str, Any]:
        if method.name not in self.draws:
            return method.adapter
        count = method.adapter["layers"]["random"]
        return method.adapter | {"layers": drawn_blocks(self.draws[method.name], count, seed)}

    @property
    def budget_sentence(self) -> str:
        """What is equal between the methods."""
        scale = self.recipe["scale"]
        alpha = "alpha as each recipe has it" if scale == "own" else f"alpha = {scale:g} r"
        if self.budget is None:
            return f"Equal steps: {self.steps} each, those of a search included; {alpha}."
        r = self.recipe["budget"]["r"]
        return f"Equal trainable parameters: {self.budget:,}, those of plain LoRA at r = {r}; {self.steps} steps each; {alpha}."

    def save(self, folder: Path) -> None:
        """Write compare.json. Raises RunError."""
        write_json(folder / "compare.json", self.record())

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read compare.json. Raises RunError if there is none, or it is damaged or of a newer format."""
        if not (folder / "compare.json").is_file():
            raise RunError(f"{folder} is not a comparison: it has no compare.json.")
        content = read_json(folder / "compare.json")
        try:
            fields = cls.fields_in(content, folder / "compare.json")
            check_kinds(content, _KINDS, folder / "compare.json", needed=True)
            methods = [Method(**m | {"rates": [Rate(**r) for r in m.get("rates", ())]}) for m in fields["methods"]]
            plan = cls(**fields | {"methods": methods})
            plan._check_folders(folder)
        except (AttributeError, TypeError, KeyError, ValueError, StopIteration) as error:
            raise RunError(f"{folder / 'compare.json'} is damaged: {type(error).__name__}: {error}.") from None
        return plan

    def _check_folders(self, top: Path) -> None:
        """Every run must lie in the comparison's folder, whatever the file says and wherever links lead. Raises RunError."""
        if self.slugs.keys() != {method.name for method in self.methods} or len(set(self.slugs.values())) < len(
            self.slugs
        ):
            raise ValueError("its methods and their folders do not belong together")
        if not self.seeds or not self.rates or not all(map(math.isfinite, self.rates)) or self.metric not in METRICS:
            raise ValueError(
                f"it needs one seed or more, finite rates and a known metric, and has seeds={self.seeds}, rates={self.rates}, "
                f"metric={self.metric!r}"
            )
        if isinstance(scale := self.recipe["scale"], str) and scale != "own":
            raise ValueError(f"recipe.scale={scale!r} is neither a number above 0 (lora_alpha / r) nor own")
        if self.baseline not in self.slugs:
            raise ValueError(f"its baseline {self.baseline!r} is none of its methods")
        for name, slug in self.slugs.items():
            if not _SLUG.fullmatch(slug):
                raise RunError(
                    f"{top / 'compare.json'} names {slug!r} as the folder of the runs of {name!r}, which is not a folder inside "
                    f"{top}: the file is damaged or not to be trusted; restore the original, or run the comparison "
                    "again in another folder."
                )
        for method in self.methods:
            tried = [(seed, lr) for lr in self.rates for seed in self.tuning_seeds]
            for seed, lr in [*((seed, None) for seed in self.reported_seeds(method)), *tried]:
                inside(top, self.folder(method.name, int(seed), lr))


def make(recipe: CompareRecipe) -> Plan:
    """Read model and data, and find every method's rank; writes nothing and trains nothing.

    Raises:
        ConfigError, DataError, ModelError, TargetError: whatever in the recipe cannot work.
    """
    found = contenders(recipe.methods)
    baseline = _baseline(recipe, [each.name for each in found if not each.frozen])
    arguments.check(recipe.train)
    base = models.find(recipe.model, recipe.base_dir)
    data = load_data(recipe.data, base.tokenizer, base_dir=recipe.base_dir, task=base.wants)
    own = sorted({each.lr for each in found if each.lr is not None})
    needed = any(each.lr is None and not each.frozen for each in found)
    rates = recipe.all_rates if needed else own
    _check_splits(data, tried=needed and len(rates) > 1)
    metric = _metric(recipe, data.task)
    _check_countable(metric, data)
    steps = arguments.total_steps(recipe.train, len(data.train))
    scales = Scales(base, data.task, data.labels, steps, arguments.steps_per_epoch(recipe.train, len(data.train)))
    solved, budget = solve(recipe, found, scales)
    seeds = recipe.all_seeds
    free = (seed for seed in range(TUNING_SEED, TUNING_SEED + 10**6) if seed not in seeds)
    tried = (recipe.rates.seeds if recipe.rates else 1) if needed and len(rates) > 1 else 0
    plain = recipe.model_dump(mode="json")
    plain["train"]["num_threads"] = recipe.train.num_threads or 1
    plain["model"]["dtype"] = base.precision.dtype
    return Plan(
        recipe=plain,
        base_dir=str(recipe.base_dir),
        task=data.task,
        metric=metric,
        baseline=baseline,
        seeds=seeds,
        rates=rates,
        tuning_seeds=[next(free) for _ in range(tried)],
        steps=steps,
        budget=budget,
        methods=[each.method for each in solved],
        slugs={each.contender.name: each.contender.slug for each in solved},
        draws={each.contender.name: each.blocks for each in solved if each.blocks is not None},
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        device=arguments.device(),
        hashes=list(data.hashes.values()),
        peak_bytes=_expected_bytes(recipe, base, data, [each.method for each in solved]),
    )


def _expected_bytes(recipe: CompareRecipe, base: models.Base, data: Any, methods: list[Method]) -> int:
    """What a run takes at most, from its sizes."""
    table = data.train.with_format("arrow")[:]
    longest = max(len(ids) for ids in table["input_ids"])
    dtype = getattr(torch, base.precision.dtype)
    model = models.skeleton(base, data.task, data.labels)
    return expected(
        sum(parameter.numel() for parameter in model.parameters()),
        max(method.parameters or 0 for method in methods),
        model.config,
        dtype.itemsize,
        min(recipe.train.batch_size, len(data.train)),
        longest,
    )


def check_rows(plan: Plan, recipe: CompareRecipe) -> None:
    """Refuse to go on with other rows than those it began with: what is done could not be compared with what is left.

    Raises:
        RunError: the rows have changed.
        ConfigError, DataError, ModelError: model or rows cannot be read any more.
    """
    base = models.find(recipe.model, recipe.base_dir)
    data = load_data(recipe.data, base.tokenizer, base_dir=recipe.base_dir, task=base.wants)
    if plan.hashes != list(data.hashes.values()):
        raise RunError(
            f"the rows of {recipe.data.train} have changed since this comparison began: put them back, choose another folder with "
            "--out, or start again with --overwrite."
        )


def _baseline(recipe: CompareRecipe, trained: list[str]) -> str:
    if not trained:
        raise ConfigError("the comparison trains nothing: give it a method other than none, such as lora.")
    if recipe.baseline is None:
        return "lora" if "lora" in trained else trained[0]
    if recipe.baseline not in trained:
        raise ConfigError(
            f"the baseline {recipe.baseline!r} is not a method that is trained: {suggest(recipe.baseline, trained)}"
        )
    return recipe.baseline


def _metric(recipe: CompareRecipe, task: str) -> str:
    classes = task == "classification"
    metric = recipe.metric or ("accuracy" if classes else "loss")
    valid = [each.name for each in METRICS.values() if each.of in ("loss", "classes" if classes else "answers")]
    if metric not in valid:
        raise ConfigError(f"metric={metric!r} cannot be measured on the task {task}: use one of {', '.join(valid)}.")
    return metric


def _check_countable(metric: str, data: Any) -> None:
    """Refuse a metric that no answer to the test rows could have. Raises ConfigError."""
    if METRICS[metric].of != "answers":
        return
    references = [prompt.reference for prompt in generation_prompts(data.test)]
    if not references:
        raise ConfigError(f"metric={metric} is measured on answers, and the test rows have none: use loss.")
    count = {"bleu": scores.bleu, "rouge_l": scores.rouge_l}.get(metric)
    if count is not None and count(references, references) is None:
        raise ConfigError(
            f"metric={metric} finds nothing to count in the answers of the test rows, such as {references[0]!r}: use loss."
        )


def _check_splits(data: Any, tried: bool) -> None:
    if data.test is None or not len(data.test):
        raise DataError("a comparison is decided on test rows, and the data has none: name a file with data.test.")
    if tried and (data.validation is None or not len(data.validation)):
        raise DataError(
            "rates are chosen on validation rows, and the data has none: set data.validation_fraction=0.1, name a file with "
            "data.validation, or give one rate."
        )
