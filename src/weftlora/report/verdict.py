"""What an inspection comes to: a few sentences, most important first; a pure function of the record."""

from __future__ import annotations

import statistics

from weftlora.report.result import Inspection

EVEN = 0.98
"""Normalised entropy above which a router mixes all heads as good as evenly."""
CHOICE = 0.6
"""Normalised entropy below which a token goes to one head mostly: with three heads, a largest gate of about 0.8."""
USED = 0.9
"""Entropy of the mean gate above which no head is neglected."""
SAME = 0.9
"""Cosine above which heads do the same."""
SLIGHT = 0.5
"""Cosine above which heads are more alike than not."""


def verdict(found: Inspection) -> list[str]:
    """The sentences; numbers are those of the record, rounded."""
    said = [_size(found), _movement(found), *_routers(found), *_ranks(found), *_layers(found), *_directions(found)]
    return [*said, _merging(found)]


def _size(found: Inspection) -> str:
    p, blocks = found.parameters, {site.block for site in found.sites if site.block}
    of_base = f" ({p.trained / p.base:.2%} of the base)" if p.base else ""
    shared = f", in {_count(len(found.groups), 'tied group')}" if found.groups else ""
    where = f" in {_count(len(blocks), 'block')}" if blocks else ""
    return f"{p.trained:,} trained numbers{of_base} on {_count(len(found.sites), 'site')}{where}{shared}."


def _movement(found: Inspection) -> str:
    moving = [site for site in found.sites if site.norm > 0]
    if not moving:
        return "ΔW is 0 at every site: this adapter does nothing yet."
    still = f"; {_count(len(found.sites) - len(moving), 'site')} did not move" if len(moving) < len(found.sites) else ""
    relative = [site.relative for site in moving if site.relative is not None]
    if relative:
        most = max(moving, key=lambda site: site.relative or 0.0)
        return (
            f"ΔW is {statistics.median(relative):.2%} of W at the median site and {most.relative:.2%} at most, in {most.site}"
            f"{still}."
        )
    most = max(moving, key=lambda site: site.norm)
    median = statistics.median(site.norm for site in moving)
    return f"‖ΔW‖ is {median:.3g} at the median site and largest, {most.norm:.3g}, in {most.site}{still}."


def _routers(found: Inspection) -> list[str]:
    said = []
    if found.routers is not None:
        entropy = statistics.mean(site.whole.entropy for site in found.routers.sites)
        balance = statistics.mean(site.whole.balance for site in found.routers.sites)
        said.append(
            f"The routers {_routing(entropy, balance)}: entropy {entropy:.2f}, balance {balance:.2f} (1 is even)."
        )
    known = [site.mean for site in found.heads if site.mean is not None]
    if known:
        mean = statistics.mean(known)
        how = "do nearly the same" if mean > SAME else "are more alike than not" if mean > SLIGHT else "are distinct"
        said.append(f"The heads {how}: their B's have a mean cosine of {mean:.2f}.")
    elif found.heads:
        said.append("All heads are 0: nothing has been trained.")
    return said


def _routing(entropy: float, balance: float) -> str:
    """What they do; balance less entropy is how much the head depends on the token (mutual information, of ln N)."""
    if entropy > EVEN:
        return "mix all heads almost evenly for every token, so they hardly route"
    if balance - entropy < 1 - EVEN:
        return "give every token nearly the same mix of heads, so they hardly route"
    how = "choose among the heads" if entropy < CHOICE else "mix the heads in shares that depend on the token"
    return f"{how}, and {'use all of them' if balance > USED else 'prefer some of them'}"


def _ranks(found: Inspection) -> list[str]:
    if found.history is None:
        return []
    taken = sum(len(each.taken) for each in found.history.rounds)
    now = sum(site.rank for site in found.sites)
    empty = sum(site.rank == 0 for site in found.sites)
    none = f"; {_count(empty, 'site')} ended without any" if empty else ""
    return [
        f"{_count(taken, 'move')} of rank slots in {_count(len(found.history.rounds), 'round')}, among {now}{none}."
    ]


def _layers(found: Inspection) -> list[str]:
    layers = found.layers
    if layers.margin is None:
        return []
    chosen = sum(candidate.selected for candidate in layers.candidates)
    near = [candidate.name for candidate in layers.candidates if candidate.near]
    doubt = f"; one more step could have turned {', '.join(near)}" if near else ""
    return [
        f"{chosen} of {_count(len(layers.candidates), layers.granularity)} selected, with a margin of {layers.margin:.2g}{doubt}."
    ]


def _directions(found: Inspection) -> list[str]:
    waiting = sorted({site.phase for site in found.directions if site.phase.startswith("before")})
    if waiting:
        return [f"This adapter is still {waiting[0]}: it has chosen no directions of W so far."]
    gains = [abs(c.gain) for site in found.directions for c in site.chosen if c.gain is not None]
    return (
        [f"Dash has learned gains of {statistics.mean(gains):.2g} on average, {max(gains):.2g} at most."]
        if gains
        else []
    )


def _merging(found: Inspection) -> str:
    cannot = [site for site in found.sites if not site.mergeable]
    if not cannot:
        there = "" if found.base else " (whether this base can take it was not asked)"
        return f"Every site can be merged exactly{there}."
    which = "No site" if len(cannot) == len(found.sites) else f"Of {len(found.sites)} sites, {len(cannot)}"
    return f"{which} can{'' if which == 'No site' else 'not'} be merged: {str(cannot[0].why_not).rstrip('.')}."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
