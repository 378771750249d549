"""Tied-LoRA: what is tied to what, and the parameter counts the paper and its re-implementations print."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, RobertaConfig, RobertaModel

import weftlora
from weftlora.adapted.layer import WeftLinear
from weftlora.terms.structure.tied import TiedTerm

D, KV, R, L = 6, 4, 3, 2
QKV = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """Separate q, k, v; k and v are narrower, as with grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, KV), nn.Linear(D, KV)
        self.o_proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + torch.tanh(self.o_proj(q)) * k.sum(-1, keepdim=True) * v.sum(-1, keepdim=True)


class FusedAttention(nn.Module):
    """The same function with one projection, as in the paper's models."""

    def __init__(self, from_: Attention):
        super().__init__()
        parts = (from_.q_proj, from_.k_proj, from_.v_proj)
        self.query_key_value = nn.Linear(D, D + 2 * KV)
        self.query_key_value.weight.data = torch.cat([p.weight.data for p in parts])
        self.query_key_value.bias.data = torch.cat([p.bias.data for p in parts])
        self.o_proj = from_.o_proj

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x).split([D, KV, KV], -1)
        return x + torch.tanh(self.o_proj(q)) * k.sum(-1, keepdim=True) * v.sum(-1, keepdim=True)


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": layer}) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["self_attn"](x)
        return x


def separate() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Attention() for _ in range(L)]


def tied(group: str, targets: list[str], **fields: object) -> PeftModel:
    return get_peft_model(
        Stack(separate()), weftlora.TiedLoraConfig(r=R, group=group, target_modules=targets, **fields)
    ).double()


def terms(model: nn.Module) -> dict[tuple[int, str], TiedTerm]:
    """(layer, last name) → term."""
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, WeftLinear):
            parts = name.split(".")
            out[int(parts[parts.index("layers") + 1]), parts[-1]] = module.site("default").structure
    return out


def partition(model: nn.Module, part: str) -> set[frozenset[tuple[int, str]]]:
    """Which sites hold one and the same tensor as `part`."""
    groups: dict[int, set[tuple[int, str]]] = {}
    for key, term in terms(model).items():
        groups.setdefault(id(term.part(part)), set()).add(key)
    return {frozenset(group) for group in groups.values()}


def by(*keys: object) -> set[frozenset[tuple[int, str]]]:
    return {frozenset(k) for k in keys}


# ---------------------------------------------------------------------- what is tied


def test_by_module_type_the_same_projection_of_all_layers_shares_a_pair():
    model = tied("module_type", [*QKV, "o_proj"])
    same = by(*([(0, n), (1, n)] for n in (*QKV, "o_proj")))
    alone = by(*([key] for key in terms(model)))
    assert partition(model, "A") == partition(model, "B") == same
    assert partition(model, "u") == partition(model, "v") == alone


def test_by_shape_q_shares_with_o_and_k_with_v():
    model = tied("shape", [*QKV, "o_proj"])
    same = by(
        *([(layer, n) for layer in (0, 1) for n in names] for names in (("q_proj", "o_proj"), ("k_proj", "v_proj")))
    )
    assert partition(model, "A") == partition(model, "B") == same
    assert partition(model, "u") == partition(model, "v") == by(*([key] for key in terms(model)))


def test_fused_qkv_shares_a_everywhere_u_within_a_layer_and_b_by_kind():
    model = tied("fused_qkv", QKV)
    assert partition(model, "A") == by(terms(model))
    assert partition(model, "u") == by(*([(layer, n) for n in QKV] for layer in range(L)))
    assert partition(model, "B") == by(*([(layer, n) for layer in range(L)] for n in QKV))
    assert partition(model, "v") == by(*([key] for key in terms(model)))


