"""The `methods` of a comparison: what each is called, and the adapter section it stands for.

    lora                                               a recipe by its name
    {recipe: lora, structure: hydra, boost: dash}      axes, on top of a recipe or without one
    random_layers | {control: random_layers, count: k} plain LoRA on k blocks, drawn anew for every seed
    random_moves                                       ALoRA whose slots move at random
    none                                               the frozen base

A method of a mapping may have a `name`; without one it is called by its recipe and its axes. With an `lr` it is trained at that rate,
and none is tried for it.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from weftlora.adapter.spec import WeftConfig, decode_choice, encode_choice
from weftlora.compare.record import NONE, Method
from weftlora.errors import ConfigError, TargetError, suggest
from weftlora.recipes import RECIPES, SEARCHING
from weftlora.runs.adapter import adapter_config
from weftlora.settings import is_number, is_whole
from weftlora.terms.axes import AXES
from weftlora.terms.choice import Choice
from weftlora.terms.layers import SearchedLayers
from weftlora.terms.registry import foreign_names
from weftlora.terms.trust import from_folder

CONTROLS = ("random_layers", "random_moves")
RANKS = ("r", "init_r", "target_r")
"""Fields that say how large an adapter is."""
LONGEST = 60
"""Characters of a name: it is a folder's too."""


@dataclass(frozen=True)
class Contender:
    """A method as the recipe has it: its adapter section without rank and scale, where those are the comparison's to choose."""

    name: str
    section: dict[str, Any]
    draws: bool = False
    """Whether its blocks are drawn anew for every seed."""
    count: int | None = None
    """Of how many blocks, where it draws or selects as many as it is told to."""
    lr: float | None = None
    """A rate of its own, for which none is tried."""

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return re.sub(r"(?:[^\w.]|_)+", "-", self.name.lower()).strip("-.") or "method"

    @property
    def frozen(self) -> bool:
        """Whether it is the base without an adapter."""
        return self.section == NONE

    @property
    def search(self) -> SearchedLayers | None:
        """The search of its layers, if it has one."""
        if self.frozen:
            return None
        config = _config(self.section)
        return config.layers.search if isinstance(config, WeftConfig) else None

    def sized(self, r: int, alpha: float | None) -> dict[str, Any]:
        """The section at rank r, with alpha unless the recipe's own is meant."""
        section = self.section | ({} if alpha is None else {"lora_alpha": alpha})
        if section.get("recipe") != "peft:adalora":
            return section | {"r": r}
        target = section.get("target_r", r)
        ratio = section.get("init_r", 1.5 * target) / target
        return section | {"r": r, "target_r": r, "init_r": max(r + 1, round(ratio * r))}


def contenders(methods: Sequence[str | dict[str, Any]]) -> list[Contender]:
    """The methods of a recipe, every field checked.

    Raises:
        ConfigError: an unknown name or field, or two methods of one name.
    """
    found = [_contender(entry) for entry in methods]
    taken: dict[str, str] = {}
    for each in found:
        if each.slug in taken:
            raise ConfigError(
                f"the methods {taken[each.slug]!r} and {each.name!r} would share a folder: give one another name, as in "
                "{recipe: ..., name: other}."
            )
        taken[each.slug] = each.name
    return found


@contextmanager
def about(name: str) -> Iterator[None]:
    """Let what is refused meanwhile say which method it is about. Raises what was raised."""
    try:
        yield
    except (ConfigError, TargetError) as error:
        if str(error).startswith(f"{name} "):
            raise
        raise type(error)(f"the method {name}: {error}") from None


def check_saved(found: Sequence[Contender], kept: Sequence[Method], drawing: Collection[str]) -> None:
    """Refuse the methods that a comparison's folder has kept, where they name terms that neither `found`, which the recipe of the
    user's own has, names nor the user trusts. The layers of those in `drawing` are no choice yet.

    Raises:
        AdapterError: a term of a package that is not trusted.
    """
    own = {name for each in found for name in foreign_names(each.section.get(axis) for axis in AXES)}
    with from_folder():
        for method in kept:
            drawn = {"layers"} if method.name in drawing else set()
            for axis, choice in method.adapter.items():
                if axis in set(AXES) - drawn and set(foreign_names([choice])) - own:
                    decode_choice(axis, choice)


def _contender(entry: str | dict[str, Any]) -> Contender:
    if isinstance(entry, str):
        entry = {"control": entry} if entry in CONTROLS else {"recipe": entry}
    fields = dict(entry)
    name, control, count, lr = fields.pop("name", None), fields.pop("control", None), None, fields.pop("lr", None)
    if control is not None and control not in CONTROLS:
        raise ConfigError(f"there is no control {control!r}: {suggest(str(control), CONTROLS)}")
    if control == "random_layers":
        count = fields.pop("count", None)
        if not {"recipe", *AXES} & fields.keys():
            fields["recipe"] = "lora"
        _check_drawn(fields, count)
    if control == "random_moves":
        fields = {"recipe": "alora", **fields, "score": "random"}
    if not isinstance(fields.get("recipe"), (str, type(None))) or not fields:
        raise ConfigError(
            f"the method {entry!r} does not say what to train: write a recipe's name, such as lora, or {{recipe: lora, r: 4}}."
        )
    called = _called(control or _name(fields) if name is None else name)
    if lr is not None and not (is_number(lr) and 0 < lr < math.inf):
        raise ConfigError(f"the method {called} has lr={lr!r}, which is not a learning rate: use a number above 0.")
    section = _on_axes(fields)
    _check(section, called)
    return Contender(called, section, control == "random_layers", count, None if lr is None else float(lr))


