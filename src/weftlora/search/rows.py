"""The rows of a search: two disjoint splits, and the endless seeded order in which each is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weftlora.errors import DataError
from weftlora.terms.layers.search import Search

Rows = Sequence[Any]
Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Splits:
    """Which rows the search trains on and which it measures on, as indices; disjoint in content too.

    `repeated`: training rows left out because an equal row is in the validation part.
    """

    train: list[int]
    validation: list[int]
    repeated: int


def split(train: Rows, validation: Rows | None, search: Search, seed: int) -> Splits:
    """At most `search.max_search_samples` rows; `search.val_size` of them held out where no validation rows are given.

    Raises:
        DataError: too few rows, or validation rows that are training rows too.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    if validation is not None:
        chosen = order[: search.max_search_samples]
        held = {digest(validation[i]) for i in range(len(validation))}
        if leaked := sum(digest(train[i]) in held for i in chosen):
            raise DataError(
                f"{leaked} of the {len(chosen)} training rows of the search are validation rows too: α would be fitted to rows "
                "that θ has seen; take them out of one of the two."
            )
        return _checked(Splits(chosen, list(range(len(validation))), 0))
    order = order[: search.max_search_samples]
    if len(order) <= search.val_size:
        raise DataError(
            f"the search has {len(order)} rows and is to hold out val_size={search.val_size} of them: give more rows, a smaller "
            "val_size, or validation rows of their own."
        )
    held_out, rest = order[: search.val_size], order[search.val_size :]
    seen = {digest(train[i]) for i in held_out}
    kept = [i for i in rest if digest(train[i]) not in seen]
    return _checked(Splits(kept, sorted(held_out), len(rest) - len(kept)))


def _checked(splits: Splits) -> Splits:
    for name in ("train", "validation"):
        if not getattr(splits, name):
            raise DataError(f"the search has no {name} rows: it needs some to train θ on, and others to train α on.")
    return splits


def digest(row: Any) -> bytes:
    """A hash of a row's content; equal rows have equal ones, whatever holds their numbers."""
    return hashlib.blake2b(repr(_plain(row)).encode(), digest_size=16).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(str(key), _plain(value[key])) for key in sorted(value, key=str)]
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def stack(rows: list[Any]) -> dict[str, Tensor]:
    """Rows of equal shapes as one batch. Raises DataError where they differ: they need padding, which is collate's work."""
    try:
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"the rows cannot be stacked into a batch ({error}): give collate=function of a list of rows."
        ) from None


class Cycle:
    """Indices 0 … n−1 for ever, every pass in another order of its own seed; `position` is all of its state."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.position = n, seed, 0
        self._turn, self._order = -1, list[int]()

    def take(self, count: int) -> list[int]:
        """The next `count` indices."""
        found = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return found

    def _at(self, position: int) -> int:
        turn, place = divmod(position, self.n)
        if self._turn != turn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            self._turn, self._order = turn, torch.randperm(self.n, generator=generator).tolist()
        return self._order[place]