def test_fused_qkv_on_separate_projections_is_the_papers_one_fused_projection():
    """The same function and the same training path as Tied-LoRA on one query_key_value module per layer."""
    apart = tied("fused_qkv", QKV)
    config = weftlora.TiedLoraConfig(r=R, target_modules=["query_key_value"])
    fused = get_peft_model(Stack([FusedAttention(layer) for layer in separate()]), config).double()
    split, whole = terms(apart), terms(fused)
    with torch.no_grad():
        owner = whole[0, "query_key_value"]
        owner.A.copy_(split[0, "q_proj"].part("A"))
    x = torch.randn(7, D, dtype=torch.float64)
    for model in (apart, fused):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(5):
            optimiser.zero_grad()
            (model(x) - x.cos()).square().sum().backward()
            optimiser.step()
    assert owner.B.abs().max() > 0.01
    torch.testing.assert_close(apart(x), fused(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(split[0, "q_proj"].part("A"), owner.A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([split[0, n].part("B") for n in QKV]), owner.B, rtol=1e-9, atol=1e-9)
    for layer in range(L):
        term = whole[layer, "query_key_value"]
        torch.testing.assert_close(split[layer, "k_proj"].part("u"), term.u, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.cat([split[layer, n].part("v") for n in QKV]), term.v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", ["tl5", "tl6", "vera", "Bu"])
def test_counts_by_formula(train: str):
    outs, modules = {"q_proj": D, "k_proj": KV, "v_proj": KV}, 3 * L
    u, v, b = R, L * sum(outs.values()), R * sum(outs.values())
    want = {
        "module_type": {"A": 3 * R * D, "B": b, "u": modules * u, "v": v},
        "fused_qkv": {"A": R * D, "B": b, "u": L * u, "v": v},
        "shape": {"A": 2 * R * D, "B": R * (D + KV), "u": modules * u, "v": v},
    }
    for group, sizes in want.items():
        model = tied(group, QKV, train=train)
        trained = terms(model)[0, "q_proj"].choice.trained
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(sizes[part] for part in trained)


def test_different_ranks_are_never_tied():
    model = tied("module_type", QKV, rank_pattern={r"layers\.1\..*q_proj": 2})
    assert partition(model, "A") == by([(0, "q_proj")], [(1, "q_proj")], *([(0, n), (1, n)] for n in QKV[1:]))


# ---------------------------------------------------------------------- printed counts, on the meta device

LLAMA2_7B = LlamaConfig()  # the class's defaults
LLAMA3_8B = LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
ROBERTA = {
    "base": RobertaConfig(),
    "large": RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


def count(base: type, config: object, r: int, **fields: object) -> int:
    with torch.device("meta"):
        model = base(config)
    model = get_peft_model(model, weftlora.TiedLoraConfig(r=r, **fields))
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("r", "train", "size", "share"),
    [
        (8, "tl6", 524_544, 12.506),  # the paper's headline, 12.5 %
        (8, "tl5", 131_072, 3.125),  # "~4.2M -> ~131K, a 96.875% reduction"
        (8, "vera", 393_472, 9.381),
        (2, "tl6", 426_048, 40.63),
        (280, "tl6", 4_989_696, 3.399),  # PRoLoRA prints 4.99M
    ],
)
def test_llama2_7b_with_fused_qkv(r: int, train: str, size: int, share: float):
    """Default targets are the attention inputs; the paper's LoRA adapts the fused projection: 4 L r d parameters."""
    assert count(LlamaModel, LLAMA2_7B, r, train=train, group="fused_qkv") == size
    assert 100 * size / (4 * 32 * r * 4096) == pytest.approx(share, abs=5e-3)


@pytest.mark.parametrize(("group", "size"), [("module_type", 344_832), ("fused_qkv", 278_784)])
def test_llama3_8b_with_grouped_queries(group: str, size: int):
    assert count(LlamaModel, LLAMA3_8B, 8, group=group) == size


@pytest.mark.parametrize(("name", "r", "size"), [("base", 16, 43_392), ("large", 8, 65_920)])
def test_roberta_by_shape_has_the_sizes_vb_lora_prints(name: str, r: int, size: int):
    assert count(RobertaModel, ROBERTA[name], r, group="shape", target_modules=["query", "value"]) == size
