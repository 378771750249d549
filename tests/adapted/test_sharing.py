"""Tied groups: who shares what, the published parameter counts, and what keeps them tied through a model's life."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, RobertaConfig

import weftlora
from families import FAMILIES, STRUCTURES, adapter_config, logits, randomise, trainable
from weftlora.adapted.layer import WeftLinear
from weftlora.adapted.sharing import shared_keys
from weftlora.terms.structure.tied import Tied, TiedTerm

TIED = [name for name in STRUCTURES if name.startswith("tied")]


def sites(model: torch.nn.Module, adapter: str = "default") -> dict[str, TiedTerm]:
    """Module name → its term, for every site of an adapter."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, WeftLinear) and adapter in m.weft_site}
    return {n.removeprefix("base_model.model."): m.site(adapter).structure for n, m in found.items()}


def groups(model: torch.nn.Module, part: str) -> set[frozenset[str]]:
    """The sets of modules that use one and the same tensor for `part`."""
    by_tensor: dict[int, set[str]] = {}
    for name, term in sites(model).items():
        by_tensor.setdefault(id(term.part(part)), set()).add(name)
    return {frozenset(names) for names in by_tensor.values()}


def q(*names: str, layers: tuple[int, ...] = (0, 1)) -> frozenset[str]:
    return frozenset(f"model.layers.{i}.self_attn.{name}" for i in layers for name in names)


# ---------------------------------------------------------------------- who shares what


@pytest.mark.parametrize(
    ("group", "a_groups", "b_groups", "u_groups"),
    [
        ("module_type", {q("q_proj"), q("k_proj"), q("v_proj"), q("o_proj")},
         {q("q_proj"), q("k_proj"), q("v_proj"), q("o_proj")}, 8),
        ("shape", {q("q_proj", "o_proj"), q("k_proj", "v_proj")}, {q("q_proj", "o_proj"), q("k_proj", "v_proj")}, 8),
        ("fused_qkv", {q("q_proj", "k_proj", "v_proj"), q("o_proj")},
         {q("q_proj"), q("k_proj"), q("v_proj"), q("o_proj")}, 4),
    ],
)  # fmt: skip
def test_groups_of_a_llama_with_grouped_query_attention(group, a_groups, b_groups, u_groups, llama) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(llama, weftlora.TiedLoraConfig(r=2, group=group, target_modules=targets))
    assert groups(model, "A") == a_groups
    assert groups(model, "B") == b_groups
    assert len(groups(model, "u")) == u_groups
    assert len(groups(model, "v")) == 8
    for name, term in sites(model).items():
        assert term.part("B").shape == (16 if "k_proj" in name or "v_proj" in name else 32, 2)


def test_cross_attention_of_t5_reads_two_inputs_so_only_k_and_v_share_there() -> None:
    model = get_peft_model(FAMILIES["t5"].build(), weftlora.TiedLoraConfig(r=2, group="fused_qkv"))
    by_kind = {frozenset((n.split(".")[-2], n.split(".")[-1]) for n in g) for g in groups(model, "A")}
    own = {("SelfAttention", last) for last in "qkv"}
    assert by_kind == {
        frozenset(own),
        frozenset({("EncDecAttention", "q")}),
        frozenset({("EncDecAttention", "k"), ("EncDecAttention", "v")}),
    }
    instances = groups(model, "u")
    assert {len(g) for g in instances} == {1, 2, 3}
    assert len(instances) == 2 + 2 + 2 * 2  # 4 self-attentions; 2 cross-attentions with q alone and k, v together


@pytest.mark.parametrize(
    ("family", "last"), [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("phi3", "qkv_proj")]
)
def test_a_module_that_is_fused_already_is_one_site_tied_over_the_layers(family, last) -> None:
    model = get_peft_model(FAMILIES[family].build(), weftlora.TiedLoraConfig(r=2, group="fused_qkv"))
    assert all(name.endswith(last) for name in sites(model))
    assert [len(g) for g in groups(model, "A")] == [2]
    assert len(groups(model, "u")) == len(groups(model, "v")) == 2


