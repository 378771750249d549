"""A structure that the equation does not have: a mixture of rank slots of which every token uses its best two.

    y = x Wᵀ + b + s Σ_{j ∈ top 2 of |x Kᵀ|} b_j (a_j · x)        K [r, in] fixed keys, moved once by an event of its own

It is defined here and nowhere else, and everything works with it or says why not.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import weftlora
from families import FAMILIES, logits, randomise, trainable
from weftlora.adapted.fusion import nodes
from weftlora.adapter.site import _say_once
from weftlora.errors import AdapterError, CombinationError, MergeError
from weftlora.host.attach import schedules
from weftlora.kernel import Factors
from weftlora.terms.axes import AXES, refusals
from weftlora.terms.events import Controller, Event, Length, Timeline, Validation, check_possible
from weftlora.terms.structure import Draw, OutsideTerm, Place, Size, SlotFirst, Structure, StructureTerm, sides_of

FAMILY = FAMILIES["llama"]
REASON = "every token uses other rank slots, so no single ΔW exists"


@dataclass(frozen=True)
class TopTwo(Structure):
    """A mixture of rank slots."""

    after: int = 2

    kind: ClassVar[str] = "top_two"
    method: ClassVar[str] = "a top-2 mixture"
    headline: ClassVar[tuple[str, ...] | None] = ("after",)
    saves: ClassVar[Mapping[str, str]] = {"A": "[r, in]", "B": "[out, r]", "keys": "K [r, in]"}
    counts: ClassVar[Mapping[str, str]] = {"moved": "whether the keys have moved"}
    no_closed_form: ClassVar[str | None] = REASON
    figures_at: ClassVar[str] = "all slots"
    outside: ClassVar[bool] = True

    def build(self, size: Size, room: int, owners: Mapping[str, StructureTerm], draw: Draw) -> TopTwoTerm:
        return TopTwoTerm(self, draw(size.r, size.fan_in), draw(size.r, size.fan_in), size.out)

    def tensors(self) -> frozenset[str]:
        return frozenset(self.saves)

    def shared_keys(self, place: Place) -> dict[str, Hashable]:
        return {}

    def sides(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
        return sides_of(tensors.get("A"), tensors.get("B"))

    def check(self, dropout: float) -> None:
        pass

    def controllers(self, timeline: Timeline) -> list[Controller]:
        return [MoveKeys(self, timeline)]


class TopTwoTerm(OutsideTerm):
    def __init__(self, choice: TopTwo, a: Tensor, keys: Tensor, out: int):
        super().__init__()
        self.choice = choice
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(a.new_zeros(out, len(a)))
        self.register_buffer("keys", keys)

    def update(self, x: Tensor, dropped: Tensor, scale: float) -> Tensor:
        far = F.linear(x, self.keys.to(x)).abs()
        best = torch.zeros_like(far).scatter_(-1, far.topk(min(2, far.shape[-1]), -1).indices, 1.0)
        return scale * F.linear(best * F.linear(dropped, self.A.to(x)), self.B.to(x))

    def factors(self, scale: float) -> Factors:
        return Factors(self.A, self.B, scale)

    def by_slot(self) -> list[tuple[nn.Parameter, SlotFirst]]:
        return []

    def linear(self) -> list[Tensor]:
        return [self.B]

    def fix(self, omega: Tensor) -> None:
        pass


class MoveKeys:
    """After step t, the keys become the rows of A."""

    what = "the move of the keys"

    def __init__(self, choice: TopTwo, timeline: Timeline):
        self.choice, self.members = choice, timeline.members
        self.first.register_counter("moved", torch.zeros((), dtype=torch.bool))

    @property
    def first(self) -> Any:
        return self.members[0].site

    def due(self, length: Length) -> int | None:
        return self.choice.after

    def done(self) -> bool:
        return bool(self.first.moved)

    def check(self, length: Length) -> None:
        check_possible(self.due(length), length, self.what, self.choice.after)

    def before_step(self, step: int | None, length: Length) -> None:
        pass

    def take_rows(self, rows: Validation) -> bool:
        return False

    def plan(self, step: int, length: Length, optimizer: Optimizer) -> Callable[[], Event] | None:
        return self.apply if step >= self.choice.after else None

    def apply(self) -> Event:
        for member in self.members:
            member.site.structure.keys.copy_(member.site.structure.A)
        self.first.moved.fill_(True)
        return {"event": "keys_moved", "sites": len(self.members)}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a config would find it by its name."""
    monkeypatch.setitem(AXES["structure"], TopTwo.kind, TopTwo)


def adapted(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = weftlora.WeftConfig(structure=TopTwo(), r=4, target_modules=["q_proj", "down_proj"], **fields)
    return get_peft_model(FAMILY.build(), config)


def trained(model: PeftModel, steps: int = 3) -> PeftModel:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**FAMILY.batch()).loss.backward()
        optimizer.step()
    return model.eval()


