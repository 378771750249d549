"""A and B of an adapter beside something else: their start, another adapter, or, where neither is known, a fresh draw's size.

The start is known where it is stored (the frozen twins of LoRA-Init) or can be drawn again from a run's seed. A draw that has no
more in common with A than chance is not its start, and is not shown as one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weftlora.report import measure
from weftlora.report.result import Against, SiteAgainst
from weftlora.report.subject import Start, Subject
from weftlora.site import Site

NOTHING_IN_COMMON = 0.1
"""Of the way from chance to 1: an overlap below it is that of another draw."""


def held_against(subject: Subject) -> Against | None:
    """What A and B are compared with, and how they compare; what cannot be known is added to `left_out`."""
    start = subject.start
    if start is not None and start.kind == "adapter":
        return _beside(subject, start)
    if (stored := _twins(subject)) is not None:
        return _beside(subject, stored)
    if any(_started(site) for site in subject.sites.values()):
        return None  # A began anew along directions that no twin keeps
    if start is not None:
        compared = _beside(subject, start)
        if _is_the_start(compared):
            return compared
        subject.left_out.append("A against its start: what the run's seed draws here has nothing in common with A.")
    return _sizes(subject)


def _is_the_start(compared: Against) -> bool:
    factors = [site.A for site in compared.sites if site.A is not None and site.A.overlap is not None]
    above = [
        (one.overlap - one.chance) / (1 - one.chance) for one in factors if one.overlap is not None and one.chance < 1
    ]
    return bool(factors) and (not above or sum(above) / len(above) > NOTHING_IN_COMMON)


def _beside(subject: Subject, start: Start) -> Against:
    rows = []
    for name, site in subject.sites.items():
        pair: dict[str, Any] = {}
        for part, known in (("A", start.A), ("B", start.B)):
            now, then = measure.factor(site, part), known.get(name)
            if now is None or then is None:
                continue
            if start.kind == "start drawn again":  # has all slots there is room for; later ones did not start there
                slots = _first_slots(site)
                now, then = site.structure.factors(1.0).A.detach()[slots], then[slots]
            if len(now):
                pair[part] = measure.alike(now, then.to(now.device))
        if pair:
            rows.append(SiteAgainst(name, pair.get("A"), pair.get("B")))
    return Against(start.kind, start.what, rows)


def _first_slots(site: Site) -> list[int]:
    """Live slots that were there at the start."""
    return [slot for slot in site.live() if site.birth is None or int(site.birth[slot]) == 0]


def _started(site: Site) -> bool:
    return site.start is not None and site.start.happened


def _twins(subject: Subject) -> Start | None:
    """The start that LoRA-Init's frozen twins are."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for name, site in subject.sites.items():
        if site.start is not None and (stored := site.start.stored()) is not None:
            live = site.live()
            A[name], B[name] = stored[0][live], stored[1][:, live].T
    return Start("stored start", "the start of A and B, which LoRA-Init keeps as frozen twins", A, B) if A else None


def _sizes(subject: Subject) -> Against | None:
    """Where the start is not known: how far A moved at least, from its size alone."""
    rows = []
    for name, site in subject.sites.items():
        slots = _first_slots(site)
        value = measure.factor(site, "A") if len(slots) == len(site.live()) else site.structure.factors(1.0).A[slots]
        if value is not None and len(value):
            rows.append(SiteAgainst(name, None, None, measure.size_of_a_fresh_draw(value)))
    subject.left_out.append(
        "Angles of A against its start: no file keeps the start of A. Compared instead: its size with that of a fresh draw; "
        "give against=... (--against), such as an early checkpoint."
    )
    return Against("fresh draw", "the size that a fresh Kaiming draw of A has", rows)
