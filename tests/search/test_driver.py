"""The loop: what an outer step may touch, what happens to losses that are no numbers, exact resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from searching import adapted, make, mse, planted, rows_of, stack

import weftlora
from weftlora.errors import ConfigError, DataError, RunError
from weftlora.search.driver import LayerSearch, _cost
from weftlora.search.hypergradient import Inner
from weftlora.terms.layers.search import weights

SMALL = {"outer_batches": 2, "val_size": 12, "steps": 6}


def search(dropout: float = 0.0, **fields) -> LayerSearch:
    inner = fields.pop("inner", {})
    config, training = fields.pop("config", {}), fields.pop("training", None)
    model = adapted(stack(3), weftlora.Search(**{**SMALL, **fields}), lora_dropout=dropout, **config)
    return make(model, planted(stack(3), {1}, 40), training=training, **inner)


def theta(found: LayerSearch) -> list:
    return [p.detach().clone() for p in found.passes.params]


@pytest.mark.parametrize("kind", ["direct", "unrolled_fd", "unrolled_exact"])
def test_the_outer_step_changes_no_theta_no_gradient_and_no_optimiser_state(kind: str):
    found = search(hypergrad=kind)
    found.step()
    for site in (s for g in found.gates.groups for s in g.sites.values()):
        site.awaits_search = False
    _, taken = found._inner_steps()
    for p in found.passes.params:
        p.grad = torch.randn_like(p)
    before = theta(found), [p.grad for p in found.passes.params], copy.deepcopy(found.loop.state_dict())
    copies = [g.clone() for g in before[1]]
    modes = [m.training for m in found.model.modules()]
    alpha = found.alpha.detach().clone()
    found._outer_step(taken)
    assert not torch.equal(alpha, found.alpha.detach())
    assert all(torch.equal(a, b) for a, b in zip(before[0], theta(found), strict=True))
    assert all(
        p.grad is g and torch.equal(g, c) for p, g, c in zip(found.passes.params, before[1], copies, strict=True)
    )
    assert modes == [m.training for m in found.model.modules()]
    assert str(before[2]) == str(found.loop.state_dict())


def test_the_inner_step_does_not_see_the_graph_of_alpha_and_leaves_alpha_alone():
    found = search()
    alpha = found.alpha.detach().clone()
    for site in (s for g in found.gates.groups for s in g.sites.values()):
        site.awaits_search = False
    found._inner_steps()
    assert found.alpha.grad is None
    assert torch.equal(found.alpha.detach(), alpha)
    assert not any(s.layer_gate.requires_grad for g in found.gates.groups for s in g.sites.values())


def test_the_inner_optimisers_state_survives_and_is_wiped_only_by_the_released_preset():
    found = search()
    found.run()
    assert {int(state["step"]) for state in found.loop.optimizer.state.values()} == {6}
    released = search(preset="released")
    before = theta(released)
    released.step()
    moves = torch.cat([(a - b).flatten().abs() for a, b in zip(before, theta(released), strict=True)])
    rate = moves.max()
    assert torch.logical_or((moves - rate).abs() < 1e-12, moves == 0).all()  # sign-SGD: every number moves by the rate


@pytest.mark.parametrize("kind", ["direct", "unrolled_fd"])
def test_a_validation_loss_that_is_no_number_skips_the_step_and_is_counted(kind: str):
    rows = planted(stack(3), {1}, 40)
    bad = rows_of(torch.randn(12, 6).double(), torch.full((12, 6), float("nan")).double())
    model = adapted(stack(3), weftlora.Search(**SMALL, hypergrad=kind))
    found = LayerSearch(model, model.peft_config["default"].layers, search().inner, rows, bad, loss=mse)
    row = found.step()
    assert row["skipped"]
    assert found.skipped == 1
    assert found.alpha.detach().tolist() == [0.0, 0.0, 0.0]
    assert not found.alpha_optimizer.state
    with pytest.raises(RunError, match="none of the"):
        found.run()


def test_an_infinite_loss_skips_its_step_though_its_gradient_is_finite():
    found = search()
    loss = found.passes._loss
    found.passes._loss = lambda model, batch: loss(model, batch) + (0.0 if model.training else float("inf"))
    assert found.step()["skipped"]
    assert found.alpha.detach().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["unrolled_fd", "unrolled_exact"])
def test_an_unrolled_part_that_is_no_number_skips_the_step_though_the_validation_loss_is_one(kind: str):
    found, validated = search(hypergrad=kind), []
    loss = found.passes._loss

    def failing_once_validated(model, batch):
        validated.extend([] if model.training else [1])
        return loss(model, batch) * (float("nan") if model.training and validated else 1)

    found.passes._loss = failing_once_validated
    row = found.step()
    assert row["skipped"]
    assert row["validation_loss"] == row["validation_loss"]
    assert found.alpha.detach().tolist() == [0.0, 0.0, 0.0]
    assert not found.alpha_optimizer.state


def test_steps_that_are_no_numbers_are_left_out_of_a_search_that_goes_on():
    """One bad row of six: α is that of the steps without it, to the bit."""
    rows = planted(stack(3), {1}, 40)
    held = rows_of(torch.randn(6, 6).double(), torch.randn(6, 6).double())
    held[2]["y"][0] = float("inf")
    model = adapted(stack(3), weftlora.Search(**{**SMALL, "outer_batches": 1}))
    inner = Inner(lr=1e-2, batch_size=1, accumulation=1)
    found = LayerSearch(model, model.peft_config["default"].layers, inner, rows, held, loss=mse)
    for _ in range(6):
        before, optimiser = found.alpha.detach().clone(), str(found.alpha_optimizer.state_dict())
        row = found.step()
        kept = torch.equal(before, found.alpha.detach()) and optimiser == str(found.alpha_optimizer.state_dict())
        assert kept == row["skipped"]
    assert found.skipped == 1
    assert found.alpha.detach().isfinite().all()
    assert found.selection().record["skipped_steps"] == 1


def test_sgd_keeps_the_sum_of_alpha_at_zero_and_adam_need_not():
    sgd = search(alpha_optimizer="sgd", alpha_lr=5.0, steps=20)
    sgd.run()
    spread = float(sgd.alpha.detach().abs().max())
    assert spread > 1e-3
    assert abs(float(sgd.alpha.detach().sum())) < 1e-12
    adam = search(steps=20)
    adam.run()
    assert abs(float(adam.alpha.detach().sum())) > 1e-6
    assert adam.history[-1]["sum_alpha"] == float(adam.alpha.detach().sum())


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_alpha_has_no_weight_decay_which_would_pull_it_towards_uniform(kind: str):
    found = search(alpha_optimizer=kind)
    assert [group["weight_decay"] for group in found.alpha_optimizer.param_groups] == [0]
    with torch.no_grad():
        found.alpha.copy_(torch.tensor([1.0, -1.0, 0.0]))
    found.alpha.grad = torch.zeros_like(found.alpha)
    found.alpha_optimizer.step()
    assert found.alpha.detach().tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "worth"),
    [
        ({}, 1 + 2 * 4 / 8),
        ({"inner_steps": 3}, 3 + 1),
        ({"inner_steps": 3, "hypergrad": "unrolled_fd"}, 3 * 3 + 1),
        ({"inner_steps": 3, "hypergrad": "unrolled_fd", "unroll_steps": 1}, 3 + 2 + 1),
    ],
    ids=["direct", "K=3", "fd", "truncated"],
)
def test_the_cost_in_training_steps_is_the_rows_that_went_through_the_model(fields: dict, worth: float):
    """Counted by a hook on what is run: training rows per step are 8, validation rows 2 · 4."""
    found, rows = search(**fields, inner={"batch_size": 4, "accumulation": 2}), []
    loss = found.passes._loss
    found.passes._loss = lambda model, batch: (rows.append(len(batch["x"])), loss(model, batch))[1]
    selection = found.run()
    assert selection.record["cost_in_steps"] == pytest.approx(6 * worth)
    assert sum(rows) / 8 == pytest.approx(6 * worth)
    assert selection.seconds > 0


def test_the_rate_of_theta_may_be_the_searchs_own():
    found = [search(inner={"lr": 1e-3}), search(inner_lr=1e-3), search()]
    for each in found:
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(theta(found[0]), theta(found[1]), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(theta(found[1]), theta(found[2]), strict=True))
    assert found[1].selection().inner["lr"] == 1e-3


def test_gates_are_the_weights_of_alpha_after_every_step():
    found = search()
    found.run()
    expected = weights(found.alpha.detach())
    for group, value in zip(found.gates.groups, expected, strict=True):
        assert {float(site.layer_gate) for site in group.sites.values()} == {float(value)}


def test_no_gate_passes_alpha_hat_max_and_the_largest_alpha_hat_is_still_told():
    free, held = (search(alpha_lr=0.3, steps=8, alpha_hat_max=most) for most in (None, 1.25))
    largest: dict[str, list[float]] = {"free": [], "held": []}
    for _ in range(8):
        told = [found.step()["max_alpha_hat"] for found in (free, held)]
        for name, found in (("free", free), ("held", held)):
            largest[name].append(max(float(site.layer_gate) for site in found.gates.sites))
        assert largest["free"][-1] == told[0]
        assert largest["held"][-1] == min(told[1], 1.25)
    assert max(largest["free"]) > 1.25
    assert max(largest["held"]) == 1.25 < max(row["max_alpha_hat"] for row in held.history)


def test_a_resumed_search_has_its_gates_cut_off_too():
    held, again = (search(alpha_lr=0.3, alpha_hat_max=1.25) for _ in range(2))
    with torch.no_grad():
        held.alpha.copy_(torch.tensor([1.0, -1.0, 0.0]))
    again.load_state_dict(held.state_dict())
    assert max(float(site.layer_gate) for site in again.gates.sites) == 1.25


@pytest.mark.parametrize("kind", ["direct", "unrolled_fd"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_search_resumed_at_any_step_is_the_uninterrupted_one_bit_for_bit(kind: str, stop: int, tmp_path: Path):
    fields = {"hypergrad": kind, "inner_steps": 2, "dropout": 0.2, "inner": {"schedule": "cosine"}}
    torch.manual_seed(9)
    whole = search(**fields)
    torch.manual_seed(9)
    whole.run()
    first = search(**fields)
    torch.manual_seed(9)
    for _ in range(stop):
        first.step()
    first.save(tmp_path / "search.pt")
    torch.manual_seed(1234)
    second = search(**fields)
    second.load(tmp_path / "search.pt")
    second.run()
    assert [row["alpha"] for row in second.history] == [row["alpha"] for row in whole.history]
    assert all(torch.equal(a, b) for a, b in zip(theta(whole), theta(second), strict=True))
    assert second.selection() == whole.selection()


def test_a_search_is_not_resumed_on_other_rows_or_another_adapter(tmp_path: Path):
    found = search()
    found.save(tmp_path / "search.pt")
    other = make(adapted(stack(3), weftlora.Search(**SMALL)), planted(stack(3), {1}, 40), seed=1)
    with pytest.raises(RunError, match="rows or the seed"):
        other.load(tmp_path / "search.pt")
    with pytest.raises(RunError, match="another adapter"):
        make(adapted(stack(4), weftlora.Search(**SMALL)), planted(stack(4), {1}, 40)).load(tmp_path / "search.pt")


def test_the_same_seed_gives_the_same_selection():
    assert search().run() == search().run()


def test_a_direct_hypergradient_of_several_inner_steps_is_said_to_be_biased(caplog: pytest.LogCaptureFixture):
    search(inner_steps=2)
    assert "biased" in caplog.text
    caplog.clear()
    search(inner_steps=2, hypergrad="unrolled_fd")
    search()
    assert not caplog.text


def test_one_epoch_is_counted_in_rows_of_the_training_part():
    found = search(steps=None, inner_steps=2, inner={"batch_size": 2, "accumulation": 3})
    assert found.steps == (40 - 12) // (2 * 3 * 2)


def test_a_search_costs_no_more_than_its_share_of_the_training_unless_it_is_not_bounded():
    fields = {"steps": None, "inner": {"batch_size": 2, "accumulation": 2}, "search_epochs": 3}
    whole = search(**fields).steps
    assert search(training=10**6, **fields).steps == search(training=50, max_share=None, **fields).steps == whole
    bounded = search(training=50, max_share=0.1, **fields)
    assert bounded.steps == int(5 / _cost(bounded)) < whole


def test_validation_micro_batches_shrink_before_one_step_repeats_a_row():
    found = search(outer_batches=5)
    assert [len(batch["x"]) for batch in found._batches("validation", 5)] == [2] * 5


def test_too_few_validation_rows_for_one_step_are_refused():
    with pytest.raises(DataError, match="at least outer_batches=13 validation rows, and there are 12"):
        search(outer_batches=13)


def test_an_adapter_without_gates_cannot_be_searched():
    model = adapted(stack(3), weftlora.All())
    with pytest.raises(ConfigError, match="no layer gates"):
        LayerSearch(model, weftlora.Search(**SMALL), search().inner, planted(stack(3), {1}, 40), loss=mse)


@pytest.mark.parametrize("asked", [{"select": "top_k", "top_k": 4}, {"min_layers": 4}])
def test_more_layers_than_there_are_is_an_error_before_the_search(asked: dict):
    with pytest.raises(ConfigError, match="of 3 groups"):
        search(**asked)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_state_is_refused_in_a_sentence(content: bytes | None, tmp_path: Path):
    found = search()
    found.save(tmp_path / "state.pt")
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(whole[:300] if content is None else content)
    with pytest.raises(RunError, match="damaged"):
        found.load(tmp_path / "state.pt")


FORMS: dict[str, Any] = {
    "a list": lambda state: [state],
    "without a part": lambda state: {key: value for key, value in state.items() if key != "skipped"},
    "θ of another shape": lambda state: state | {"theta": {name: p[:1] for name, p in state["theta"].items()}},
    "α that is no number": lambda state: state | {"alpha": state["alpha"] * float("nan")},
    "a count that is a text": lambda state: state | {"done": "2"},
    "a position before the first": lambda state: state | {"positions": {"train": -1, "validation": 0}},
    "moments of another shape": lambda state: (
        state | {"alpha_optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}}}
    ),
    "random state that is none": lambda state: (
        state | {"random": [{"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}]}
    ),
    "history that is no list": lambda state: state | {"history": 2},
    "history of other steps": lambda state: state | {"history": state["history"][:1]},
    "rows that are tensors": lambda state: state | {"splits": {"train": [torch.ones(2)], "validation": []}},
}


def test_a_state_of_another_form_is_refused_before_anything_is_changed(tmp_path: Path):
    found = search()
    found.step()
    found.step()
    whole = found.state_dict()
    for form, change in FORMS.items():
        torch.save(change(whole), tmp_path / "state.pt")
        with pytest.raises(RunError, match=r"is of another adapter|is damaged"):
            found.load(tmp_path / "state.pt")
        assert str(found.state_dict()) == str(whole), form


def test_the_settings_of_the_optimisers_are_the_configs_and_not_the_files():
    found = search()
    found.step()
    state = found.state_dict()
    state["alpha_optimizer"] = state["alpha_optimizer"] | {"param_groups": [{"lr": "x"}]}
    found.load_state_dict(state)
    found.step()


def test_random_numbers_of_gpus_go_on_where_there_are_as_many_gpus(monkeypatch: pytest.MonkeyPatch):
    found, went_on = search(), []
    [mine] = found.state_dict()["random"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.zeros(16, dtype=torch.uint8)])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: went_on.append(len(states)))
    state, gpu = found.state_dict(), torch.ones(16, dtype=torch.uint8)
    for there in (1, 2):
        found.load_state_dict(state | {"random": [mine | {"cuda": [gpu] * there}]})
        assert torch.equal(torch.get_rng_state(), mine["cpu"])
    assert went_on == [1]


def test_a_disk_that_refuses_the_state_says_so_as_other_files_do(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):  # torch.save to a path: a RuntimeError that names its own source
        search().save(tmp_path / "gone" / "state.pt")
