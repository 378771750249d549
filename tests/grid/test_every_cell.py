"""Every structure on every base family: identity, training, gradients, saving, merging, several adapters, copies."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from torch import Tensor, nn

import weftlora
from families import FAMILIES, STRUCTURES, Family, adapter_config, logits, randomise, trainable
from weftlora.adapted.layer import WeftLinear
from weftlora.adapter.compat import REFUSED

pytestmark = pytest.mark.grid

TRAINED = {
    "plain": {"A", "B"},
    "hydra": {"A", "B", "router"},
    "hydra_Ax": {"A", "B", "router"},
    "tied_tl6": {"A", "B", "u", "v"},
    "tied_tl5_shape": {"A", "B"},
    "tied_tl6_fused": {"A", "B", "u", "v"},
    "tied_vera": {"u", "v"},
    "tied_Bu": {"B", "u"},
}


@dataclass(frozen=True)
class Cell:
    """One structure on one family."""

    structure: str
    name: str

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def batch(self) -> dict[str, Tensor]:
        return self.family.batch()

    def config(self, **fields: object) -> weftlora.WeftConfig:
        return adapter_config(self.structure, self.name, **fields)

    def adapted(self, seed: int = 0, **fields: object) -> PeftModel:
        """A fresh base with a fresh adapter."""
        base = self.family.build()
        torch.manual_seed(seed)
        return get_peft_model(base, self.config(**fields))

    def trained(self, **fields: object) -> PeftModel:
        """The same with an adapter whose every trainable value has moved."""
        model = self.adapted(**fields)
        randomise(model)
        return model.eval()

    @property
    def refused(self) -> str | None:
        """Why this cell cannot be merged; None where it can."""
        kind = type(STRUCTURES[self.structure]().structure).__name__
        return REFUSED.get((kind, "merge"))


CELLS = [Cell(s, f) for s, f in itertools.product(STRUCTURES, FAMILIES)]
every_cell = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.structure}-{cell.name}")


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name → a copy of every base weight of an adapted model, adapters left out."""
    return {n: t.clone() for n, t in model.state_dict().items() if ".weft_site." not in n}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@every_cell
def test_an_untrained_adapter_is_the_base_bit_for_bit(cell: Cell) -> None:
    model = cell.adapted()
    assert torch.equal(logits(model, cell.batch), logits(cell.family.build(), cell.batch))


@every_cell
def test_loss_falls_and_gradients_reach_exactly_what_should_train(cell: Cell) -> None:
    model = cell.adapted().train()
    params = trainable(model)
    assert {n.rpartition(".")[2] for n in params if ".weft_site.default." in n} == TRAINED[cell.structure]
    heads = cell.family.modules_to_save
    assert all(".weft_site.default." in n or any(f"{h}.modules_to_save.default." in n for h in heads) for n in params)
    assert bool(heads) == any(".modules_to_save." in n for n in params)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n not in params}

    optimizer, moved, losses = torch.optim.AdamW(params.values(), lr=1e-2), set(), []
    for _ in range(6):
        loss = model(**cell.batch).loss
        loss.backward()
        moved |= {n for n, p in params.items() if p.grad is not None and p.grad.any()}
        assert not [n for n, p in model.named_parameters() if n not in params and p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    assert moved == params.keys()
    assert same(frozen, {n: t for n, t in model.state_dict().items() if n not in params})


@every_cell
def test_every_loading_path_gives_equal_logits(cell: Cell, tmp_path: Path) -> None:
    model = cell.trained()
    expected = logits(model, cell.batch)
    assert (expected - logits(cell.family.build(), cell.batch)).abs().max() > 1e-4
    model.save_pretrained(tmp_path)

    torch.manual_seed(123)  # a fresh adapter would now have other random values, frozen ones included
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(
            cell.family.build(), tmp_path, adapter_name="other", low_cpu_mem_usage=low_memory
        )
        assert torch.equal(logits(loaded, cell.batch), expected)
        assert not trainable(loaded)

    base = cell.family.build()
    if cell.family.from_transformers:
        base.load_adapter(str(tmp_path), adapter_name="other")
    else:
        inject_adapter_in_model(weftlora.WeftConfig.from_pretrained(tmp_path), base, adapter_name="other")
        saved = {k.removeprefix("base_model.model."): t for k, t in load_peft_weights(tmp_path).items()}
        set_peft_model_state_dict(base, saved, adapter_name="other")
    assert torch.equal(logits(base, cell.batch), expected)

    fresh = get_peft_model(cell.family.build(), cell.config())
    report = set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    assert not report.unexpected_keys
    assert torch.equal(logits(fresh, cell.batch), expected)


@every_cell
def test_merge_is_exact_and_unmerge_bit_exact_or_it_is_refused(cell: Cell) -> None:
    model = cell.trained()
    before, expected = base_weights(model), logits(model, cell.batch)
    if reason := cell.refused:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(weftlora.MergeError) as refusal:
                merge()
            assert reason in str(refusal.value)
        assert same(base_weights(model), before)
        assert torch.equal(logits(model, cell.batch), expected)
        return
    model.merge_adapter()
    assert not same(base_weights(model), before)
    assert (logits(model, cell.batch) - expected).abs().max() < 1e-5
    model.unmerge_adapter()
    assert same(base_weights(model), before)
    assert torch.equal(logits(model, cell.batch), expected)
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, WeftLinear)]
    assert (logits(merged, cell.batch) - expected).abs().max() < 1e-5


@every_cell
def test_two_adapters_do_not_disturb_each_other(cell: Cell) -> None:
    base = logits(cell.family.build(), cell.batch)
    model = cell.trained()
    first = logits(model, cell.batch)
    model.add_adapter("second", cell.config())
    assert torch.equal(logits(model, cell.batch), first)
    model.set_adapter("second")
    randomise(model, seed=8)
    second = logits(model, cell.batch)

    model.train()
    model(**cell.batch).loss.backward()
    torch.optim.AdamW(trainable(model).values(), lr=1e-2).step()
    assert not torch.equal(logits(model, cell.batch), second)
    second = logits(model, cell.batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, cell.batch), base)
    model.set_adapter("default")
    assert torch.equal(logits(model, cell.batch), first)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model, cell.batch), second)
    assert not [n for n, _ in model.named_parameters() if ".default." in n]


@every_cell
def test_two_active_adapters_add_up(cell: Cell) -> None:
    model = cell.trained(heads_too=False)
    model.add_adapter("second", cell.config(heads_too=False))
    model.set_adapter("second")
    randomise(model, seed=8)
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    for layer in (m for m in model.modules() if isinstance(m, WeftLinear)):
        x = torch.randn(3, 5, layer.site("default").factors().A.shape[1])
        base = layer.base_layer(x)
        alone = [site(x, base) - base for site in layer.weft_site.values()]
        assert torch.allclose(layer(x), base + alone[0] + alone[1], atol=1e-5)
        assert all(update.abs().max() > 1e-4 for update in alone)


@every_cell
def test_a_copy_is_equal_and_independent(cell: Cell) -> None:
    model = cell.trained()
    expected = logits(model, cell.batch)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, cell.batch), expected)
    randomise(copied, seed=9)
    assert torch.equal(logits(model, cell.batch), expected)
    assert not torch.equal(logits(copied, cell.batch), expected)
