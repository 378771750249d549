"""What scoring rank slots costs beside the training it is part of, from counts alone, and which way of scoring that leaves.

    cost of a round, in forward passes of its rows         R live slots, n moved, L blocks; a pass with backward counts as two
        exact        R (L + 1) / L + 2                     two brackets, each from the block of its slot on
        shortlist    c n (L + 1) / L + 2 + 4
        taylor       4
    share            rounds · passes · rows · tokens of a row / (2 · steps · tokens of a step)

`score="auto"` is exact where that is at most a tenth; else the shortlist where that is; else, and where a number is unknown, the
estimate. Never by a clock, so that every machine decides the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from weftlora.terms.ranks.reallocate import GATE_STEPS, WAYS

BOUND = 0.1
"""The share of the training that scoring may cost where nobody chose a way."""
BACKWARD = 2
"""Forward passes that one pass with backward counts as: the base is frozen."""


@dataclass(frozen=True)
class Counts:
    """All that the cost depends on; None where it is unknown."""

    slots: int
    moved: int
    blocks: int
    rounds: int
    rows: int
    shortlist_factor: int
    row_tokens: float | None
    steps: int | None
    step_tokens: float | None

    def passes(self, way: str) -> float:
        """Forward passes of the rows of one round."""
        some = {"exact": self.slots, "shortlist": min(self.slots, self.shortlist_factor * self.moved)}.get(way, 0)
        ablated = some * (self.blocks + 1) / self.blocks + 2 if some else 0.0
        once = {"exact": 0, "sensitivity": BACKWARD, "gate": GATE_STEPS * BACKWARD}
        return ablated + once.get(way, 2 * BACKWARD)

    def tokens(self, way: str) -> float | None:
        """Of all rounds, each counted as often as it passes forward."""
        return None if self.row_tokens is None else self.rounds * self.passes(way) * self.rows * self.row_tokens

    def share(self, way: str) -> float | None:
        """Of the training, both in forward passes of tokens; None where a number is missing."""
        tokens = self.tokens(way)
        if tokens is None or self.steps is None or self.step_tokens is None:
            return None
        return tokens / (BACKWARD * self.steps * self.step_tokens)

    def way(self) -> str:
        """What "auto" decides."""
        for way in WAYS[:-1]:
            share = self.share(way)
            if share is not None and share <= BOUND:
                return way
        return WAYS[-1]
