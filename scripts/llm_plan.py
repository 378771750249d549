"""The contrasts of evidence/plan.md as data: which recipes, what decides, in which forms; and what its numbers say of runs.

A record evidence/llm/FORM/NAME.json is what `weftlora compare evidence/llm/NAME.yaml` found, as far as it has come, and how long it
took. Everything here is a pure function of such records.

    gap_s      loss of ours less loss of the control, of one seed
    interval   mean ± t s / √n, s the standard deviation of the gaps           Student's t at n − 1 degrees, two-sided, 95 %
    seen       the smallest difference that n seeds see in 4 of 5 experiments  solved for a t-test at 5 %; 1.16 s at n = 8
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from scipy.special import nctdtr, stdtrit

from claims import ROOT

RECIPES = ROOT / "evidence" / "llm"
DOMAINS = ("e2e", "fairytale", "gsm8k", "shakespeare", "sst2", "arc")
SEEDS, PILOT, CONTROL_SEEDS = 8, 2, 3


@dataclass(frozen=True)
class Contrast:
    """One of the five primary contrasts, and the recipes of its controls."""

    name: str
    """Of the recipe evidence/llm/NAME.yaml, which has both of its methods."""
    paper: str
    claim: str
    setup: str
    ours: str
    control: str
    effect: float
    """The smallest effect of interest in nats; of a test of non-inferiority the margin."""
    margin: bool = False
    """Whether it asks for not being worse by `effect`, instead of being better."""
    controls: tuple[str, ...] = ()


CONTRASTS = (
    Contrast(
        "hydra",
        "HydraLoRA",
        "one A and several B serve many domains better than one LoRA",
        "six domains mixed, unlabelled; 3 heads against LoRA of as many trainable parameters",
        "hydralora",
        "lora",
        0.02,
        controls=("hydra-controls", "hydra-start", *(f"hydra-domain-{name}" for name in DOMAINS)),
    ),
    Contrast(
        "tied",
        "Tied-LoRA",
        "comparable quality at 13 % of LoRA's parameters",
        "E2E; 13.2 % of the trainable parameters of LoRA at r = 8",
        "tied_lora",
        "lora",
        0.05,
        margin=True,
        controls=("tied-controls",),
    ),
    Contrast(
        "flexora",
        "Flexora",
        "selecting blocks prevents overfitting",
        "64 rows of GSM8K, ten passes; 15 selected blocks against all 30",
        "flexora",
        "lora",
        0.05,
        controls=("flexora-controls",),
    ),
    Contrast(
        "alora",
        "ALoRA",
        "slots that move to where they are worth most beat uniform ranks",
        "E2E, three passes over 400 rows, early stopping; a slot a module a round against no moves",
        "moves",
        "no moves",
        0.01,
        controls=("alora-controls",),
    ),
    Contrast(
        "dash",
        "LoRA-Dash",
        "core directions help most at small ranks",
        "400 rows of GSM8K; r = 4, launched at a fifth, against LoRA of as many trainable parameters",
        "lora_dash",
        "lora",
        0.01,
        controls=("dash-controls",),
    ),
)


@dataclass(frozen=True)
class Form:
    """How long and how large the runs of a form are: what is overridden in all recipes, and in some by name."""

    name: str
    says: str
    overrides: tuple[str, ...] = ()
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name of a contrast: further overrides of its recipe and those of its controls. A recipe's own come after its contrast's."""
    step_seconds: float = 2.5
    """Of a step while none has been timed: on a CPU as the plan measured it, evaluations not counted."""

    def of(self, recipe: str) -> tuple[str, ...]:
        """The overrides of a recipe. A domain of contrast 1 gives its rows too."""
        contrast, _, rest = recipe.partition("-")
        names = dict.fromkeys((contrast, file_of(recipe)))
        found = (*self.overrides, *(override for name in names for override in self.own.get(name, ())))
        if rest.startswith("domain-"):
            rows = f"../../runs/llm-rows/{rest.removeprefix('domain-')}"
            found = (*found, f"data.train={rows}-train.jsonl", f"data.test={rows}-test.jsonl")
        return found


