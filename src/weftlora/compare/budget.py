"""What makes methods equal: the rank at which each has as many trainable parameters as plain LoRA, counted on the model itself.

    target   trainable parameters of plain LoRA at rank `budget.r`
    rank     argmin over whole r ≥ 1 of |trained(r) − target|, the lower one of equals
    alpha    scale · r

Numbers are counted on the meta device, where a model has shapes and no values. A classifier's head is left out. ALoRA counts its
slots in use, AdaLoRA those it ends with, a search of layers those of the blocks it will select: half of them, unless it is told.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftConfig, PeftModel

from weftlora.adapted.layer import WeftLayer
from weftlora.adapted.targets import Blocks
from weftlora.adapter.spec import WeftConfig
from weftlora.compare.methods import RANKS, Contender, about, selecting_blocks
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import NONE, Method
from weftlora.errors import ConfigError
from weftlora.host.attach import attach
from weftlora.recipes import SEARCHING, FlexoraConfig
from weftlora.runs import base_model as models
from weftlora.runs.adapter import adapt, adapter_config
from weftlora.runs.recipe import Task
from weftlora.search.driver import cost_of_step

CLOSE = 0.05
"""A share of the budget; a method further from it gets a note."""

MOST_NEEDED = 8
"""The rank up to which a method that refuses lower ones is tried."""

_NOT_COUNTED = re.compile(r"\.(modules_to_save|ranknum)\.")
"""A classifier's head; and the rank that AdaLoRA keeps in a parameter, which on the meta device peft forgets to freeze."""


