"""What slots are worth by each way of scoring, and what of it reaches the decision; groups; what a round tells of its scores."""

from __future__ import annotations

import pytest
import torch
from allocating import HELD_OUT, adam, alora, controller, events, random_factors, ranks, scorer, train
from dashing import sites, tensors
from torch import Tensor, nn

import weftlora
from weftlora.schedule.rank_slots import agreement, block_of, kind_of, scores


def scored(score: str, **fields) -> nn.Module:
    """After one round on slots that all contribute."""
    model = alora(score=score, first=1, max_rounds=1, **fields)
    random_factors(model)
    return model


# ---------------------------------------------------------------------- ways of scoring


def test_a_shortlist_prunes_by_exact_scores_and_gives_by_estimates() -> None:
    model = scored("shortlist", move=3, shortlist_factor=2)
    scoring, s = controller(model).scoring, scorer(model)
    ids = scoring.live()
    guess, truth = (scores(way(ids, "0/1"), "both") for way in (s.estimate, s.exact))
    found = scoring.measure(1)
    short = sorted(range(len(ids)), key=lambda n: guess[n])[:6]
    assert sorted(found.scored) == sorted(short)
    assert [slot.able for slot in found.slots] == [n in short for n in range(len(ids))]
    assert [slot.worth for slot in found.slots] == guess
    assert [found.slots[n].score for n in found.scored] == pytest.approx([truth[n] for n in found.scored], abs=1e-7)
    train(model, 1, adam(model, lr=1e-12))
    [event] = events(model)
    pruned = sorted(short, key=lambda n: truth[n])[:3]
    names = list(sites(model))
    assert [tuple(p[:2]) for p in event["pruned"]] == [(names[ids[n][0]], ids[n][1]) for n in pruned]
    mean = {m: sum(g for g, (k, _) in zip(guess, ids, strict=True) if k == m) / 2 for m in range(len(names))}
    for n in pruned:
        mean.pop(ids[n][0], None)
    assert [name for name, _ in event["added"]] == [names[m] for m in sorted(mean, key=lambda m: -mean[m])[:3]]


@pytest.mark.parametrize("terms", ["both", "last_in", "first_in"])
def test_the_brackets_that_count_are_those_asked_for(terms: str) -> None:
    model = scored("exact", terms=terms)
    last_in, first_in = scorer(alora_like(model)).exact(controller(model).scoring.live(), "0/1").sum(2).T
    wanted = {"both": last_in + first_in, "last_in": last_in, "first_in": first_in}[terms]
    found = [slot.score for slot in controller(model).scoring.measure(1).slots]
    torch.testing.assert_close(torch.tensor(found).double(), wanted, rtol=0, atol=1e-7)


def alora_like(model: nn.Module) -> nn.Module:
    """The same adapter, which scores both brackets."""
    other = alora()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("resample", [True, False])
def test_rows_are_drawn_by_seed_and_round(resample: bool) -> None:
    drawn = []
    for seed in (0, 0, 3):
        model, seen = alora(resample=resample, seed=seed, max_rounds=3), list[Tensor]()
        real = scorer(model).drawn
        scorer(model).drawn = lambda *a, real=real, seen=seen, **k: (
            seen.append(real(*a, **k)["input_ids"]),
            real(*a, **k),
        )[1]
        train(model, 8)
        assert len(seen) == 3
        assert torch.equal(seen[0], seen[1]) != resample
        drawn.append(torch.stack(seen))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("score", ["exact", "shortlist", "taylor", "random"])
def test_two_runs_with_one_seed_end_at_the_same_bytes_and_another_seed_elsewhere(score: str) -> None:
    told, ends = [], []
    for seed in (0, 0, 1):
        model = alora(score=score, seed=seed)
        train(model, 6)
        told.append([{k: v for k, v in event.items() if k != "seconds"} for event in events(model)])
        ends.append(tensors(model))
    assert told[0] == told[1]
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
    assert [e["pruned"] for e in told[0]] != [e["pruned"] for e in told[2]]


# ---------------------------------------------------------------------- what is told


@pytest.mark.parametrize("score", ["exact", "shortlist", "taylor", "random"])
def test_each_way_tells_how_it_agrees_beside_the_noise_of_the_rows(score: str) -> None:
    """Against exact scores on the rows in use; the ceiling is exact scores on rows that were not in use."""
    model = scored(score, check=True, move=5, shortlist_factor=2)
    scoring, s = controller(model).scoring, scorer(model)
    ids = scoring.live()
    truth, others = (scores(s.exact(ids, "0/1", other=other), "both") for other in (False, True))
    found = scoring.measure(1)
    told = scoring.check(1, found)["agreement"]
    assert told["exact_on_other_rows"] == pytest.approx(agreement(others, truth, 5))
    assert 0 < told["exact_on_other_rows"]["spearman"] < 1
    if score == "exact":
        assert told.keys() == {"exact_on_other_rows"}
        return
    worst = max(slot.score for slot in found.slots) + 1
    guess = [slot.score if slot.able else worst for slot in found.slots]
    assert told["score_in_use"] == pytest.approx(agreement(guess, truth, 5))
    if score != "random":
        assert told["score_in_use"]["spearman"] > 0.5


def test_rows_that_are_checked_against_were_not_scored_on() -> None:
    s = scorer(alora(check=True, rows=9))
    one, other = (s.drawn("0/1", other=each)["input_ids"].tolist() for each in (False, True))
    assert (len(one), len(other)) == (9, 9)
    assert not [row for row in one if row in other]
    assert all(row in [held["input_ids"].tolist() for held in HELD_OUT] for row in one + other)


# ---------------------------------------------------------------------- groups, and the last slot


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.11.mlp.up_proj", "model.layers.11", "model.layers.#.mlp.up_proj"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0", "transformer.h.#.attn.c_attn"),
        ("encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1", "encoder.block.#.layer.#.SelfAttention.q"),
        ("decoder.block.1.layer.0.SelfAttention.q", "decoder.block.1", "decoder.block.#.layer.#.SelfAttention.q"),
        ("layers.0.expert2.w1", "layers.0", "layers.#.expert2.w1"),
        ("0", "0", "#"),
        ("head", "", "head"),
    ],
)
def test_the_block_and_the_kind_of_a_module(name: str, block: str, kind: str) -> None:
    assert (block_of(name), kind_of(name)) == (block, kind)


def test_a_network_without_a_slot_is_refused_and_stays_as_it_was() -> None:
    """The second of two slots would go in round 2: nobody had room for the first."""
    fields = {"target_modules": ["0.mlp.up_proj", "1.mlp.up_proj"], "r": 1, "move": 1, "max_rank": 1, "every": 1}
    model = alora(score="random", first=1, **fields)
    optimizer = adam(model)
    train(model, 1, optimizer)
    assert sorted(ranks(model).values()) == [0, 1]
    with pytest.raises(
        weftlora.ConfigError, match="would leave no live slot in the network: move fewer, or do fewer rounds"
    ):
        train(model, 2, optimizer, start=1)
    assert sorted(ranks(model).values()) == [0, 1]
    assert controller(model).rounds == 1


def test_where_every_module_lost_a_slot_the_total_drops_and_rounds_end() -> None:
    model = alora(score="random", move=27, max_rounds=3, every=1, seed=1)
    train(model, 8)
    [event] = events(model)
    assert event["added"] == []
    assert sum(ranks(model).values()) == event["slots"] == 1
    assert not controller(model).scoring.choice.needs_data
    assert controller(model).done()
