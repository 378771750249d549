"""What is measured is what it is called: same base, same targets, factors away from zero, the dtype it says."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from weftlora import ConfigError
from weftlora.adapted.layer import WeftLinear
from weftlora.bench.cases import Batch, Case, build, cases, cases_of_builders, frozen_base, own_builders, split_rank
from weftlora.bench.rounds import QUICK

ADAPTERS = [Case(kind, 8) for kind in ("peft:lora", "lora", "hydralora", "tied_lora", "lora_dash", "flexora")]
ADAPTERS.append(Case("alora", 12))


@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_every_adapter_shares_the_base_and_sits_on_the_same_modules(case: Case):
    base = frozen_base(QUICK, "fp32")
    untouched = [name for name, _ in base.named_modules()]
    model = build(case, base, {})
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert frozen == {p.data_ptr() for p in base.parameters()}
    assert [name for name, _ in base.named_modules()] == untouched
    adapted = [name for name, m in model.named_modules() if isinstance(m, (WeftLinear, LoraLayer))]
    assert len(adapted) == 7 * QUICK.layers
    assert not any("lm_head" in name for name in adapted)


@pytest.mark.parametrize("case", ADAPTERS, ids=str)
def test_no_gradient_is_trivially_zero(case: Case):
    torch.manual_seed(0)
    model, batch = build(case, frozen_base(QUICK, "fp32"), {}), Batch.draw(QUICK, "fp32")
    batch.loss(model).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.norm() > 0 for p in trained)


@pytest.mark.parametrize("kind", ["peft:lora", "lora", "tied_lora", "lora_dash"])
@pytest.mark.parametrize(("adapter", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_adapter_has_the_dtype_the_case_names(kind: str, adapter: str, dtype: torch.dtype):
    model = build(Case(kind, 16, 0.0, adapter), frozen_base(QUICK, "bf16"), {})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}


def test_dash_is_stepped_after_its_launch():
    """Its slots lie along orthonormal directions, so their share of the step is not skipped work on zeros."""
    model = build(Case("lora_dash", 8), frozen_base(QUICK, "fp32"), {})
    terms = [m.site("default").boost for m in model.modules() if isinstance(m, WeftLinear)]
    for term in terms:
        assert term.launched
        torch.testing.assert_close(term.down @ term.down.T, torch.eye(8))
        torch.testing.assert_close(term.up.T @ term.up, torch.eye(8))
    assert len(terms) == 7 * QUICK.layers


def test_alora_is_stepped_with_moved_ranks_of_the_same_sum():
    model = build(Case("alora", 12), frozen_base(QUICK, "fp32"), {})
    live = [m.site("default").live() for m in model.modules() if isinstance(m, WeftLinear)]
    assert live == [list(range(4, 12)), list(range(16))] * 3 + [list(range(12))]  # an odd number of sites


def test_flexora_is_stepped_with_gates_that_are_not_one():
    model = build(Case("flexora", 8), frozen_base(QUICK, "fp32"), {})
    gates = [m.site("default").layer_gate.item() for m in model.modules() if isinstance(m, WeftLinear)]
    assert len(gates) == 7 * QUICK.layers
    assert 1.0 not in gates


def test_one_mask_per_input_reaches_the_sites():
    model = build(Case("lora", 8, 0.05, mask="input"), frozen_base(QUICK, "fp32"), {})
    assert all(m.site("default").one_mask for m in model.modules() if isinstance(m, WeftLinear))


def test_on_an_fp32_base_the_adapter_dtypes_are_one():
    assert [c.adapter for c in cases("fp32", ["lora"], [0.0])[1:]] == ["fp32", "fp32"]  # r = 8, r = 16
    assert {c.adapter for c in cases("bf16", ["lora"], [0.0])[1:]} == {"fp32", "bf16"}


def test_a_case_from_outside_is_built_by_its_function(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_layers.py").write_text("def wrap(base, r, p):\n    base.given = (r, p)\n    return base\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = own_builders(["mine@4=own_layers:wrap"])
    [case] = cases_of_builders(found, [0.05], "fp32")
    model = build(case, frozen_base(QUICK, "fp32"), found)
    assert isinstance(model, nn.Module)
    assert model.given == (4, 0.05)
    assert split_rank("mine") == ("mine", 16)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mine", "name=module:function"),
        ("lora=math:sqrt", "built in"),
        ("mine=math:no_such", "no_such"),
        ("mine=no_such_module:f", "no_such_module"),
        ("mine@x=math:sqrt", "whole number"),
    ],
)
def test_a_case_that_cannot_be_built_is_refused(spec: str, says: str):
    with pytest.raises(ConfigError, match=says):
        own_builders([spec])