@dataclass
class Scales:
    """Weighs adapters on a model without values: how many numbers of them are trained."""

    base: models.Base
    task: Task
    labels: list[str] | None
    steps: int
    steps_per_epoch: int
    _known: dict[str, int] = field(default_factory=dict)

    def adapted(self, section: dict[str, Any], final: bool = False) -> PeftModel:
        """The model with the adapter; `final` counts what is in use at the end instead of what there is room for.

        Raises:
            ConfigError, TargetError: the adapter cannot be trained on this model in so many steps.
        """
        config = cast(PeftConfig, adapter_config(section, self.steps))
        if final and isinstance(config, WeftConfig):
            config.ranks = WeftConfig().ranks
        if final and hasattr(config, "target_r"):
            config.init_r = config.target_r
        model = adapt(models.skeleton(self.base, self.task, self.labels), config, self.task)
        if isinstance(config, WeftConfig):
            attach(model, total_steps=self.steps, steps_per_epoch=self.steps_per_epoch)
        return model

    def trained(self, section: dict[str, Any]) -> int:
        """The trainable parameters of an adapter, without a classification head."""
        key = repr(sorted(section.items(), key=str))
        if key not in self._known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                named = self.adapted(section, final=True).named_parameters()
            self._known[key] = sum(p.numel() for name, p in named if p.requires_grad and not _NOT_COUNTED.search(name))
        return self._known[key]

    def blocks(self, section: dict[str, Any]) -> list[int]:
        """The numbers of the blocks that an adapter has sites in."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.adapted({key: value for key, value in section.items() if key != "layers"}).get_base_model()
        blocks = Blocks(models.skeleton(self.base, self.task, self.labels))
        sites = [layer.module_name for layer in model.modules() if isinstance(layer, WeftLayer)]
        return sorted({blocks.number[name] for name in map(blocks.of, sites) if name is not None})


def nearest_rank(trained: Callable[[int], int], target: int) -> int:
    """The rank whose number is nearest to `target`, the lower one of equals; `trained` grows with the rank."""
    lowest = _lowest_rank(trained)
    first, second = trained(lowest), trained(lowest + 1)
    r = max(lowest, lowest + round((target - first) / max(second - first, 1)))
    while True:
        near = [rank for rank in (r - 1, r, r + 1) if rank >= lowest]
        best = min(near, key=lambda rank: (abs(trained(rank) - target), rank))
        if best == r:
            return r
        r = best


def _lowest_rank(trained: Callable[[int], int]) -> int:
    """The lowest rank that the method has: a structure may need several slots. Raises what rank 1 raised where there is none."""
    refused: ConfigError | None = None
    for rank in range(1, 1 + MOST_NEEDED):
        try:
            trained(rank)
        except ConfigError as error:
            refused = refused or error
        else:
            return rank
    assert refused is not None
    raise refused


@dataclass(frozen=True)
class Solved:
    """What the budget made of a method: its record, and the blocks that it draws from, if it draws any."""

    contender: Contender
    method: Method
    blocks: list[int] | None = None


def solve(recipe: CompareRecipe, found: list[Contender], scales: Scales) -> tuple[list[Solved], int | None]:
    """Every method at the rank that the budget gives it, and the budget in trainable parameters (None for one of steps).

    Raises:
        ConfigError, TargetError: a method that cannot have this budget, or not be trained at all.
    """
    plain = next((each.section for each in found if each.section.get("recipe") == "lora"), {"recipe": "lora"})
    target = (
        scales.trained(_without_rank(plain) | {"r": recipe.budget.r}) if recipe.budget.equal == "parameters" else None
    )
    told = next((each.search.selects for each in found if each.search is not None and each.search.selects), None)
    solved = []
    for each in found:
        with about(each.name):
            solved.append(_solved(recipe, each, scales, target, told))
    return solved, target


def _solved(
    recipe: CompareRecipe, contender: Contender, scales: Scales, target: int | None, told: int | None
) -> Solved:
    if contender.frozen:
        return Solved(contender, Method(contender.name, NONE, parameters=0, steps=0))
    _check_free(contender, recipe)
    lr, blocks = contender.lr, cast("list[int] | None", None)
    if contender.draws or (contender.search is not None and target is not None):
        blocks = scales.blocks(contender.section)
        contender = _of_fixed_size(contender, len(blocks), told)
    ranked = Contender(contender.name, _without_rank(contender.section) if target is None else contender.section)

    def section(r: int) -> dict[str, Any]:
        alpha = None if recipe.scale == "own" else recipe.scale * r
        return ranked.sized(r, int(alpha) if alpha is not None and alpha == int(alpha) else alpha)

    def counted(r: int, last: bool = False) -> int:
        if blocks is None or contender.count is None:
            return scales.trained(section(r))
        chosen = blocks[-contender.count :] if last else blocks[: contender.count]
        return scales.trained(_on_blocks(section(r), chosen))

    r = contender.section.get("r", recipe.budget.r) if target is None else nearest_rank(counted, target)
    made, parameters = section(r), counted(r)
    gap = None if target is None else parameters / target - 1
    alpha, notes = _put_on(scales, made)
    if gap is not None and abs(gap) > CLOSE:
        notes.append(
            f"Rank {r} gives {parameters:,} trainable parameters ({gap:+.0%}), as near to {target:,} as this method gets."
        )
    if blocks is not None and counted(r, last=True) != parameters:
        notes.append("Its blocks differ in size, so its trainable parameters depend on which it adapts.")
    steps, said = _steps(recipe, contender, scales)
    adapter = made | ({"layers": {"random": contender.count}} if contender.draws else {})
    method = Method(contender.name, adapter, r, alpha, parameters, gap, steps, lr, note=" ".join([*notes, *said]))
    return Solved(contender, method, blocks if contender.draws else None)


def _without_rank(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "r"}


def _check_free(contender: Contender, recipe: CompareRecipe) -> None:
    """Refuse a rank or scale that the comparison chooses."""
    given = contender.section
    adalora = given.get("recipe") == "peft:adalora" and "init_r" in given and "target_r" in given
    fixed = [key for key in RANKS if key in given and not (adalora and key != "r")]
    if recipe.budget.equal == "parameters" and fixed:
        raise ConfigError(
            f"{contender.name} has {fixed[0]}={given[fixed[0]]}, and the budget of equal parameters chooses its rank: drop it, or "
            "set budget.equal=steps."
        )
    if recipe.scale != "own" and "lora_alpha" in given:
        raise ConfigError(
            f"{contender.name} has lora_alpha={given['lora_alpha']}, and scale={recipe.scale:g} sets alpha for all: drop it, or "
            "set scale=own."
        )


def _of_fixed_size(contender: Contender, there: int, told: int | None) -> Contender:
    """The same on a fixed number of blocks, so that its numbers are known before a search or a draw."""
    half, search = max(1, there // 2), contender.search
    if search is None:
        count = contender.count or told or half
        if not isinstance(count, int) or not 1 <= count < there:
            raise ConfigError(
                f"{contender.name} cannot draw {count!r} of {there} blocks: give a count from 1 to {there - 1}."
            )
        return Contender(contender.name, contender.section, True, count)
    if search.granularity == "module":
        raise ConfigError(
            f"{contender.name} selects modules, which differ in size, so its trainable parameters cannot be made "
            "equal: search blocks, or set "
            "budget.equal=steps."
        )
    given = contender.section
    if search.selects is None and "select" in given:
        raise ConfigError(
            f"{contender.name} selects by {given['select']}, so its trainable parameters are known only after the "
            "search: leave select out (half "
            "of the blocks), give top_k, or set budget.equal=steps."
        )
    return selecting_blocks(contender, search.selects or half)


def _on_blocks(section: dict[str, Any], blocks: list[int]) -> dict[str, Any]:
    """The section as it is trained on these blocks."""
    if section.get("recipe") not in SEARCHING:
        return section | {"layers": blocks}
    searched = {"recipe", "select", "top_k", *vars(FlexoraConfig().layers)}
    return (
        {"recipe": "lora"} | {key: value for key, value in section.items() if key not in searched} | {"layers": blocks}
    )


def _steps(recipe: CompareRecipe, contender: Contender, scales: Scales) -> tuple[int, list[str]]:
    """Steps of the training, less what a search costs where steps are equal; and the sentence that says so."""
    search = contender.search
    if search is None or recipe.budget.equal == "parameters":
        return scales.steps, [] if search is None else ["Its search comes on top of these steps."]
    if search.steps is None:
        raise ConfigError(
            f"{contender.name} searches for a whole pass over the rows, which a budget of equal steps must pay for: "
            "give it steps (of the "
            f"search), fewer than {scales.steps}."
        )
    rows = recipe.train.batch_size * recipe.train.accumulation
    micro = min(recipe.train.batch_size, search.val_size // search.outer_batches)
    cost = math.ceil(search.steps * cost_of_step(search, rows, micro))
    if cost >= scales.steps:
        raise ConfigError(
            f"the search of {contender.name} costs {cost} steps of the {scales.steps} that every method has: lower its steps."
        )
    return scales.steps - cost, [f"Its search costs {cost} steps, so its training has {scales.steps - cost}."]


def _put_on(scales: Scales, section: dict[str, Any]) -> tuple[float, list[str]]:
    """The adapter's alpha, and what is said when it is put on the model, as sentences."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config: Any = scales.adapted(section).peft_config["default"]
    said = [" ".join(str(w.message).split()) for w in caught if w.category is UserWarning]
    return config.lora_alpha, [f"{sentence.rstrip('.')}." for sentence in dict.fromkeys(said)]
