"""How heads and routers come on over training, on the validation rows: a line in events.jsonl at every measurement.

    cosine         mean over modules of the mean cosine between their heads' Bs      1: the heads do the work of one
    entropy        of a token's weights, balance: of their mean                       both of ln N, means over modules
    information    mutual information of head and domain, of ln N                     0: every domain uses the heads alike
    domains        entropy by domain

The figures are those of `weftlora.adapted.routing`. Nothing is drawn and no tensor of the model changes, so that a run that is
followed ends with the adapter of the same run without.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from weftlora.adapted.routing import Routing, Seen, counted, information, likeness, routing
from weftlora.adapter.spec import WeftConfig
from weftlora.runs.scores import Collate

DIGITS = 5
"""Of a figure in events.jsonl."""


def is_routed(adapter: Any) -> bool:
    """Whether an adapter has routers to follow."""
    return isinstance(adapter, WeftConfig) and adapter.structure.routed


class Heads:
    """What the routers did with the rows of one measurement; rows come in order, a batch at a time through `collate`."""

    def __init__(self, record: Routing, domains: Sequence[str], collate: Collate) -> None:
        self.record, self.domains, self._collate = record, domains, collate
        self.seen: dict[str, dict[str, Seen]] = {}
        self._rows: tuple[list[str], Tensor | None] = ([], None)
        self._done = 0

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch; what was recorded of the one before is counted first, so that no more than one is kept."""
        self.count()
        batch = self._collate(features)
        self._rows = (list(self.domains[self._done : self._done + len(features)]), batch.get("attention_mask"))
        self._done += len(features)
        return batch

    def count(self) -> None:
        """Take in the weights of the batch that ran last: of tokens that are no padding, by the domain of their row."""
        names, mask = self._rows
        for module, calls in self.record.omega.items():
            for omega in calls:
                used = self.record.used(module, omega)
                by_row = used if used.dim() == 3 else used.reshape(len(names), -1, used.shape[-1])
                for domain in dict.fromkeys(names):
                    rows = [n for n, name in enumerate(names) if name == domain]
                    part = by_row[rows]
                    masks = [] if mask is None else [mask[rows].to(part.device)]
                    into = self.seen.setdefault(module, {}).setdefault(domain, Seen(part.shape[-1]))
                    into.add(counted(part, masks))
            calls.clear()

    def figures(self) -> dict[str, Any]:
        """Means over the modules; a cosine is None until two heads of one module are not 0."""
        parts = {module: {d: seen for d, seen in found.items() if seen.tokens} for module, found in self.seen.items()}
        whole = [Seen.pooled(found.values()) for found in parts.values()]
        alike = [value for site in self.record.sites.values() if (value := likeness(site)) is not None]
        told = [information(found.values()) for found in parts.values() if len(found) > 1]
        names = sorted({domain for found in parts.values() for domain in found if domain})
        return {
            "cosine": round(fmean(alike), DIGITS) if alike else None,
            "entropy": round(fmean(seen.sharpness for seen in whole), DIGITS),
            "balance": round(fmean(seen.balance for seen in whole), DIGITS),
            "information": round(fmean(told), DIGITS) if told else None,
            "domains": {
                d: round(fmean(found[d].sharpness for found in parts.values() if d in found), DIGITS) for d in names
            },
        }


@contextmanager
def following(model: nn.Module, domains: Sequence[str], collate: Collate) -> Iterator[Heads]:
    """Count what the routers of `model` do in the block, whose rows are of these domains ("" where one has none)."""
    with routing(model) as record:
        heads = Heads(record, domains, collate)
        yield heads
        heads.count()
