"""The decision in plain numbers: who goes, who receives, ties, room, budgets; and what a choice refuses."""

from __future__ import annotations

import itertools
import random

import pytest

import weftlora
from weftlora.settings import epochs, rounds
from weftlora.terms.ranks.reallocate import Plan, Reallocate, Room, Slot, allocate, decide


def counts(added: list[tuple[int, int]]) -> list[int]:
    return [sum(m == n for m, _ in added) for n in sorted({m for m, _ in added})]


def rooms(count: int, free: int = 99, cost: int = 1) -> list[Room]:
    return [Room(m, tuple(range(50, 50 + free)), cost) for m in range(count)]


def slots(scores: dict[int, list[float]]) -> list[Slot]:
    return [Slot(m, i, value) for m, values in scores.items() for i, value in enumerate(values)]


def test_the_papers_allocation() -> None:
    assert counts(allocate(rooms(3), 8)) == [3, 3, 2]
    assert counts(allocate(rooms(217), 7)) == [1] * 7
    assert allocate([], 8) == []


def test_the_remainder_goes_to_the_highest_mean() -> None:
    plan = decide(slots({0: [0.0] * 8 + [9.0], 1: [2.0], 2: [4.0], 3: [3.0]}), rooms(4), 8)
    assert plan.receivers == (2, 3, 1)
    assert {m: sum(n == m for n, _ in plan.added) for m in (2, 3, 1)} == {2: 3, 3: 3, 1: 2}


def test_where_every_module_lost_a_slot_nothing_is_added_and_the_total_drops() -> None:
    plan = decide(slots({0: [0.0, 5.0], 1: [1.0, 5.0]}), rooms(2), 2)
    assert plan == Plan(((0, 0), (1, 0)), (), (), ("every module lost a slot, so none were made",))


def test_what_a_full_module_cannot_take_goes_on() -> None:
    given = [Room(0, (7,)), Room(1, (4, 5, 6)), Room(2, ())]
    assert allocate(given, 8) == [(0, 7), (1, 4), (1, 5), (1, 6)]


def test_ties_go_by_score_then_the_younger_then_the_place() -> None:
    tied = [Slot(1, 0, 0.5), Slot(0, 3, 0.5), Slot(0, 2, 0.5), Slot(2, 0, 0.5, birth=2), Slot(3, 0, 0.4)]
    random.Random(0).shuffle(tied)
    assert decide(tied, rooms(4), 4).pruned == ((3, 0), (2, 0), (0, 2), (0, 3))


def test_a_slot_that_is_not_able_stays_but_counts_in_the_mean() -> None:
    given = [Slot(0, 0, -9.0, able=False), Slot(0, 1, 9.0), Slot(1, 0, 0.0), Slot(2, 0, 1.0)]
    plan = decide(given, rooms(3), 1)
    assert plan.pruned == ((1, 0),)
    assert plan.receivers == (2, 0)


def test_worth_not_score_orders_the_receivers() -> None:
    given = [Slot(0, 0, 5.0, worth=1.0), Slot(1, 0, 4.0, worth=2.0), Slot(2, 0, 0.0)]
    assert decide(given, rooms(3), 1).receivers == (1, 0)


@pytest.mark.parametrize("revive", [False, True])
def test_a_module_without_slots_receives_only_where_it_may_be_revived(revive: bool) -> None:
    plan = decide(slots({0: [0.0, 1.0], 1: [3.0]}), rooms(3), 1, revive=revive)
    assert plan.receivers == ((1, 2) if revive else (1,))


def test_a_budget_of_parameters_is_never_exceeded() -> None:
    """Two slots of cost 3 make room for one of cost 5; the 1 that is left waits for the next round."""
    given = [Room(0, (9,), 3), Room(1, (5, 6), 5)]
    plan = decide(slots({0: [0.0, 0.1, 7.0], 1: [8.0]}), given, 2, budget=14)
    assert (plan.pruned, plan.added) == (((0, 0), (0, 1)), ((1, 5),))


