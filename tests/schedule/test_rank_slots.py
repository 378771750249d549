"""What slots are worth by each way of scoring, and what of it reaches the decision; groups; what a round tells of its scores."""

from __future__ import annotations

import pytest
import torch
from allocating import HELD_OUT, adam, alora, controller, events, random_factors, ranks, scorer, train
from dashing import sites, tensors
from torch import Tensor, nn

import weftlora
from weftlora.schedule import direction_ranking, processes
from weftlora.schedule.rank_slots import Share, agreement, block_of, kind_of, scores


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


def test_the_last_slot_stays_and_the_event_says_so() -> None:
    """The second of two slots would go in round 2: nobody had room for the first. Nothing raises within `optimizer.step`."""
    fields = {"target_modules": ["0.mlp.up_proj", "1.mlp.up_proj"], "r": 1, "move": 1, "max_rank": 1, "every": 1}
    model = alora(score="random", first=1, all_lost="end", **fields)
    train(model, 2)
    assert sorted(ranks(model).values()) == [0, 1]
    one, other = events(model)
    assert (one["lost"], one["clipped"]) == (1, ["modules that lost none have no room for 1 (max_rank)"])
    assert (other["pruned"], other["clipped"]) == ([], ["the last slot stays"])
    kept = alora(score="random", first=1, **fields)
    train(kept, 2)
    assert sorted(ranks(kept).values()) == [1, 1]
    assert [e["clipped"] for e in events(kept)] == [["modules that lost none have room for 0 (max_rank)"]] * 2


def test_as_many_slots_move_as_there_is_room_for() -> None:
    """20 of 28 slots, room for 4 in each of 14 modules: the more are taken away, the fewer modules can take them."""
    model = alora(score="random", move=20, max_rounds=5, every=1, seed=1)
    train(model, 8)
    fitted = [e for e in events(model) if "have room for" in e["clipped"][0]]
    assert fitted
    for event in fitted:
        assert event["asked"] == 20
        assert 0 < len(event["pruned"]) < 20
        assert (len(event["added"]), event["lost"]) == (len(event["pruned"]), 0)
        assert event["clipped"] == [f"modules that lost none have room for {len(event['added'])} (max_rank)"]


@pytest.mark.parametrize("rule", ["go_on", "end"])
def test_where_every_module_lost_a_slot_the_total_drops_and_rounds_go_on_or_end(rule: str) -> None:
    model = alora(score="random", move=27, max_rounds=3, every=1, seed=1, all_lost=rule)
    train(model, 8)
    first, *others = events(model)
    assert (first["added"], first["slots"], first["lost"]) == ([], 1, 27)
    assert len(others) == (2 if rule == "go_on" else 0)
    assert sum(ranks(model).values()) == 1
    assert controller(model).done()


def test_a_config_saved_before_keeps_the_rule_that_it_was_saved_with() -> None:
    """Its format says so, not whether it names the field: format 1 had none."""
    saved = weftlora.AllocLoraConfig(first=1).to_dict()
    assert (saved["format_version"], saved["ranks"]["all_lost"]) == (2, "go_on")
    old = {**saved, "format_version": 1, "ranks": {k: v for k, v in saved["ranks"].items() if k != "all_lost"}}
    assert weftlora.WeftConfig(**old).ranks.all_lost == "end"
    again = weftlora.WeftConfig(**old).to_dict()
    assert (again["format_version"], again["ranks"]["all_lost"]) == (2, "end")
    new = {**old, "format_version": 2}
    assert weftlora.WeftConfig(**new).ranks.all_lost == "go_on"


def test_scores_that_are_no_numbers_move_nothing_and_training_goes_on() -> None:
    model = alora(max_rounds=2)
    optimizer = adam(model)
    train(model, 2, optimizer)
    site = next(iter(sites(model).values()))
    with torch.no_grad():
        site.structure.B[0, 0] = float("inf")
    with pytest.warns(UserWarning, match="round 1 of moving ranks moves nothing"):
        train(model, 3, optimizer, start=2)
    [event] = events(model)
    assert (event["pruned"], event["added"], event["slots"], event["lost"]) == ([], [], 28, 0)
    assert "diverged" in event["clipped"][0]
    assert controller(model).rounds == 1


def test_one_module_has_nowhere_to_move_a_slot() -> None:
    with pytest.raises(
        weftlora.ConfigError, match="one adapted module and moves rank between modules: target two or more"
    ):
        train(alora(score="random", target_modules=["0.mlp.up_proj"], move=1), 1)


def test_an_event_counts_the_parameters_of_the_slots_that_are_there() -> None:
    """A slot is a row of A and a column of B."""
    model = alora(score="random", first=1, max_rounds=1, move=3)
    train(model, 2)
    [event] = events(model)
    sizes = {
        name: sum(layer.weight.shape)
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "weft_site")
    }
    assert event["parameters"] == sum(rank * sizes[name] for name, rank in event["ranks"].items())


# ---------------------------------------------------------------------- several processes, as far as one can tell


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_the_rows_add_up_to_all_of_them_in_equally_many_passes(processes: int) -> None:
    """Also where they do not divide; each share counts all labels of the batch."""
    s = scorer(scored("shortlist"))
    ids, batch = controller(s.model).scoring.live()[:3], s.drawn("a")
    assert len(batch["labels"]) % 3
    each = [Share(number, processes) for number in range(processes)]
    assert len({len(share.of(batch)["labels"]) for share in each}) == 1
    for measure in (s.exact, s.estimate):
        parts = [measure(ids, "a", share=share) for share in each]
        assert all(bool((part == 0).all(0).all(0).any()) for part in parts)
        torch.testing.assert_close(sum(parts), measure(ids, "a"), rtol=1e-3, atol=1e-6)


def test_with_two_processes_rows_are_compared_before_they_are_scored_on(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(processes, "check_same", lambda _, what, __: compared.append(what))
    scoring = controller(alora()).scoring
    for world, times in ((1, 0), (2, 1)):
        monkeypatch.setattr(processes, "world", lambda world=world: world)
        monkeypatch.setattr(processes, "fail", lambda *_: None)
        scoring._check_same_rows("0/1", other=False)
        assert len(compared) == times


def test_word_of_a_process_that_has_ended_is_the_first_line_of_what_the_wait_for_it_gave() -> None:
    def wait() -> None:
        raise RuntimeError("Connection closed by peer\nraised from a frame")

    with pytest.raises(weftlora.WeftError, match=r"another process has ended \(Connection closed by peer\)$"):
        processes._in_lockstep(wait, "scoring")


def test_what_a_process_says_and_what_the_main_one_has_comes_over_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("torch.distributed is not available, or in use")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        here, plan = torch.device("cpu"), torch.tensor([[3, 1], [4, 1]])
        assert processes._said_by(0, "1ß" + "x" * 3000, here) == "1ß" + "x" * 1997
        monkeypatch.setattr(processes, "world", lambda: 2)  # of which this is the main one
        assert torch.equal(processes.from_main(plan, here), plan)
        rule = direction_ranking.Rule(1e-8, "top", 0)
        sent = direction_ranking._share(None, [rule], next(iter(sites(alora()).values())), here, 0)
        assert (len(sent.found[rule].index), sent.largest, sent.seconds) == (0, 0.0, 0.0)
    finally:
        dist.destroy_process_group()
