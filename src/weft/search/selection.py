"""The result of a search: a small JSON file that any config takes as `layers`, and that stock peft can use without weft."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from torch import nn

from weft.errors import AdapterError, ConfigError, TargetError
from weft.search.rules import Stability, stability
from weft.terms.layers.only import Only

FORMAT = 1


@dataclass(frozen=True)
class Candidate:
    """One group of a search: its name, its block number (None outside of all blocks), its modules, and what was found."""

    name: str
    block: int | None
    modules: tuple[str, ...]
    alpha: float
    alpha_hat: float
    distance: float
    selected: bool
    near: bool
    filled: bool
    gradient_norm: float


@dataclass(frozen=True)
class Selection:
    """Which groups a search selected, and how clearly.

    `adapter` is the searched config as plain JSON, `search` and `inner` are the settings, `record` has numbers of the run:
    steps, cost_in_steps (how many training steps the search was worth, counted in rows), skipped_steps, sum_alpha,
    max_alpha_hat, seed, rows of either split, losses at the end. `seconds`: how long its steps took.
    """

    candidates: tuple[Candidate, ...]
    granularity: str
    adapter: dict[str, Any]
    search: dict[str, Any]
    inner: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    @property
    def chosen(self) -> list[Candidate]:
        """The selected groups, in the order of the model."""
        return [c for c in self.candidates if c.selected]

    @property
    def blocks(self) -> tuple[int | str, ...]:
        """Block numbers of what was selected; full module names where modules were searched."""
        return _keys(self.chosen, self.granularity)

    @property
    def layers(self) -> Only:
        """The choice to give a config: `weft.HydraLoraConfig(layers=selection.layers)`."""
        return Only(self.blocks)

    @property
    def margin(self) -> float:
        """The smallest distance of an α from the threshold."""
        return min(abs(c.distance) for c in self.candidates)

    @property
    def near_ties(self) -> list[str]:
        """The groups that one more step could have turned."""
        return [c.name for c in self.candidates if c.near]

    def peft_config(self, **fields: Any) -> LoraConfig:
        """A stock LoRA of the searched rank and scale on the selected modules, by their full names.

        Args:
            fields: of peft's LoraConfig, over what the search had.
        """
        names = [name for c in self.chosen for name in c.modules]
        kept = (
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "task_type",
        )
        return LoraConfig(
            **{**{k: self.adapter[k] for k in kept if k in self.adapter}, "target_modules": names, **fields}
        )

    def controls(self, draws: int = 3, seed: int = 0) -> dict[str, Only]:
        """What a result must be held against: all groups, and selections of the same size made without a search.

        "random 1" … "random `draws`" (of `seed`), "first", "last", and "gradient norm": the largest mean ‖∇θ‖ during the
        search. With all groups selected there is only "all".
        """
        n, k = len(self.candidates), len(self.chosen)
        found = {"all": range(n)}
        if k < n:
            draw = random.Random(seed)
            for i in range(draws):
                found[f"random {i + 1}"] = sorted(draw.sample(range(n), k))  # type: ignore[assignment]
            by_norm = sorted(range(n), key=lambda i: (-self.candidates[i].gradient_norm, i))
            found |= {"first": range(k), "last": range(n - k, n), "gradient norm": sorted(by_norm[:k])}  # type: ignore[dict-item]
        return {name: Only(_keys([self.candidates[i] for i in at], self.granularity)) for name, at in found.items()}

    def check(self, base: nn.Module) -> None:
        """Raise TargetError if `base` lacks a selected module: block numbers would stand for something else there."""
        there = {name for name, _ in base.named_modules()}
        for name in (name for c in self.chosen for name in c.modules):
            if name not in there:
                raise TargetError(
                    f"the selection was searched on another model: it selects {name}, which this one does not have; search this "
                    "model, or write the blocks by hand (layers=[0, 3])."
                )

    def save(self, path: str | Path) -> None:
        """Write the selection as JSON."""
        content = {"format": FORMAT, "layers": list(self.blocks), **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1, ensure_ascii=False, default=_json) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote. Raises AdapterError if it is no selection, or one of a newer weft."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AdapterError(
                f"{path} is no saved selection ({error}): give the file that Selection.save wrote."
            ) from None
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise AdapterError(f"{path} is no saved selection: give the file that Selection.save wrote.")
        if content["format"] > FORMAT:
            raise AdapterError(
                f"{path} has selection format {content['format']}, this weft reads up to {FORMAT}: upgrade weft."
            )
        try:
            given = {f.name: content[f.name] for f in dataclasses.fields(cls)}
            candidates = [Candidate(**{**c, "modules": tuple(c["modules"])}) for c in given.pop("candidates")]
            return cls(tuple(candidates), **given)
        except (KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{path} is a damaged selection ({error}): search again.") from None


def compare(selections: Sequence[Selection]) -> Stability:
    """How far selections of the same groups agree, such as those of several seeds or search-set sizes.

    Raises:
        ConfigError: fewer than two, or of different models.
    """
    names = {tuple(c.name for c in s.candidates) for s in selections}
    if len(names) > 1:
        raise ConfigError(
            "these selections are not of the same groups, so they cannot be compared: search the same model."
        )
    chosen = [[i for i, c in enumerate(s.candidates) if c.selected] for s in selections]
    return stability(chosen, len(selections[0].candidates) if selections else 0)


def _keys(candidates: Sequence[Candidate], granularity: str) -> tuple[int | str, ...]:
    return tuple(c.name if granularity == "module" else cast(int, c.block) for c in candidates)


def _json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
