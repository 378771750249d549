"""Every combination of structure, start, boost, ranks and layers: it trains through its events, or is refused by the one table."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import weftlora
from families import FAMILIES, logits, trainable
from weftlora.adapter import compat
from weftlora.errors import CombinationError, ConfigError, MergeError
from weftlora.host.attach import schedules
from weftlora.terms.axes import AXES

pytestmark = pytest.mark.grid

WHEN, STEPS = 2, 4
CHOICES: dict[str, dict[str, Callable[[], Any]]] = {
    "structure": {
        "plain": weftlora.Plain,
        "hydra": lambda: weftlora.Hydra(heads=2),
        "tied": lambda: weftlora.Tied(group="shape"),
    },
    "start": {"kaiming": weftlora.Kaiming, "directions": lambda: weftlora.Directions(after=WHEN)},
    "boost": {"none": lambda: None, "dash": lambda: weftlora.Dash(directions=2, after=WHEN)},
    "ranks": {
        "uniform": weftlora.Uniform,
        "reallocate": lambda: weftlora.Reallocate(first=WHEN, every=1, max_rounds=2, move=1, rows=4),
    },
    "layers": {
        "all": weftlora.All,
        "only": lambda: weftlora.Only([1]),
        "search": lambda: weftlora.Search(select="top_k", top_k=1, outer_batches=2, val_size=4, steps=2),
    },
}
CELLS = list(itertools.product(*CHOICES.values()))
FAMILY = FAMILIES["llama"]


def given(cell: tuple[str, ...]) -> dict[str, Any]:
    return {axis: CHOICES[axis][name]() for axis, name in zip(CHOICES, cell, strict=True)}


def reason(cell: tuple[str, ...]) -> str | None:
    """The row of the table that refuses this cell."""
    names = {type(choice).__name__ for choice in given(cell).values()}
    return next((why for pair, why in compat.REFUSED.items() if set(pair) <= names), None)


def config(cell: tuple[str, ...]) -> weftlora.WeftConfig:
    return weftlora.WeftConfig(r=2, target_modules=["q_proj", "down_proj"], **given(cell))


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 64, (12, 7), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in ids]


def after_the_search(model: PeftModel) -> PeftModel:
    """The model of the second stage; before the search, training is refused."""
    with pytest.raises(ConfigError, match="search_layers"):
        model.train()(**FAMILY.batch())
    selection = weftlora.search_layers(model, rows(), batch_size=2, accumulation=1, lr=1e-2)
    assert len(selection.blocks) == 1
    return weftlora.second_stage(model, selection)


def step(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(**FAMILY.batch()).loss.backward()
    optimizer.step()


def test_every_choice_of_these_axes_is_in_the_grid() -> None:
    for axis, choices in CHOICES.items():
        assert choices.keys() - {"none"} == AXES[axis].keys()


@pytest.mark.parametrize("cell", [c for c in CELLS if reason(c)], ids="-".join)
def test_a_refused_combination_says_why(cell: tuple[str, ...]) -> None:
    with pytest.raises(CombinationError) as refusal:
        config(cell)
    assert reason(cell) in str(refusal.value)


@pytest.mark.parametrize("cell", [c for c in CELLS if not reason(c)], ids="-".join)
def test_an_allowed_combination_trains_through_its_events_saves_loads_copies_and_merges(
    cell: tuple[str, ...], tmp_path: Path
) -> None:
    model, base = get_peft_model(FAMILY.build(), config(cell)), logits(FAMILY.build(), FAMILY.batch())
    assert torch.equal(logits(model, FAMILY.batch()), base)
    if "search" in cell:
        model = after_the_search(model)
        assert torch.equal(logits(model, FAMILY.batch()), base)
    if "all" not in cell:
        assert len({name.split(".layers.")[1][0] for name in trainable(model)}) == 1
    if "reallocate" in cell:
        weftlora.attach(model, validation=rows())
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(WHEN):
        step(model, optimizer)
    if "directions" in cell:
        torch.testing.assert_close(logits(model, FAMILY.batch()), base, rtol=0, atol=2e-5)
    for _ in range(STEPS - WHEN):
        step(model, optimizer)
    happened = [e["event"] for schedule in schedules(model).values() for e in schedule.events]
    launched = ["start_switch"] * ("directions" in cell) + ["dash_launch"] * ("dash" in cell)
    assert happened == launched + ["reallocation"] * 2 * ("reallocate" in cell)

    expected = logits(model, FAMILY.batch())
    assert (expected - base).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILY.build(), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded, FAMILY.batch()), expected)
    assert torch.equal(logits(copy.deepcopy(model), FAMILY.batch()), expected)
    if "hydra" in cell:
        with pytest.raises(MergeError):
            model.merge_adapter()
    else:
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged, FAMILY.batch()), expected, rtol=0, atol=2e-5)
