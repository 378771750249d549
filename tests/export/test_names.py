"""Names that peft reads as others: suffixes, dots, numbers. What it makes of our config is exactly the sites that were meant."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from weftlora.errors import AdapterError
from weftlora.host.stock_lora import check_resolution, stock_config

TRAPS = [
    "h.1.attn", "h.11.attn", "h.1.attn_out", "inner.h.1.attn", "deep.inner.h.1.attn", "hx1.attn", "attn", "h.1.mlp",
]  # fmt: skip


def model(names: list[str]) -> nn.Module:
    """Linear modules at these names."""
    top = nn.Module()
    for name in names:
        at = top
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, nn.Linear(64, 64))
    return top


def as_peft_reads(config: LoraConfig, net: nn.Module) -> dict[str, tuple[int, float]]:
    """Site → (rank, scale) in stock peft."""
    tuned = get_peft_model(net, config)
    found = tuned.base_model.model.named_modules()
    return {name: (m.r["default"], m.scaling["default"]) for name, m in found if hasattr(m, "lora_A")}


def all_names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_modules()]


def test_every_site_gets_its_own_rank_whatever_the_others_are_called():
    net = model(TRAPS)
    ranks = {name: number + 2 for number, name in enumerate(TRAPS)}
    assert as_peft_reads(stock_config(all_names(net), ranks), net) == {name: (r, 1.0) for name, r in ranks.items()}


@pytest.mark.parametrize("adapted", [["h.1.attn"], ["attn"], ["h.1.attn", "inner.h.1.attn"], ["h.1.mlp", "hx1.attn"]])
def test_exactly_the_adapted_modules_are_targets(adapted: list[str]):
    net = model(TRAPS)
    ranks = {name: 3 + number for number, name in enumerate(adapted)}
    config = stock_config(all_names(net), ranks)
    assert as_peft_reads(config, net) == {name: (r, 1.0) for name, r in ranks.items()}


def test_many_targets_are_not_shortened_to_a_wrong_suffix():
    """From 20 names on, peft replaces them by the shortest suffixes that it believes to mean the same."""
    names = [f"layers.{i}.{part}.q" for i in range(15) for part in ("self", "cross")]
    net = model([*names, "q", "self.q"])
    ranks = {name: 1 + number % 3 for number, name in enumerate(names) if number % 7}
    assert as_peft_reads(stock_config(all_names(net), ranks), net) == {name: (r, 1.0) for name, r in ranks.items()}


def test_the_resolution_is_order_free_because_files_sort_their_keys():
    net = model(["b.x", "a.b.x"])
    config = stock_config(all_names(net), {"b.x": 2, "a.b.x": 3})
    for table in (config.rank_pattern, config.alpha_pattern):
        assert {key: bool(re.match(rf"(.*\.)?({key})$", "a.b.x")) for key in table} == {r"^b\.x": False}


def test_a_naive_config_is_caught():
    net = model(TRAPS)
    names, ranks = all_names(net), {"h.1.attn": 2, "inner.h.1.attn": 4}
    by_list = LoraConfig(r=4, lora_alpha=4, target_modules=list(ranks), rank_pattern={"h.1.attn": 2})
    with pytest.raises(AdapterError, match=r"would adapt deep\.inner\.h\.1\.attn"):
        check_resolution(by_list, names, ranks)
    by_regex = r"h\.1\.attn|inner\.h\.1\.attn"
    no_alpha = LoraConfig(r=4, lora_alpha=4, target_modules=by_regex, rank_pattern={r"^h\.1\.attn": 2})
    with pytest.raises(AdapterError, match=r"r=2 and alpha=4 for h\.1\.attn, which has rank 2"):
        check_resolution(no_alpha, names, ranks)
    unanchored = {r"h\.1\.attn": 2}
    both = LoraConfig(r=4, lora_alpha=4, target_modules=by_regex, rank_pattern=unanchored, alpha_pattern=unanchored)
    with pytest.raises(AdapterError, match=r"r=2 and alpha=2 for inner\.h\.1\.attn, which has rank 4"):
        check_resolution(both, names, ranks)
