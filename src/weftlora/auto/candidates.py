"""Which methods are searched: those that the model and the server can run, at the rank that the rows have need of.

    r       the smallest of 8, 16, ..., 256 with  2 bits · parameters(r) ≥ 1 bit · answer tokens

Schulman et al., "LoRA Without Regret" (2025): LoRA learns what full fine-tuning does as long as the rows do not hold more than
its parameters can, about 2 bits each, and a token of an answer holds about 1 bit. All methods get as many trainable parameters as
plain LoRA at that rank. Nine published variants lie within one or two per cent of LoRA once its rate is tuned (arXiv 2602.04998),
so plain LoRA goes first, and another method has to be better by an interval.

What a server cannot run is left out: the export is asked on a model without values, and its answer is the reason that is shown.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from weftlora.auto.recipe import AutoRecipe
from weftlora.auto.record import Left
from weftlora.compare.budget import Scales, solve
from weftlora.compare.methods import CONTROLS, Contender, contenders
from weftlora.compare.recipe import CompareRecipe
from weftlora.data import Loaded
from weftlora.errors import ConfigError, TargetError, WeftError
from weftlora.export.lora import check_routed
from weftlora.export.source import Source
from weftlora.runs import base_model as models
from weftlora.train import arguments

PLAIN = "lora"
EARLY = 0.1
"""Of a run: when directions are taken. The papers' 100 steps are a small part of their runs, and may be more than a short one."""
METHODS: list[str | dict[str, Any]] = [
    PLAIN,
    {"recipe": "lora_init", "after": EARLY},
    "hydralora",
    {"recipe": "lora_dash", "after": EARLY},
    "alora",
    {"recipe": "lora_tsd", "after": EARLY},
    "tied_lora",
    {"recipe": "lora", "structure": "hydra", "boost": {"dash": {"after": EARLY}}, "name": "hydra + dash"},
    {"recipe": "alora", "boost": {"dash": {"after": EARLY}}, "name": "alora + dash"},
]
"""What is searched where the recipe names none, in the order in which a small budget takes them. Flexora is not among them: its own
search comes on top of every run."""
RANKS = (8, 16, 32, 64, 128, 256)
BITS_A_PARAMETER, BITS_A_TOKEN = 2.0, 1.0


@dataclass(frozen=True)
class Server:
    """What runs the adapter in the end."""

    title: str | None
    """None where it is none in particular, so that nothing is left out."""
    options: dict[str, Any]
    """Of `export_lora`, for a folder that it takes."""


SERVERS = {
    "vllm": Server("vLLM", {"server_ranks": True}),
    "llama.cpp": Server("llama.cpp", {"uniform": True}),
    "any": Server(None, {}),
}


@dataclass(frozen=True)
class Chosen:
    """The methods to search, and the rank of plain LoRA that they are all measured by."""

    entries: dict[str, dict[str, Any]]
    """Name → what a comparison's recipe says of it."""
    left_out: list[Left]
    r: int


def choose(recipe: AutoRecipe, base: models.Base, data: Loaded) -> Chosen:
    """The methods that this model and this server can run.

    Raises:
        ConfigError, TargetError: a method is named that cannot be searched, or not even plain LoRA can be trained.
    """
    steps = arguments.total_steps(recipe.train, len(data.train))
    scales = Scales(base, data.task, data.labels, steps, arguments.steps_per_epoch(recipe.train, len(data.train)))
    given = METHODS if recipe.methods is None else recipe.methods
    entries = {each.name: entry for each, entry in _checked(given)}
    r = recipe.r or rank(scales, data)
    kept: dict[str, dict[str, Any]] = {}
    left: list[Left] = []
    for name, entry in {PLAIN: _mapping(PLAIN), **entries}.items():
        why = _refusal(recipe, entry, r, scales)
        if why and name == PLAIN:
            raise ConfigError(f"plain LoRA, which every other method is compared with, cannot be trained here: {why}")
        if why:
            left.append(Left(name, why))
        else:
            kept[name] = entry | {"name": name}
    return Chosen(kept, left, r)


def rank(scales: Scales, data: Loaded) -> int:
    """Plain LoRA's rank for these rows: see the module. Rows of classes count as one token each."""
    counts = data.counts["train"]
    bits = BITS_A_TOKEN * max(counts.answer_tokens, counts.rows)
    enough = (r for r in RANKS if BITS_A_PARAMETER * scales.trained({"recipe": PLAIN, "r": r}) >= bits)
    return next(enough, RANKS[-1])


def _checked(given: list[str | dict[str, Any]]) -> list[tuple[Contender, dict[str, Any]]]:
    """Every method with its entry. Raises ConfigError."""
    found = contenders(given)
    for each in found:
        if each.frozen or each.draws or str(each.section.get("recipe")).startswith("peft:"):
            raise ConfigError(
                f"the method {each.name} is a control, and a search ends with an adapter of weftlora: leave it out, and compare with "
                "weftlora compare."
            )
        if each.lr is not None:
            raise ConfigError(f"the method {each.name} has lr={each.lr:g}, and rates are searched: leave it out.")
        if each.name == PLAIN and each.section != {"recipe": PLAIN}:
            raise ConfigError(f"the method {PLAIN} is plain LoRA in every search: give this one another name.")
    return list(zip(found, (_mapping(entry) for entry in given), strict=True))


def _mapping(entry: str | dict[str, Any]) -> dict[str, Any]:
    return {"control" if entry in CONTROLS else "recipe": entry} if isinstance(entry, str) else dict(entry)


def _refusal(recipe: AutoRecipe, entry: dict[str, Any], r: int, scales: Scales) -> str:
    """Why a method is not searched; empty where it is."""
    asked = comparison(recipe, [entry], r, out="nowhere")
    try:
        [solved], _ = solve(asked, contenders([entry]), scales)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if SERVERS[recipe.serve].title is not None:
                check_routed(Source(scales.adapted(solved.method.adapter), ("default",), None), approximate=False)
    except (ConfigError, TargetError) as error:
        return str(error)
    except WeftError as error:
        return f"{SERVERS[recipe.serve].title} runs stock LoRA: {error}"
    return ""


def comparison(recipe: AutoRecipe, methods: list[Any], r: int, **more: Any) -> CompareRecipe:
    """A comparison of methods on the search's model and rows, at equal trainable parameters."""
    content = {
        "model": recipe.model.model_dump(exclude_unset=True),
        "data": recipe.data.model_dump(exclude_unset=True),
        "train": recipe.train.model_dump(exclude_unset=True),
        "methods": methods,
        "budget": {"equal": "parameters", "r": r},
        **more,
    }
    return CompareRecipe.read(content, base_dir=recipe.base_dir)