def _called(name: Any) -> str:
    """A name that a table, a sentence and a folder can have. Raises ConfigError."""
    if (
        isinstance(name, (dict, list))
        or not str(name).strip()
        or not str(name).isprintable()
        or len(str(name)) > LONGEST
    ):
        raise ConfigError(f"name={name!r} is not a name of a method: give a line of at most {LONGEST} characters.")
    return str(name)


def _check_drawn(fields: dict[str, Any], count: Any) -> None:
    """Refuse what random_layers cannot draw blocks for. Raises ConfigError."""
    name = fields.get("recipe")
    if name == "none" or name in SEARCHING or str(name).startswith("peft:"):
        raise ConfigError(
            f"random_layers draws blocks, and recipe={name} cannot be told which: use one of weftlora's, such as lora."
        )
    if "layers" in fields:
        raise ConfigError(f"random_layers draws its blocks, and layers={fields['layers']!r} is given too: drop it.")
    if count is not None and not is_whole(count, 1):
        raise ConfigError(f"random_layers cannot draw count={count!r} blocks: give a whole number from 1 up.")


def _on_axes(fields: dict[str, Any]) -> dict[str, Any]:
    """The section, written as axes where a recipe is given some of its own: `weftlora train` takes one or the other."""
    name, axes = fields.get("recipe"), {axis: fields[axis] for axis in AXES if axis in fields and axis != "layers"}
    if name is None or not axes or name not in RECIPES or str(name).startswith("peft:"):
        return fields
    rest = {key: value for key, value in fields.items() if key not in {"recipe", *axes}}
    own = inspect.signature(RECIPES[name]).parameters
    config = _config({"recipe": name, **{key: value for key, value in rest.items() if key in own}})
    plain = _config({"recipe": "lora"})
    chosen = {}
    for axis in AXES:
        if axis in axes:
            if getattr(config, axis) != getattr(plain, axis):
                raise ConfigError(f"the recipe {name} chooses its own {axis}, and {axis} is given too: drop one.")
            chosen[axis] = encode_choice(decode_choice(axis, axes[axis]))
        elif getattr(config, axis) != getattr(plain, axis):
            chosen[axis] = encode_choice(getattr(config, axis))
    return chosen | {key: value for key, value in rest.items() if key not in own or key in ("r", "layers")}


def _config(section: dict[str, Any]) -> Any:
    """Its config, whose warnings wait until it has its rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapter_config(section, 10**6)


def _check(section: dict[str, Any], name: str) -> None:
    """Refuse what no run of it could train. Raises ConfigError."""
    layers = section.get("layers")
    if isinstance(layers, str) and layers.endswith(".json"):
        raise ConfigError(f"the method {name} takes its layers from {layers}: list the blocks.")
    _config(section)


def _name(fields: dict[str, Any]) -> str:
    """What a method without a name is called: its recipe and its choices."""
    parts = [str(fields["recipe"])] if "recipe" in fields else []
    for axis in AXES:
        value = fields.get(axis)
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, dict):
            parts.append(str(value.get("kind") or next(iter(value))))
    return " + ".join(parts) or "axes"


def selecting_blocks(contender: Contender, count: int) -> Contender:
    """The same with a search that selects `count` blocks, whatever it finds."""
    search = contender.search
    if search is None:
        return contender
    selecting = search.selecting(count)
    if contender.section.get("recipe") in SEARCHING:
        own = {name: value for name, value in vars(selecting).items() if value != getattr(search, name)}
        section = contender.section | own
    else:
        section = contender.section | {"layers": encode_choice(selecting)}
    return replace(contender, section=section, count=count)


def seeded(section: dict[str, Any], seed: int) -> dict[str, Any]:
    """The section as a run of `seed` trains it: what a method draws, it draws anew for every seed, unless it is told otherwise."""
    changed = dict(section)
    recipe = RECIPES.get(section.get("recipe", ""))
    if recipe is not None and "seed" in inspect.signature(recipe).parameters:
        changed.setdefault("seed", seed)
    for axis in AXES:
        choice: Choice | None = decode_choice(axis, section[axis]) if axis in section else None
        if choice is not None and choice != (drawn := choice.seeded(seed)):
            changed[axis] = encode_choice(drawn)
    return changed


def drawn_blocks(blocks: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the blocks, drawn with `seed`, in order."""
    return sorted(random.Random(f"layers {seed}").sample(list(blocks), count))