def test_different_ranks_are_different_groups(llama) -> None:
    fields = {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\..*": 3}}
    model = get_peft_model(llama, weftlora.TiedLoraConfig(r=2, group="shape", **fields))
    assert len(groups(model, "A")) == 2


def test_names_at_the_top_of_a_model_have_keys_too() -> None:
    assert shared_keys(Tied(group="fused_qkv"), "q_proj", (2, 4, 4))["A"][0] == "fused"


# ---------------------------------------------------------------------- published counts


def on_meta(config) -> torch.nn.Module:
    auto = AutoModelForCausalLM if isinstance(config, LlamaConfig) else AutoModel
    with torch.device("meta"):
        return auto.from_config(config)


LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA3_8B = {**LLAMA2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
ROBERTA_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
PUBLISHED = [
    ("LLaMA-2-7B TL6 fused r=8", LlamaConfig(**LLAMA2_7B), {"group": "fused_qkv"}, 524_544),
    ("LLaMA-2-7B TL5 fused r=8", LlamaConfig(**LLAMA2_7B), {"train": "tl5", "group": "fused_qkv"}, 131_072),
    ("Llama-3-8B by type r=8", LlamaConfig(**LLAMA3_8B), {}, 344_832),
    ("Llama-3-8B fused r=8", LlamaConfig(**LLAMA3_8B), {"group": "fused_qkv"}, 278_784),
    ("RoBERTa-base by shape r=16", RobertaConfig(), {"r": 16, "group": "shape", "target_modules": ["query", "value"]}, 43_392),
    ("RoBERTa-large by shape r=8", RobertaConfig(**ROBERTA_LARGE),
     {"group": "shape", "target_modules": ["query", "value"]}, 65_920),
]  # fmt: skip


@pytest.mark.parametrize(("config", "fields", "count"), [pytest.param(*row[1:], id=row[0]) for row in PUBLISHED])
def test_parameter_counts_of_the_paper_and_of_third_parties(config, fields, count) -> None:
    model = get_peft_model(on_meta(config), weftlora.TiedLoraConfig(**{"r": 8, **fields}))
    assert model.get_nb_trainable_parameters()[0] == count
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_headline_of_12_5_percent() -> None:
    fused_lora = 4 * 32 * 8 * 4096  # per layer r (d + 3 d): one pair on the fused projection
    assert fused_lora == 4_194_304
    assert 524_544 / fused_lora == pytest.approx(0.12506, abs=5e-6)
    untied = weftlora.PlainLoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(on_meta(LlamaConfig(**LLAMA3_8B)), untied)
    assert model.get_nb_trainable_parameters()[0] == 4_718_592


# ---------------------------------------------------------------------- tied for life


def tied(structure: str, **fields) -> PeftModel:
    model = get_peft_model(FAMILIES["llama"].build(), adapter_config(structure, "llama", **fields))
    randomise(model)
    return model


def sharing(model: torch.nn.Module, adapter: str = "default") -> list[list[int]]:
    """Which sites use the same tensors, as numbers that can be compared between models."""
    seen: dict[int, int] = {}
    rows = []
    for term in sites(model, adapter).values():
        parts = [term.part(part) for part in ("A", "B", "u", "v")]
        rows.append([-1 if t is None else seen.setdefault(id(t), len(seen)) for t in parts])
    return rows


def reached(model: torch.nn.Module, adapter: str = "default") -> set[int]:
    """The tensors that the sites of an adapter compute with."""
    return {id(t) for term in sites(model, adapter).values() for part in "ABuv" if (t := term.part(part)) is not None}


@pytest.mark.parametrize("structure", TIED)
def test_casts_moves_and_copies_keep_the_groups(structure: str) -> None:
    model = tied(structure)
    expected = sharing(model)
    assert len({n for row in expected for n in row}) < sum(len(row) for row in expected)
    for changed in (model.to(torch.bfloat16), model.float(), model.double(), copy.deepcopy(model), model.to("meta")):
        assert sharing(changed) == expected
        dtypes = {t.dtype for term in sites(changed).values() for p in "ABuv" if (t := term.part(p)) is not None}
        assert dtypes == {next(changed.parameters()).dtype}


@pytest.mark.parametrize("structure", TIED)
def test_a_copy_shares_within_itself_and_with_nobody_else(structure: str) -> None:
    model = tied(structure)
    copied = copy.deepcopy(model)

    assert not reached(model) & reached(copied)
    assert reached(copied) <= {id(t) for t in [*copied.parameters(), *copied.buffers()]}


@pytest.mark.parametrize("structure", TIED)
def test_the_optimiser_holds_each_tied_tensor_once(structure: str) -> None:
    params = [p for p in tied(structure).parameters() if p.requires_grad]
    assert len(params) == len({id(p) for p in params})


@pytest.mark.parametrize("structure", ["tied_tl6", "tied_tl5_shape", "tied_tl6_fused"])
def test_a_tied_gradient_is_the_sum_over_the_layers_that_share(structure: str) -> None:
    batch = FAMILIES["llama"].batch()
    model = tied(structure).double()
    model(**batch).loss.backward()
    untied = {}
    alone = copy.deepcopy(model)
    for name, term in sites(alone).items():  # every site its own copies, same values
        untied[name] = {p: t.detach().clone().requires_grad_() for p in "ABuv" if (t := term.part(p)) is not None}
    for name, term in sites(alone).items():
        term.part = untied[name].get  # type: ignore[method-assign]
    alone(**batch).loss.backward()
    terms = sites(model)
    for part in "ABuv":
        for group in groups(model, part) if next(iter(terms.values())).part(part) is not None else ():
            total = sum(untied[name][part].grad for name in group)
            grad = terms[next(iter(group))].part(part).grad
            assert torch.allclose(grad, total, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("structure", TIED)
def test_deleting_an_adapter_on_the_owner_layer_hands_its_tensors_over(structure: str) -> None:
    batch = FAMILIES["llama"].batch()
    model = tied(structure).eval()
    first = model.base_model.model.model.layers[0]
    owners = [m for m in first.modules() if isinstance(m, WeftLinear)]
    pairs = {n: (t.part("A"), t.part("B")) for n, t in sites(model).items() if ".layers.1." in n}
    optimised = {id(p) for p in model.parameters() if p.requires_grad}

    for layer in owners:
        layer.delete_adapter("default")
    left = sites(model)
    assert set(left) == set(pairs)
    for name, (a, b) in pairs.items():
        assert left[name].part("A") is a
        assert left[name].part("B") is b
    assert {
        id(p) for p in model.parameters() if p.requires_grad
    } <= optimised  # the optimiser goes on with the same ones
    assert reached(model) <= {id(t) for t in [*model.parameters(), *model.buffers()]}

    expected = logits(model, batch)
    assert torch.equal(logits(copy.deepcopy(model), batch), expected)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())
    model.merge_adapter()
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)


@pytest.mark.parametrize("structure", TIED)
def test_merge_and_unload_survives_the_owner_going_first(structure: str) -> None:
    batch = FAMILIES["llama"].batch()
    model = tied(structure)
    expected = logits(model, batch)
    assert torch.allclose(logits(model.merge_and_unload(), batch), expected, atol=1e-5)


@pytest.mark.parametrize("structure", TIED)
def test_a_name_can_be_used_again_after_its_adapter_was_deleted(structure: str) -> None:
    model = tied(structure)
    model.add_adapter("other", adapter_config(structure, "llama"))
    expected = sharing(model, "other")
    model.delete_adapter("default")
    model.add_adapter("default", adapter_config(structure, "llama"))
    model.set_adapter("default")
    assert sharing(model, "default") == sharing(model, "other") == expected
    assert not reached(model, "default") & reached(model, "other")
