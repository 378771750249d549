"""Batches whose labels are all to be ignored: their mean loss is 0/0, and they must neither count nor spoil a step."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from searching import adapted, labelled_mse, planted, stack, unlabelled

import weftlora
from families import FAMILIES, adapter_config, randomise
from weftlora.errors import RunError
from weftlora.search.batches import counted
from weftlora.search.driver import LayerSearch
from weftlora.search.hypergradient import Inner

ALL = range(1000)
SMALL = {"outer_batches": 2, "steps": 4}


def search(train: Collection[int] = (), validation: Collection[int] = (), **fields: Any) -> LayerSearch:
    """Of 24 training and 8 validation rows, of which these have no label; one row per micro-batch."""
    rows = planted(stack(3), {1}, 32)
    model = adapted(stack(3), weftlora.Search(**{**SMALL, **fields}), moved=0.3)
    inner = Inner(lr=1e-2, batch_size=1, accumulation=3, schedule="constant", max_grad_norm=0.0)
    given = unlabelled(rows[:24], train), unlabelled(rows[24:], validation)
    return LayerSearch(model, model.peft_config["default"].layers, inner, *given, loss=labelled_mse)


def theta(found: LayerSearch) -> list[torch.Tensor]:
    return [p.detach().clone() for p in found.passes.params]


def awake(found: LayerSearch) -> LayerSearch:
    for site in found.gates.sites:
        site.awaits_search = False
    return found


def take(found: LayerSearch, which: list[int]) -> list[Any]:
    return [found._collate([found._rows["train"][i]]) for i in which]


@pytest.mark.parametrize("summed", [False, True], ids=["mean", "sum of the released code"])
def test_a_micro_batch_without_a_label_contributes_nothing(summed: bool):
    found = awake(search(train=[0, 5]))
    mixed, rest = (found.passes.backward(take(found, w), training=True, summed=summed) for w in ([0, 1, 5, 2], [1, 2]))
    assert mixed.loss == rest.loss
    assert mixed.finite
    assert torch.equal(mixed.h, rest.h)
    assert all(torch.equal(a, b) for a, b in zip(mixed.theta, rest.theta, strict=True))
    assert rest.h.abs().max() > 0


@pytest.mark.parametrize("kind", ["unrolled_fd", "unrolled_exact"])
def test_nor_does_it_in_an_unrolled_hypergradient(kind: str):
    found = []
    for which in ([0, 1, 5, 2], [1, 2]):
        one = awake(search(train=[0, 5], hypergrad=kind))
        _, taken = one.loop.step(take(one, which), keep=True)
        assert taken is not None
        found.append(one.hypergradient([taken])[1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_validation_batch_without_any_label_skips_its_step_is_counted_and_said(caplog: pytest.LogCaptureFixture):
    found = search(validation=ALL)
    row = found.step()
    assert row["skipped"]
    assert row["validation_loss"] != row["validation_loss"]
    assert (found.skipped, found.unlabelled) == (1, 1)
    assert found.alpha.detach().tolist() == [0.0, 0.0, 0.0]
    assert not found.alpha_optimizer.state
    found.step()
    assert caplog.text.count("all labels of a validation batch are ignored") == 1
    with pytest.raises(RunError, match=r"none of the 4 validation losses .* none of their rows has a label"):
        found.run()


def test_a_training_batch_without_any_label_moves_neither_theta_nor_the_optimiser(caplog: pytest.LogCaptureFixture):
    """Adam would go on by its momentum."""
    found = awake(search(train=[0, 1, 2]))
    found.loop.step(take(found, [3, 4, 5]), keep=False)
    before = theta(found), copy.deepcopy(found.loop.optimizer.state_dict()["state"])
    passed, taken = found.loop.step(take(found, [0, 1, 2]), keep=True)
    assert (passed.labelled, taken) == (False, None)
    assert all(torch.equal(a, b) for a, b in zip(before[0], theta(found), strict=True))
    assert str(before[1]) == str(found.loop.optimizer.state_dict()["state"])
    assert (found.loop.taken, found.loop.skipped, found.loop.unlabelled) == (2, 1, 1)
    assert "all labels of a training batch are ignored" in caplog.text


def test_a_theta_that_no_step_could_train_says_nothing_of_the_layers():
    with pytest.raises(RunError, match=r"none of the 4 training losses .* none of their rows has a label"):
        search(train=ALL).run()


def test_a_search_with_some_such_batches_goes_on_and_its_record_and_its_state_say_how_many(tmp_path: Path):
    fields = {"train": range(18), "validation": range(5)}
    whole, first, second = (search(**fields) for _ in range(3))
    selection = whole.run()
    record = selection.record
    assert 0 < record["unlabelled_steps"] == record["skipped_steps"] < 4
    assert 0 < record["unlabelled_inner_steps"] == record["skipped_inner_steps"] < 4
    assert whole.alpha.detach().abs().min() > 0
    for _ in range(3):
        first.step()
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    assert second.run() == selection


def test_the_loss_of_the_record_is_that_of_the_last_step_that_had_one():
    found = search(validation=range(5), steps=20)
    rows = [found.step()]
    while not rows[-1]["skipped"] or all(row["skipped"] for row in rows):
        rows.append(found.step())
    last = [row["validation_loss"] for row in rows if not row["skipped"]][-1]
    assert found.selection().record["validation_loss"] == last


def test_a_transformers_models_rows_cut_down_to_their_prompt_do_not_spoil_a_step():
    config = adapter_config("plain", "llama", layers=weftlora.Search(outer_batches=2, val_size=2, steps=1))
    model = get_peft_model(FAMILIES["llama"].build(), config)
    randomise(model)
    ids = torch.randint(3, 64, (10, 7), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    found = awake(LayerSearch(model, model.peft_config["default"].layers, Inner(accumulation=2), rows))
    alone = found.passes.backward(take(found, [1]), training=False)
    rows[0]["labels"][1:] = -100  # the first token is no target of a causal model
    both = found.passes.backward(take(found, [0, 1]), training=False)
    assert both.loss == pytest.approx(alone.loss, rel=1e-6)
    torch.testing.assert_close(both.h, alone.h)


def test_what_is_counted_is_what_the_mean_of_the_loss_is_over():
    tokens = torch.tensor([[5, 6, -100], [-100, 7, 8]])
    assert counted({"labels": tokens}, causal=True) == 3
    assert counted({"labels": tokens}, causal=False) == 4
    assert counted({"labels": torch.tensor([2, -100, 0])}, causal=True) == 2
    assert counted({"labels": torch.tensor([0.5, -100.0])}, causal=True) == 2
    assert counted({"x": torch.zeros(3, 4)}, causal=True) == 3
