"""Only: the named blocks (or modules) carry an adapter, all others carry none: no tensor, no gate, no gradient.

Blocks are numbered in the order in which the model lists them, from 0 and through all of its stacks: in an encoder-decoder
the encoder's come first (`weftlora.glue.blocks`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weftlora.errors import ConfigError
from weftlora.numbers import is_whole


@dataclass(frozen=True)
class Only:
    """Adapt these blocks and nothing else.

    Args:
        blocks: block numbers, or full names of blocks or modules ("model.layers.3", "model.layers.3.mlp.up_proj").
        gated: every site keeps one fixed number on its update, which starts at 1: where a continued search leaves its
            weights if the structure has no factor that could take them.

    Raises:
        ConfigError: nothing is named (peft would take an empty list for all blocks), or something that is no block.
    """

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
                    f"Only({named!r}): {block!r} is no block; use numbers from 0 up, or full names of blocks or modules."
                )
        if not isinstance(self.gated, bool):
            raise ConfigError(f"Only(gated={self.gated!r}) is neither true nor false: write one of the two.")
        numbers = sorted({block for block in named if isinstance(block, int)})
        object.__setattr__(self, "blocks", (*numbers, *sorted({block for block in named if isinstance(block, str)})))
