"""Hypergradients on tiny transformers models in fp32, with their own checkpointing and their own attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dashing import sites
from peft import PeftModel, get_peft_model
from torch import Tensor

import weftlora
from families import FAMILIES, adapter_config, llama, logits, randomise
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import ConfigError
from weftlora.search.driver import LayerSearch
from weftlora.search.hypergradient import Inner
from weftlora.terms.layers.search import weights


def shifted(labels: Tensor) -> int:
    """The first token is no target of a decoder."""
    return int((labels[:, 1:] != -100).sum())


COUNTED: dict[str, Any] = {
    "llama": shifted,
    "gpt2": shifted,
    "t5": lambda labels: int((labels != -100).sum()),
    "bert": len,
}
"""What the mean loss of each family is a mean over."""


def searched(
    structure: str = "plain",
    family: str = "llama",
    attention: str = "sdpa",
    inner: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **fields: Any,
) -> LayerSearch:
    """A search of a two-block model whose θ and α are away from their starts; rows have labels of unequal number."""
    torch.manual_seed(0)
    base = llama(attn_implementation=attention) if family == "llama" else FAMILIES[family].build()
    search = weftlora.Search(**{"outer_batches": 3, "val_size": 3, "steps": 2, **fields})
    given = adapter_config(structure, family, heads_too=False, layers=search)
    for name, value in (config or {}).items():
        setattr(given, name, value)
    model = get_peft_model(base.eval(), given)
    randomise(model)
    ids = torch.randint(3, 64, (15, 7), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    for i, row in enumerate(rows):
        if family == "bert":
            row["labels"] = torch.tensor(i % 3)
        else:
            row["labels"][: i % 5] = -100
    settings = Inner(**{"lr": 1e-2, "accumulation": 2, "schedule": "constant", "max_grad_norm": 0.0, **(inner or {})})
    found = LayerSearch(model, search, settings, rows)
    with torch.no_grad():
        found.alpha.copy_(torch.linspace(0.4, -0.3, len(found.alpha), dtype=torch.float64))
    found.gates.write(search.gates(found.alpha.detach()))
    for site in found.gates.sites:
        site.awaits_search = False
    return found


def by_leaf(search: LayerSearch) -> Tensor:
    """∂R_val/∂α by autograd through an explicit α, R_val being the mean over all labelled tokens of the outer batch."""
    position = search.cycles["validation"].position
    batches = search._batches("validation", search.search.outer_batches)
    search.cycles["validation"].position = position
    alpha = search.alpha.detach().clone().requires_grad_()
    search.model.eval()
    with search.gates.graphed(list(weights(alpha))):
        counts = [COUNTED[search.model.config.model_type](b["labels"]) for b in batches]
        losses = [search.model(**b).loss * n for b, n in zip(batches, counts, strict=True)]
        [found] = torch.autograd.grad(torch.stack(losses).sum() / sum(counts), alpha)
    return found


@contextmanager
def recomputed(search: LayerSearch) -> Iterator[list[int]]:
    """Counts the forwards of one adapted module: under checkpointing there are two per backward."""
    layer, calls = next(m for m in search.model.modules() if isinstance(m, WeftLinear)), [0]
    handle = layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    yield calls
    handle.remove()


@pytest.mark.parametrize("structure", ["plain", "hydra", "tied_tl6"])
@pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])
def test_the_identity_is_an_explicit_leaf_to_1e5_over_micro_batches_and_under_checkpointing(structure: str, kind: str):
    search = searched(structure)
    expected = by_leaf(search)
    if kind != "none":
        search.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        search.model.enable_input_require_grads()
        search.passes.backward(search._batches("train", 1), training=True)
        with recomputed(search) as calls:
            search.passes.backward(search._batches("train", 1), training=True)
        assert calls == [2]  # or this would be a test without checkpointing
        search = searched(structure)
        search.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        search.model.enable_input_require_grads()
    _, found = search.hypergradient()
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert abs(float(found.sum())) < 1e-6 * float(found.abs().sum())
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_the_identity_holds_in_every_family(family: str):
    search = searched(family=family)
    assert len(search.alpha) == (4 if family == "t5" else 2)
    torch.testing.assert_close(search.hypergradient()[1], by_leaf(search), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("granularity", ["block", "module"])
@pytest.mark.parametrize("train", ["Bu", "tl6"])
def test_q_k_and_v_that_share_their_u_are_searched_and_go_on_as_what_they_are(
    train: str, granularity: str, tmp_path: Path
):
    """Of single modules u belongs to three, whose gates differ: folded into it, one gate would act on all of them."""
    rule = {"granularity": granularity, "select": "top_k", "top_k": 1 if granularity == "block" else 8}
    config = {"structure": weftlora.Tied(train=train, group="fused_qkv")}
    search = searched("tied_tl6", config=config, **rule)
    gated = train == "Bu" and granularity == "module"
    assert (search.gates.factors is None) == gated
    expected = by_leaf(search)
    torch.testing.assert_close(search.hypergradient()[1], expected, rtol=1e-5, atol=1e-7)

    selection, batch = search.selection(), FAMILIES["llama"].batch()
    kept = {name for c in selection.chosen for name in c.modules}
    for name, site in sites(search.model).items():
        if name not in kept:
            site.layer_gate.zero_()
    before = logits(search.model, batch)
    model = weftlora.second_stage(search.model, selection, "continue")
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-6)
    assert {site.layer_gate is not None for site in sites(model).values()} == {gated}
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(llama().eval(), tmp_path)
    torch.testing.assert_close(logits(loaded, batch), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_exact_goes_twice_through_the_attention_that_has_a_second_derivative(attention: str):
    found = []
    inner = {"optimizer": "sgd", "lr": 0.5}
    for kind, fields in (("unrolled_exact", {}), ("unrolled_fd", {"fd_step": 1e-2})):
        search = searched(attention=attention, hypergrad=kind, inner_steps=2, inner=inner, **fields)
        _, taken = search._inner_steps()
        found.append(search.hypergradient(taken)[1])
        direct = searched(attention=attention, inner_steps=2, inner=inner)
        direct._inner_steps()
        assert not torch.allclose(found[-1], direct.hypergradient()[1], rtol=1e-2)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_without_a_second_derivative_is_refused_for_exact_before_any_step(attention: str):
    torch.manual_seed(0)
    model = get_peft_model(
        llama(),
        weftlora.PlainLoraConfig(layers=weftlora.Search(hypergrad="unrolled_exact", val_size=2, outer_batches=2)),
    )
    model.config._attn_implementation = attention
    ids = torch.randint(3, 64, (12, 7))
    with pytest.raises(ConfigError, match=rf"{attention}.*'eager', or use hypergrad='unrolled_fd'"):
        weftlora.search_layers(model, [{"input_ids": row, "labels": row} for row in ids])


class Once(torch.autograd.Function):
    """A kernel that can be differentiated once, as fused ones can."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_kernel_that_cannot_be_differentiated_twice_ends_in_the_same_advice():
    search = searched(hypergrad="unrolled_exact", inner={"optimizer": "sgd"})
    search.model.get_base_model().model.layers[1].register_forward_hook(lambda _m, _i, out: Once.apply(out))
    with pytest.raises(ConfigError, match=r"second derivatives.*unrolled_fd"):
        search.step()
