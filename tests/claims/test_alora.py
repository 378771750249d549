"""ALoRA with AB-LoRA scores (arXiv 2403.16187): what it must be before anything moves, and what its scores must find.

IS(i) = S(M) − S(M∖i) + S({i}), S = −L;  the n lowest are pruned, n new ones go to the modules that lost none;  until a round,
and with no moves at all, it is LoRA.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

import weftlora
from families import FAMILIES, adapter_config, logits
from weftlora.adapted.layer import WeftLinear
from weftlora.terms.ranks.reallocate import GATE_MOVE, GATE_STEPS, Room, Slot, decide

sys.path.insert(0, str(Path(__file__).parents[1] / "schedule"))
from allocating import TOKENS, adam, alora, controller, events, random_factors, ranks, scorer, train
from dashing import sites

# ---------------------------------------------------------------------- with all gates 1 it is LoRA


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.05, 0.9)]
)
@pytest.mark.parametrize("structure", ["plain", "hydra", "hydra_Ax"])
def test_all_gates_1_is_the_structure_without_gates_bit_for_bit(structure: str, make, dropout: float) -> None:
    """Twenty optimiser steps from one seed: losses, factors and moments, in spite of the room for as many slots again."""
    runs = []
    for ranks_ in (weftlora.Uniform(), weftlora.Reallocate(first=99, max_rounds=1, score="random")):
        base = FAMILIES["llama"].build()
        torch.manual_seed(3)
        model = get_peft_model(base, adapter_config(structure, "llama", ranks=ranks_, lora_dropout=dropout)).train()
        optimizer, losses = make(weftlora.param_groups(model, lr=1e-2, weight_decay=0.1)), []
        for step in range(20):
            ids = TOKENS[2 * step : 2 * step + 2]
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append((losses, list(sites(model).values()), logits(model, {"input_ids": TOKENS[:4]})))
    (losses, lora, end), (its_losses, ours, its_end) = runs
    assert losses == its_losses
    assert torch.equal(end, its_end)
    for one, other in zip(lora, ours, strict=True):
        assert other.structure.A.shape[0] == 8
        assert torch.equal(one.structure.A, other.structure.A[:4])
        live = other.structure.B.unflatten(1, (-1, 8))[:, :, :4].flatten(1)
        assert torch.equal(one.structure.B, live)
        assert torch.count_nonzero(other.structure.A[4:]) == 0


def test_without_moves_it_is_lora_to_the_end() -> None:
    none, zero = alora(score="none"), alora(max_rounds=0)
    assert train(none, 8) == train(zero, 8)
    assert set(ranks(none).values()) == {2}


# ---------------------------------------------------------------------- what the scores must find


def planted() -> tuple[nn.Module, list[str]]:
    """A model whose labels come from a teacher: the base plus a large ΔW in two modules. The student has found it, and has
    small random slots everywhere else."""
    model = alora(r=2, first=1, max_rounds=1, move=4).double()
    random_factors(model, size=1e-3)
    at = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name in at:
            b = sites(model)[name].structure.B
            b[:, :2] = 1.5 * torch.randn(b.shape[0], 2, generator=draw)
        teacher = model.eval()(input_ids=TOKENS[40:]).logits[:, :-1].argmax(-1)
    labels = torch.cat([torch.full((len(teacher), 1), -100), teacher], 1)
    weftlora.attach(model, validation=[{"input_ids": i, "labels": y} for i, y in zip(TOKENS[40:], labels, strict=True)])
    return model.train(), at


def totals(model: nn.Module) -> dict[tuple[str, int], tuple[float, float]]:
    slots = controller(model).scoring.live()
    names = list(sites(model))
    found = scorer(model).exact(slots, "a").sum(2).tolist()
    return {(names[m], slot): (a, b) for (m, slot), (a, b) in zip(slots, found, strict=True)}


def test_slots_of_the_teacher_score_highest() -> None:
    model, at = planted()
    found = totals(model)
    best = sorted(found, key=lambda each: -sum(found[each]))[:4]
    assert {name for name, _ in best} == set(at)
    rest = [sum(found[each]) for each in found if each not in best]
    assert min(sum(found[each]) for each in best) > 10 * max(rest)


def test_a_slot_whose_sign_is_flipped_has_negative_brackets_and_is_pruned_first() -> None:
    model, at = planted()
    site = sites(model)[at[0]]
    with torch.no_grad():
        site.structure.B[:, 1] *= -1
    last_in, first_in = totals(model)[at[0], 1]
    assert last_in < 0
    assert first_in < 0
    optimizer = adam(model, lr=1e-9)
    ids = TOKENS[:4]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    [event] = events(model)
    assert event["pruned"][0][:2] == [at[0], 1]
    assert at[0] not in {name for name, _ in event["added"]}


def test_a_round_changes_the_output_by_what_the_pruned_slots_gave_and_nothing_else() -> None:
    model = alora(first=1, max_rounds=1, lora_dropout=0.0).double()
    random_factors(model)
    control = copy.deepcopy(model)
    optimizer = adam(model, lr=1e-12)
    ids = TOKENS[:4]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    [event] = events(model)
    assert len(event["pruned"]) == len(event["added"]) == 7
    for name, slot, _ in event["pruned"]:
        sites(control)[name].mask[slot] = 0
    batch = {"input_ids": ids}
    torch.testing.assert_close(logits(model, batch), logits(control, batch), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- how many, and where


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 7),
        ({"move": "modules"}, 14),
        ({"move": 3}, 3),
        ({"scope": "block"}, 14),
        ({"scope": "block", "move": 2}, 4),
    ],
    ids=["R1", "R2", "number", "R3", "block"],
)
def test_how_many_slots_a_round_moves(fields: dict, count: int) -> None:
    """R1: kinds of modules per block, 7 in a llama; R2: adapted modules, 14 here; R3: 7 in each of two blocks."""
    model = alora(score="random", max_rounds=1, max_rank=8, **fields)
    train(model, 4)
    [event] = events(model)
    assert event["asked"] == count
    assert count - 2 <= len(event["pruned"]) <= count  # a block's modules may be full before it has moved all
    if fields.get("scope") == "block":
        for block in (0, 1):
            taken = sum(f".{block}." in name for name, *_ in event["pruned"])
            assert count // 2 - 1 <= taken <= count // 2
            assert sum(f".{block}." in name for name, _ in event["added"]) == taken


def test_footnote_3_eight_slots_over_three_modules_that_lost_none_are_3_3_2() -> None:
    """ "If n_A = 8 and 3 modules are not pruned, then two of them get 3 new ranks and the one with the lowest mean score 2"."""
    slots = [Slot(m, i, float(10 * m + i)) for m in range(11) for i in range(8)]
    lowest = {(m, 0) for m in range(8)}
    slots = [replace(s, score=-100.0 + s.module) if (s.module, s.slot) in lowest else s for s in slots]
    rooms = [Room(m, tuple(range(8, 16))) for m in range(11)]
    plan = decide(slots, rooms, 8)
    assert {m for m, _ in plan.pruned} == set(range(8))
    assert plan.receivers == (10, 9, 8)  # by mean score
    assert Counter(m for m, _ in plan.added) == {10: 3, 9: 3, 8: 2}
    assert plan.clipped == ()


def test_footnote_4_where_every_module_lost_a_slot_the_total_falls_and_rounds_go_on() -> None:
    """Algorithm 1 adds `if there are modules not pruned`, and trains on to the next round either way."""
    model = alora(score="random", move=20, max_rounds=3, every=1, seed=2, max_rank=20)
    train(model, 8)
    told = events(model)
    assert len(told) == 3
    assert any(e["lost"] for e in told)
    totals = [28]
    for event in told:
        totals.append(totals[-1] - event["lost"])
        assert event["slots"] == totals[-1]
        assert bool(event["lost"]) == (event.get("clipped", [""])[-1] == "every module lost a slot, so none were made")
    assert sum(ranks(model).values()) == totals[-1]


def test_the_sensitivity_ablation_is_adaloras_importance_of_the_numbers_of_a_slot() -> None:
    """|w ∂L/∂w| by a plain backward; the mean over the row of A plus the mean over the column of B."""
    model = alora(score="sensitivity", first=1, max_rounds=1, move=3).double()
    random_factors(model)
    s, slots = scorer(model), controller(model).scoring.live()
    found = s.sensitivity(slots, "0/1").tolist()
    model.eval()
    rows = s.drawn("0/1")
    model(**rows).loss.backward()
    own = list(sites(model).values())
    for (m, slot), value in zip(slots, found, strict=True):
        a, b = own[m].structure.A, own[m].structure.B
        expected = (a[slot] * a.grad[slot]).abs().mean() + (b[:, slot] * b.grad[:, slot]).abs().mean()
        assert value == pytest.approx(float(expected), rel=1e-6)
    model.zero_grad()
    train(model.train(), 1, adam(model, lr=1e-12))
    [event] = events(model)
    lowest = sorted(range(len(slots)), key=lambda n: found[n])[:3]
    names = list(sites(model))
    assert [each[:2] for each in event["pruned"]] == [[names[slots[n][0]], slots[n][1]] for n in lowest]


def test_the_gate_ablation_trains_the_relaxed_gates_of_equation_5() -> None:
    """α' = 2 sigmoid(a'), a' = 0 at the start, trained on the validation rows; written out with gates on the columns of B."""
    model = alora(score="gate", first=1, max_rounds=1, move=3).double()
    random_factors(model)
    s, slots = scorer(model), controller(model).scoring.live()
    found = s.gates(slots, "0/1").tolist()
    model.eval()
    own, rows = list(sites(model).values()), s.drawn("0/1")
    b = [site.structure.B.detach().clone() for site in own]
    a = [torch.zeros(each.shape[1], dtype=torch.float64) for each in b]
    eta = None
    for _ in range(GATE_STEPS):
        leaves = [each.clone().requires_grad_() for each in a]
        swapped = {
            f"{name}.weft_site.default.structure.B": b[m] * (2 * torch.sigmoid(leaves[m]))
            for m, name in enumerate(n for n, layer in model.named_modules() if isinstance(layer, WeftLinear))
        }
        slopes = torch.autograd.grad(torch.func.functional_call(model, swapped, (), rows).loss, leaves)
        eta = eta or GATE_MOVE / max(float(g.abs().max()) for g in slopes)
        a = [each - eta * g for each, g in zip(a, slopes, strict=True)]
    expected = [float(2 * torch.sigmoid(a[m][slot])) for m, slot in slots]
    assert found == pytest.approx(expected, rel=1e-4)  # its norms are fp32
    assert max(found) > 1 > min(found)
    train(model.train(), 1, adam(model, lr=1e-12))
    [event] = events(model)
    lowest = sorted(range(len(slots)), key=lambda n: found[n])[:3]
    names = list(sites(model))
    assert [each[:2] for each in event["pruned"]] == [[names[slots[n][0]], slots[n][1]] for n in lowest]
    assert event["score"] == "gate"