FORMS = {
    form.name: form
    for form in (
        Form("plan", "as evidence/plan.md has it"),
        Form(
            "short",
            "shorter than the plan: 60 steps, 50 validation rows and 100 test rows, as the plan's section of 30 November says",
            ("data.validation_limit=50", "data.test_limit=100"),
            {
                **dict.fromkeys(("hydra", "tied", "dash"), ("train.steps=60",)),
                "hydra-domain": ("train.steps=10", "data.validation_limit=40", "data.test_limit=null"),
                "hydra-start": ("rates=null", "train.lr=3e-3"),
                "flexora": ("data.limit=48", "train.epochs=5", "train.eval_every=12"),
                "alora": ("data.limit=240", "train.epochs=1", "train.eval_every=10"),
            },
        ),
        Form(
            "large",
            "for one H200: 32 rows of up to 256 tokens a step, up to twice the steps, ten times the rows, 1,000 test rows",
            ("train.batch_size=32", "data.max_length=256", "data.test_limit=1000"),
            {
                "hydra": ("train.steps=300",),
                "hydra-domain": ("train.steps=50",),
                "tied": ("train.steps=300",),
                "flexora": ("data.limit=512", "train.epochs=10"),
                "alora": ("data.limit=4000",),
                "dash": ("train.steps=300", "data.limit=4000"),
            },
            step_seconds=0.06,  # supposed, not measured
        ),
        Form(
            "tiny",
            "a trial of the machinery on stories260k that measures nothing",
            (
                "model=${WEFT_DATA}/models/stories260k",
                *("train.batch_size=2", "data.max_length=64", "data.validation_limit=8", "data.test_limit=8"),
                "rates={values: [1e-3, 5e-3], seeds: 1}",
            ),
            {
                **dict.fromkeys(("hydra", "tied", "dash", "hydra-domain"), ("train.steps=5",)),
                "flexora": ("data.limit=48", "train.epochs=1", "train.eval_every=12"),
                "alora": ("data.limit=48", "train.epochs=1", "train.eval_every=12"),
            },
            step_seconds=0.1,
        ),
    )
}


@dataclass(frozen=True)
class Stage:
    """A comparison with so many seeds: the whole of what is run at once."""

    recipe: str
    seeds: int
    contrast: Contrast

    @property
    def primary(self) -> bool:
        """Whether it is of the contrast itself, not of its controls."""
        return self.recipe == self.contrast.name


def stages(contrasts: Sequence[Contrast] = CONTRASTS) -> Iterator[Stage]:
    """All that is to be run, in the plan's order: the pilots, the other seeds of the contrasts, the controls."""
    for seeds in (PILOT, SEEDS):
        for contrast in contrasts:
            yield Stage(contrast.name, seeds, contrast)
    for contrast in contrasts:
        for recipe in contrast.controls:
            yield Stage(recipe, CONTROL_SEEDS, contrast)


def file_of(recipe: str) -> str:
    """The name of the file that a recipe is in: those of single domains share one."""
    return "hydra-domain" if recipe.startswith("hydra-domain-") else recipe


def records(folder: Path, form: str) -> dict[str, dict[str, Any]]:
    """The records of a form by the name of their recipe."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / form).glob("*.json"))}


def is_done(stage: Stage, found: Mapping[str, Any]) -> bool:
    """Whether the records have every run of a stage."""
    record = found.get(stage.recipe)
    if record is None:
        return False
    ended = [o for o in record["outcomes"] if o["seed"] < stage.seeds and o["status"] in ("complete", "diverged")]
    return len(ended) == stage.seeds * len(record["methods"])


def read(recipe: str, form: Form) -> dict[str, Any]:
    """The recipe as its file and a form's overrides have it."""
    made: dict[str, Any] = yaml.safe_load((RECIPES / f"{file_of(recipe)}.yaml").read_text(encoding="utf-8"))
    for override in form.of(recipe):
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        into = made
        for section in sections:
            into = into[section]
        into[name] = yaml.safe_load(value)
    return made


def runs_of(stage: Stage, form: Form) -> int:
    """How many runs a stage has in all, those that try rates included."""
    made = read(stage.recipe, form)
    return len(made["methods"]) * (stage.seeds + (len(made["rates"]["values"]) if made["rates"] else 0))


