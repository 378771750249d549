"""Only: the named blocks (or modules) carry an adapter, all others carry none: no tensor, no gate, no gradient.

Blocks are numbered in the order in which the model lists them, from 0 and through all of its stacks: in an encoder-decoder
the encoder's come first (`weftlora.adapted.targets`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from weftlora.errors import ConfigError, TargetError, suggest
from weftlora.settings import is_whole
from weftlora.terms.events import Controller, Timeline
from weftlora.terms.layers import Blocks, Layers, SearchedLayers


@dataclass(frozen=True)
class Only(Layers):
    """Adapt these blocks and nothing else.

    Args:
        blocks: block numbers, or full names of blocks or modules ("model.layers.3", "model.layers.3.mlp.up_proj").
        gated: every site keeps one fixed number on its update, which starts at 1: where a continued search leaves its
            weights if the structure has no factor that could take them.

    Raises:
        ConfigError: nothing is named (peft would take an empty list for all blocks), or something that is no block.
    """

    takes: ClassVar[tuple[type, ...]] = (list, tuple, set, range)
    saves: ClassVar[Mapping[str, str]] = {"layer_gate": "what the module's update is weighed by"}
    source: ClassVar[str] = "named in the config"

    blocks: tuple[int | str, ...]
    gated: bool = False

    def __post_init__(self) -> None:
        given: Any = self.blocks
        if isinstance(given, (str, bytes, int)) or not isinstance(given, Iterable):
            raise ConfigError(f"Only({given!r}): name the blocks in a list, such as Only([0, 3]).")
        named = list(given)
        if not named:
            raise ConfigError("Only([]) adapts nothing: name at least one block, or use All().")
        for block in named:
            if not is_whole(block, 0) and not (isinstance(block, str) and block):
                raise ConfigError(
                    f"Only({named!r}): {block!r} is not a block; use numbers from 0 up, or full names of blocks or modules."
                )
        if not isinstance(self.gated, bool):
            raise ConfigError(f"Only(gated={self.gated!r}) is neither true nor false: use one of the two.")
        numbers = sorted({block for block in named if isinstance(block, int)})
        object.__setattr__(self, "blocks", (*numbers, *sorted({block for block in named if isinstance(block, str)})))

    @property
    def named(self) -> tuple[int | str, ...] | None:
        """The blocks."""
        return self.blocks

    @property
    def search(self) -> SearchedLayers | None:
        """None."""
        return None

    def adapts(self, blocks: Blocks, module_name: str) -> bool:
        """Whether it names the module, its block, or a module that it is in."""
        block = blocks.of(module_name)
        if block is not None and blocks.number[block] in self.blocks:
            return True
        names = (entry for entry in self.blocks if isinstance(entry, str))
        return any(module_name == name or module_name.startswith(f"{name}.") for name in names)

    def check(self, blocks: Blocks, targeted: Sequence[str]) -> None:
        """Every entry adapts something."""
        for entry in self.blocks:
            _check_entry(entry, blocks, targeted)

    def controllers(self, timeline: Timeline) -> list[Controller]:
        """Nothing happens."""
        return []


def _check_entry(entry: int | str, blocks: Blocks, targeted: Sequence[str]) -> None:
    names = blocks.names
    if isinstance(entry, int) and entry >= len(names):
        range_ = f", {names[0]} (0) to {names[-1]} ({len(names) - 1})" if names else ""
        raise TargetError(
            f"layers=Only names block {entry}, but {blocks.model_name} has {len(names)} blocks{range_}: count from 0, "
            "through all stacks."
        )
    if isinstance(entry, str) and entry not in blocks.modules:
        raise TargetError(f"layers=Only names {entry!r}, which {blocks.model_name} lacks: {suggest(entry, names)}")
    if not any(Only((entry,)).adapts(blocks, name) for name in targeted):
        where = repr(names[entry]) if isinstance(entry, int) else repr(entry)
        raise TargetError(
            f"layers=Only names {where}, in which no module is targeted: leave it out, or change target_modules."
        )
