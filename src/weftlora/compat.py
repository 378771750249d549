"""Which choices do not go together: one table feeds the check, the error, the documentation and the grid test.

A row names two choices and the reason to show. Rows go away as combinations are made to work.
"""

from __future__ import annotations

from weftlora.errors import CombinationError

REFUSED: dict[tuple[str, str], str] = {
    ("Tied", "Reallocate"): "tied sites share one A and B: a slot cannot move to another site",
    ("Tied", "Directions"): "one shared pair cannot start at each site's own directions",
    ("Hydra", "Directions"): "all heads would start equal at B₀, which is unproven",
    ("Dash", "Search"): "directions are launched in the training after the search, on the selected blocks",
    ("Directions", "Search"): "start directions are taken in the training after the search, on the selected blocks",
    ("Reallocate", "Search"): "ranks move in the training after the search, between the selected blocks",
    ("Hydra", "merge"): "the update depends on the token, so no single ΔW exists",
}


def check(*choices: object) -> None:
    """Raise `CombinationError` if two of the choices (instances, named by their class) are a row of `REFUSED`."""
    names = [type(choice).__name__ for choice in choices]
    for (one, other), reason in REFUSED.items():
        if one in names and other in names:
            raise CombinationError(f"{one} with {other}: {reason}. Drop one of the two, or see docs/composing.md.")