def steps_of(recipe: str, form: Form) -> int:
    """Optimiser steps of a run."""
    made = read(recipe, form)
    train = made["train"]
    if "steps" in train:
        return int(train["steps"])
    return math.ceil(train["epochs"] * math.ceil(made["data"]["limit"] / train["batch_size"]))


def hours_left(form: Form, found: Mapping[str, Any], contrasts: Sequence[Contrast] = CONTRASTS) -> dict[str, float]:
    """Hours of the runs that are not there, by recipe, a step taking as long as in those of its contrast, or as was supposed."""
    left = {}
    for stage in stages(contrasts):
        if is_done(stage, found) or stage.seeds == PILOT:
            continue
        timed = [name for name in (stage.recipe, stage.contrast.name) if name in found and found[name]["runs_done"]]
        known = [found[name]["seconds"] / found[name]["runs_done"] / steps_of(name, form) for name in timed]
        done = found[stage.recipe]["runs_done"] if stage.recipe in found else 0
        step = known[0] if known else form.step_seconds
        left[stage.recipe] = (runs_of(stage, form) - done) * steps_of(stage.recipe, form) * step / 3600
    return left


# ---------------------------------------------------------------------- what numbers say


@dataclass(frozen=True)
class Judged:
    """A contrast and what its runs say."""

    contrast: Contrast
    gaps: dict[int, float]
    diverged: list[str]

    @property
    def n(self) -> int:
        return len(self.gaps)

    @property
    def spread(self) -> float | None:
        """s, the standard deviation of the paired differences; None at n = 1."""
        return stdev(self.gaps.values()) if self.n > 1 else None

    @property
    def seen(self) -> float | None:
        """The smallest difference that the whole number of seeds can be expected to see, with the s that is known."""
        return None if self.spread is None else smallest_effect(SEEDS) * self.spread

    @property
    def underpowered(self) -> bool | None:
        """Whether that is above the smallest effect of interest; None while s is unknown."""
        return None if self.seen is None else self.seen > self.contrast.effect

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean, by Student's t; None at n = 1."""
        if self.spread is None:
            return None
        half = float(stdtrit(self.n - 1, 0.975)) * self.spread / math.sqrt(self.n)
        return fmean(self.gaps.values()) - half, fmean(self.gaps.values()) + half

    @property
    def verdict(self) -> str:
        """What may be said: nothing before all seeds are there."""
        if self.n < SEEDS or self.interval is None:
            return f"no verdict: {self.n} of {SEEDS} seeds"
        low, high = self.interval
        if self.contrast.margin:
            known = {
                high < self.contrast.effect: "not worse by the margin",
                low > self.contrast.effect: "worse by more than the margin",
            }
            return known.get(True, "not decided: the interval contains the margin")
        known = {high < 0: "better", low > 0: "worse"}
        return known.get(True, "not distinguishable: the interval contains 0")


def judge(contrast: Contrast, record: Mapping[str, Any]) -> Judged:
    """What a record says of a contrast: seeds of which both runs have ended. One that diverged counts with its last finite loss."""
    ours, control = (losses(record, name) for name in (contrast.ours, contrast.control))
    diverged = [f"{o['method']}, seed {o['seed']}" for o in record["outcomes"] if o["status"] == "diverged"]
    return Judged(contrast, {s: ours[s] - control[s] for s in sorted(ours.keys() & control.keys())}, diverged)


def losses(record: Mapping[str, Any], method: str) -> dict[int, float]:
    """The test loss of every seed of a method that has ended."""
    found = {}
    for outcome in record["outcomes"]:
        if outcome["method"] == method and outcome["status"] in ("complete", "diverged"):
            loss = outcome["scores"].get("loss", outcome.get("last_loss"))
            if loss is not None:
                found[outcome["seed"]] = loss
    return found


@cache
def smallest_effect(n: int, level: float = 0.95, power: float = 0.8) -> float:
    """The true difference, in standard deviations of the paired differences, that a two-sided t-test of n seeds finds with `power`."""
    t = float(stdtrit(n - 1, (1 + level) / 2))
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        found = 1 - float(nctdtr(n - 1, middle * math.sqrt(n), t))
        low, high = (low, middle) if found >= power else (middle, high)
    return high