def test_it_starts_as_the_base_trains_and_moves_its_keys() -> None:
    model = adapted()
    assert torch.equal(logits(model, FAMILY.batch()), logits(FAMILY.build(), FAMILY.batch()))
    before = model(**FAMILY.batch()).loss.item()
    trained(model)
    assert model(**FAMILY.batch()).loss.item() < before
    schedule = schedules(model)["default"]
    assert [(e["event"], e["step"]) for e in schedule.events] == [("keys_moved", 2)]


def test_its_modules_run_beside_the_kernel_which_is_said_once() -> None:
    _say_once.cache_clear()
    model = adapted()
    assert set(nodes(model).values()) == {"module: TopTwo is outside the equation"}
    with pytest.warns(UserWarning, match="TopTwo is outside the equation"):
        model(**FAMILY.batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**FAMILY.batch())


def test_the_update_is_its_own_function_of_x() -> None:
    model = randomised(adapted())
    layer = next(m for m in model.modules() if hasattr(m, "weft_site"))
    site, x = layer.site("default"), torch.randn(5, layer.base_layer.in_features)
    got = layer(x) - layer.base_layer(x)
    for row, update in zip(x, got, strict=True):
        best = (site.structure.keys @ row).abs().topk(2).indices
        expected = site.scale * sum(site.structure.B[:, j] * (site.structure.A[j] @ row) for j in best)
        assert torch.allclose(update, expected, atol=1e-5)


def randomised(model: PeftModel) -> PeftModel:
    randomise(model)
    return model.eval()


def test_it_compiles() -> None:
    torch._dynamo.reset()
    model = randomised(adapted())
    expected = logits(model, FAMILY.batch())
    assert torch.allclose(torch.compile(model, backend="eager")(**FAMILY.batch()).logits, expected, atol=1e-6)


def test_it_saves_loads_copies_and_resumes(tmp_path: Path) -> None:
    model = trained(adapted())
    expected = logits(model, FAMILY.batch())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILY.build(), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded, FAMILY.batch()), expected)
    assert torch.equal(logits(copy.deepcopy(model), FAMILY.batch()), expected)
    assert schedules(loaded)["other"].steps == 3
    assert not schedules(loaded)["other"].pending()
    with pytest.raises(weftlora.ConfigError, match="also a part of weftlora's tensor names"):
        model.add_adapter("keys", weftlora.WeftConfig(structure=TopTwo()))


def test_merge_and_export_are_refused_with_its_own_reason(tmp_path: Path) -> None:
    model = randomised(adapted())
    with pytest.raises(MergeError, match=REASON):
        model.merge_adapter()
    for leave in (weftlora.export_lora, weftlora.merge):
        with pytest.raises(MergeError, match=f"a top-2 mixture, and {REASON}"):
            leave(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_directions_are_refused_with_its_reason() -> None:
    with pytest.raises(AdapterError, match=f"has a top-2 mixture, and {REASON}: directions are for"):
        weftlora.directions(randomised(adapted()))


@pytest.mark.parametrize(
    "axes", [{"boost": weftlora.Dash()}, {"start": weftlora.Directions()}, {"ranks": weftlora.Reallocate()}]
)
def test_what_needs_the_equation_is_refused(axes: dict[str, Any]) -> None:
    with pytest.raises(CombinationError, match=r"TopTwo with .*: it has a forward of its own, and "):
        weftlora.WeftConfig(structure=TopTwo(), **axes)


def test_a_layer_gate_weighs_it() -> None:
    model = randomised(adapted(layers=weftlora.Only([0, 1], gated=True)))
    layer = next(m for m in model.modules() if hasattr(m, "weft_site"))
    x = torch.randn(5, layer.base_layer.in_features)
    whole = layer(x) - layer.base_layer(x)
    layer.site("default").layer_gate.fill_(0.5)
    assert torch.allclose(layer(x) - layer.base_layer(x), whole / 2, atol=1e-6)


@pytest.mark.parametrize("base", [True, False])
def test_inspect_shows_it(tmp_path: Path, base: bool) -> None:
    model = trained(adapted())
    model.save_pretrained(tmp_path)
    found = weftlora.inspect(model) if base else weftlora.inspect(tmp_path, base=False)
    assert found.method == "TopTwo(after=2)"
    assert {site.norm_kind for site in found.sites} == {"all slots"}
    assert {site.why_not for site in found.sites} == {REASON}
    assert found.parameters.trained == sum(p.numel() for p in trainable(model).values())
    assert found.routers is None
    assert found.verdict


def test_a_structure_outside_refuses_only_what_asks_for_the_equation() -> None:
    pairs = refusals([TopTwo, weftlora.Reallocate, weftlora.Plain])
    assert ("TopTwo", "Reallocate") in pairs
    assert ("TopTwo", "Plain") not in pairs
    assert not [pair for pair in refusals([weftlora.Plain, weftlora.Reallocate]) if pair[0] == "Plain"]