def test_random_rounds_keep_the_invariants() -> None:
    """Σ ≤ target, = target where somebody could receive; who loses does not receive."""
    dice = random.Random(1)
    for _ in range(200):
        modules, r, capacity = dice.randint(2, 6), dice.randint(1, 4), 6
        live = {m: set(range(r)) for m in range(modules)}
        target = modules * r
        for number in range(1, 5):
            given = [Slot(m, s, dice.choice([0.0, dice.random()])) for m in live for s in sorted(live[m])]
            free = [Room(m, tuple(s for s in range(capacity) if s not in live[m])) for m in live]
            before = len(given)
            plan = decide(given, free, dice.randint(1, 4))
            assert {m for m, _ in plan.pruned}.isdisjoint(m for m, _ in plan.added)
            for m, s in plan.pruned:
                live[m].remove(s)
            for m, s in plan.added:
                assert s not in live[m]
                live[m].add(s)
            now = sum(map(len, live.values()))
            assert now <= before <= target
            room = sum(capacity - len(live[m]) for m in plan.receivers) + len(plan.added)
            assert now == before - len(plan.pruned) + min(len(plan.pruned), room), number
            if not now:
                break


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"move": "blocks"}, "did you mean|use one of"),
        ({"move": 0}, "move=0"),
        ({"score": "exat"}, "did you mean 'exact'"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"rows": 0}, "rows=0"),
        ({"first": -1}, "is not a time"),
        ({"max_rounds": -1}, "from 0 up"),
        ({"revive": 1}, "neither true nor false"),
        ({"seed": "x"}, "is not a seed"),
        ({"max_rank": 0}, "max_rank=0"),
    ],
)
def test_a_choice_refuses_what_cannot_work(fields: dict, match: str) -> None:
    with pytest.raises(weftlora.ConfigError, match=match):
        Reallocate(**fields)


def test_capacity_is_twice_the_rank_and_no_more_than_the_weight_has() -> None:
    assert Reallocate().capacity(8, 100, 100) == 16
    assert Reallocate().capacity(8, 100, 10) == 10
    assert Reallocate().capacity(8, 100, 4) == 8
    assert Reallocate(max_rank=12).capacity(8, 100, 100) == 12
    with pytest.raises(weftlora.ConfigError, match="below the initial rank 8"):
        Reallocate(max_rank=7).capacity(8, 100, 100)


def test_a_choice_survives_the_configs_own_json() -> None:
    config = weftlora.AllocLoraConfig(
        r=4, first=weftlora.epochs(1), every=weftlora.epochs(0.25), move=3, score="taylor"
    )
    assert weftlora.WeftConfig(**config.to_dict()).ranks == config.ranks


def test_a_run_draws_by_its_own_seed_unless_the_user_named_one() -> None:
    assert Reallocate().seeded(7).seed == 7
    assert Reallocate(seed=1).seeded(7).seed == 1
    assert weftlora.Plain().seeded(7) == weftlora.Plain()


def test_the_papers_times() -> None:
    """Rounds at epochs 1, 1.25, … 2.75 of three, by fraction of the run and by epochs."""
    assert (Reallocate().first, Reallocate().every, Reallocate().max_rounds) == (1 / 3, 1 / 12, 8)
    expected = [100, 125, 150, 175, 200, 225, 250, 275]
    assert rounds(1 / 3, 1 / 12, 8, 300, None) == expected
    assert rounds(epochs(1), epochs(0.25), 8, None, 100) == expected


def test_rounds_are_at_least_one_step_apart_in_very_short_epochs() -> None:
    for per_epoch in (1, 2, 3):
        found = rounds(epochs(1), epochs(0.25), 8, None, per_epoch)
        assert found is not None
        assert found[0] == per_epoch
        assert all(b - a >= 1 for a, b in itertools.pairwise(found))
    assert rounds(0.5, 0.1, 3, None, None) is None