def test_slots_that_contribute_nothing_keep_their_gates_at_one() -> None:
    model = alora(score="gate", first=1, max_rounds=1, move=3)
    found = scorer(model).gates(controller(model).scoring.live(), "0/1")
    assert torch.equal(found, torch.ones_like(found))  # B = 0 at the start


def test_the_budget_holds_in_every_round() -> None:
    model = alora(max_rounds=3, every=1)
    train(model, 6)
    assert [e["slots"] for e in events(model)] == [28, 28, 28]
    assert sum(ranks(model).values()) == 28


def test_a_budget_in_parameters_is_never_exceeded() -> None:
    plain = sum(p.numel() for n, p in alora(max_rank=2).named_parameters() if p.requires_grad)
    model = alora(score="random", unit="params", max_rounds=4, every=1, seed=4)
    train(model, 8)
    assert all(plain - 160 < e["parameters"] <= plain for e in events(model))
    counted = alora(score="random", max_rounds=4, every=1, seed=4)
    train(counted, 8)
    assert any(e["parameters"] != plain for e in events(counted))


def test_survivors_are_not_rescaled() -> None:
    """s stays lora_alpha / r of the start, whatever the rank is now."""
    model = alora()
    train(model, 6)
    assert {site.scale for site in sites(model).values()} == {4.0}
    assert len(set(ranks(model).values())) > 1


