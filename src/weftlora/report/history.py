"""What happened to an adapter on its way: which layers were selected, and where rank slots went."""

from __future__ import annotations

from typing import Any

from weftlora.report.measure import split_name
from weftlora.report.result import BlockChoice, Layers, RankHistory, RankRound
from weftlora.report.subject import Subject


def layers(subject: Subject) -> Layers:
    """The candidates of the search with α and margins, where its selection is at hand; else the blocks that are adapted."""
    if (selection := subject.selection) is not None:
        rows = [BlockChoice(c.name, c.selected, c.alpha, c.alpha_hat, c.distance, c.near) for c in selection.candidates]
        return Layers("the search's selection", selection.granularity, rows, selection.margin)
    blocks = dict.fromkeys(split_name(name)[0] or name for name in subject.sites)
    source = "all that are targeted" if subject.config is None else subject.config.layers.source
    return Layers(source, "block", [BlockChoice(name, True) for name in blocks], None)


def rank_history(subject: Subject) -> RankHistory | None:
    """The rounds of moving rank slots; None where none was recorded.

    A round that was repeated after a kill stands there once, as it went the last time.
    """
    told = [event for event in subject.events if event.get("event") == "reallocation"]
    try:
        mine = [_round(event, subject) for event in told if event.get("adapter") in (None, "default", subject.adapter)]
    except (KeyError, TypeError, ValueError):
        subject.left_out.append(f"Ranks over time: {subject.events_from} is damaged.")
        return None
    as_it_went = {each.round: each for each in mine}
    rounds = [as_it_went[number] for number in sorted(as_it_went)]
    born = {name: site.birth for name, site in subject.sites.items() if site.birth is not None}
    if rounds:
        return RankHistory(subject.events_from, {n: site.initial_rank for n, site in subject.sites.items()}, rounds)
    if born:
        made = sum(int((birth[site.live()] > 0).sum()) for n, birth in born.items() for site in [subject.sites[n]])
        live = sum(len(site.live()) for site in subject.sites.values())
        last = max(int(birth.max()) for birth in born.values())
        if last:
            subject.left_out.append(
                f"Ranks over time: a run's events.jsonl tells them. The adapter itself knows that {made} of its {live} live slots "
                f"were made later, the last in round {last}."
            )
    return None


def _round(event: dict[str, Any], subject: Subject) -> RankRound:
    return RankRound(
        step=int(event["step"]),
        round=int(event["round"]),
        taken=[(str(name), int(slot), score) for name, slot, score in event["pruned"]],
        made=[(str(name), int(slot)) for name, slot in event["added"]],
        ranks={name: int(event["ranks"][name]) for name in subject.sites},
    )
