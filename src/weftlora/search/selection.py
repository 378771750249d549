"""The result of a search: a small JSON file that any config takes as `layers`, and that stock peft can use without weftlora."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from torch import nn

from weftlora.disk.files import write_text
from weftlora.errors import ConfigError, TargetError
from weftlora.extras import needs
from weftlora.foreign_text import html_table
from weftlora.search.agreement import Stability, stability
from weftlora.terms.layers.only import Only

FORMAT = 1
"""Of the file."""


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
        """The choice to give a config: `weftlora.HydraLoraConfig(layers=selection.layers)`."""
        return Only(self.blocks)

    @property
    def margin(self) -> float:
        """The smallest distance of an α from the threshold."""
        return min(abs(c.distance) for c in self.candidates)

    @property
    def near_ties(self) -> list[str]:
        """The groups that one more step could have turned."""
        return [c.name for c in self.candidates if c.near]

    @property
    def filled(self) -> list[str]:
        """The groups that the rule did not select, and `min_layers` did."""
        return [c.name for c in self.candidates if c.filled]

    def _repr_html_(self) -> str:
        rows = [
            (
                each.name,
                f"{each.alpha:+.4f}",
                f"{each.distance:+.4f}",
                "selected" if each.selected else "",
                "near tie" if each.near else "",
            )
            for each in self.candidates
        ]
        title = f"{len(self.chosen)} of {len(self.candidates)} {self.granularity}s selected, margin {self.margin:.4f}"
        columns = [self.granularity, "α", "α − threshold", "", ""]
        return html_table(title, columns, rows, ["One more step could have turned a near tie."] * bool(self.near_ties))

    def peft_config(self, **fields: Any) -> LoraConfig:
        """A stock LoRA of the searched rank and scale on the selected modules, by their full names.

        Args:
            fields: of peft's LoraConfig, over what the search had.
        """
        names = [name for c in self.chosen for name in c.modules]
        with needs("train", "a stock LoRA of a selection"):
            from weftlora.search.selection_file import Lora
        kept = {key: self.adapter[key] for key in Lora.model_fields if key in self.adapter}
        try:
            return LoraConfig(**{**kept, "target_modules": names, **fields})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"peft refuses a LoRA of this selection: {error}.") from None

    @property
    def others(self) -> int:
        """How many other selections of as many groups there are: more random ones than that cannot be drawn."""
        return math.comb(len(self.candidates), len(self.chosen)) - 1

    def controls(self, draws: int = 3, seed: int = 0) -> dict[str, Only]:
        """What a result must be held against: all groups, and selections of the same size made without a search.

        "random 1" … "random `draws`" (of `seed`), all different, none the selection itself, and fewer where there are only
        `others`; "first", "last", and "gradient norm": the largest mean ‖∇θ‖ during the search, which may be the
        selection. With all groups selected there is only "all".
        """
        n, k = len(self.candidates), len(self.chosen)
        found: dict[str, Sequence[int]] = {"all": range(n)}
        if k < n:
            found |= {f"random {i + 1}": drawn for i, drawn in enumerate(self._drawn(min(draws, self.others), seed))}
            by_norm = sorted(range(n), key=lambda i: (-self.candidates[i].gradient_norm, i))
            found |= {"first": range(k), "last": range(n - k, n), "gradient norm": sorted(by_norm[:k])}
        return {name: Only(_keys([self.candidates[i] for i in at], self.granularity)) for name, at in found.items()}

    def _drawn(self, count: int, seed: int) -> list[list[int]]:
        draw, n = random.Random(seed), len(self.candidates)
        chosen = [i for i in range(n) if self.candidates[i].selected]
        found: list[list[int]] = []
        while len(found) < count:
            drawn = sorted(draw.sample(range(n), len(chosen)))
            if drawn != chosen and drawn not in found:
                found.append(drawn)
        return found

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
        """Write the selection as JSON, whole or not at all. Raises RunError if the file cannot be written."""
        write_text(Path(path), self.text())

    def text(self) -> str:
        """The selection as JSON."""
        content = {"format": FORMAT, "layers": list(self.blocks), **dataclasses.asdict(self)}
        return json.dumps(content, indent=1, ensure_ascii=False, default=_json) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote. Raises ConfigError, naming file and key, if a value cannot be, or it is of a newer weftlora."""
        with needs("train", "reading a saved selection"):
            from weftlora.search.selection_file import read
        content = read(path, FORMAT)
        given = {f.name: content[f.name] for f in dataclasses.fields(cls)}
        candidates = [Candidate(**{**c, "modules": tuple(c["modules"])}) for c in given.pop("candidates")]
        return cls(tuple(candidates), **given)


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