def test_a_round_tells_what_happened() -> None:
    model = alora(check=True, score="taylor", max_rounds=1)
    train(model, 4)
    [event] = events(model)
    assert event["ranks"] == ranks(model)
    assert {"margin", "noise", "lowest", "median", "highest", "spread", "seconds"} <= event.keys()
    assert set(event["agreement"]) == {"exact_on_other_rows", "score_in_use"}
    assert set(event["agreement"]["score_in_use"]) == {"spearman", "kendall", "overlap", "regret"}


def test_a_cut_within_the_noise_of_its_rows_is_a_warning() -> None:
    model = alora(max_rounds=1)
    with pytest.warns(UserWarning, match=r"within the noise of 4 validation rows: give Reallocate\(rows="):
        train(model, 4)


def test_young_slots_may_be_protected() -> None:
    model = alora(score="random", grace_rounds=1, max_rounds=2, move=12, seed=2)
    train(model, 6)
    first, second = events(model)
    assert not {tuple(a) for a in first["added"]} & {tuple(p[:2]) for p in second["pruned"]}
    free = alora(score="random", max_rounds=2, move=12, seed=2)
    train(free, 6)
    first, second = events(free)
    assert {tuple(a) for a in first["added"]} & {tuple(p[:2]) for p in second["pruned"]}
