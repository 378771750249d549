"""Embeddings and convolutions as the x of the equation: one-hot rows and patches, held against stock LoRA and against ΔW."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import weftlora
from families import FAMILIES, STRUCTURES, randomise
from weftlora.adapted.layer import WeftLinear


class Sees(nn.Module):
    """Tokens and images, one module of each kind; convolutions with strides, padding and dilation."""

    def __init__(self, usual: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6, padding_idx=0)
        self.line = nn.Conv1d(6, 5, 3, padding=1, padding_mode="zeros" if usual else "circular")
        self.image = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=(1, 1 if usual else 2), bias=False)
        self.volume = nn.Conv3d(2, 5, 2)
        self.grouped = nn.Conv2d(6, 10, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(5, 5, 3, padding=1, groups=5)
        self.head = nn.Linear(5, 4)

    def forward(self, ids: torch.Tensor, image: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        twice = self.grouped(torch.cat([image, image.flip(1)], 1)).flatten(2)
        seen = [
            self.depthwise(self.line(self.tokens(ids).mT)),
            self.image(image).flatten(2),
            self.volume(volume).flatten(2),
        ]
        seen.append(twice.unflatten(1, (5, 2)).sum(2))
        return self.head(torch.cat(seen, -1).mT).tanh()


KINDS = ("tokens", "line", "image", "volume", "grouped", "depthwise")


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "ids": torch.tensor([[1, 5, 0, 9], [3, 3, 10, 2]]),
        "image": torch.randn(2, 3, 8, 8, generator=generator),
        "volume": torch.randn(2, 2, 3, 3, 3, generator=generator),
    }


def adapted(
    structure: str = "plain", targets: object = KINDS, *, usual: bool = False, **fields
) -> tuple[nn.Module, PeftModel]:
    torch.manual_seed(0)
    base = Sees(usual).eval()
    model = get_peft_model(copy.deepcopy(base), STRUCTURES[structure](r=2, target_modules=list(targets), **fields))
    return base, model.eval()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_starts_as_the_base_trains_and_comes_back(structure: str, tmp_path) -> None:
    base, model = adapted(structure)
    assert torch.allclose(model(**batch()), base(**batch()), atol=1e-6)
    model.train()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    randomise(model)
    model(**batch()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights.values())
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(again(**batch()), model(**batch()))
    assert not torch.allclose(model(**batch()), base(**batch()), atol=1e-3)


@pytest.mark.parametrize(
    "fields", [{}, {"boost": weftlora.Dash(directions=1, after=1)}, {"start": weftlora.Directions(after=1)}]
)
@pytest.mark.parametrize("structure", ["plain", "tied_tl6"])
def test_the_update_is_that_of_a_merge(structure: str, fields: dict) -> None:
    if structure.startswith("tied") and "start" in fields:
        pytest.skip("refused")
    base, model = adapted(structure, **fields)
    randomise(model)
    if fields:  # launched by a step
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**batch()).sum().backward()
        optimizer.step()
        randomise(model)
    expected = model(**batch())
    assert not torch.allclose(expected, base(**batch()), atol=1e-3)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(merged(**batch()), expected, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(model(**batch()), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(**batch()), expected)


def test_plain_is_stock_lora(tmp_path) -> None:
    """With the same tensors in both, on every kind of module; stock's convolutions know no dilation and no padding but zeros, and
    where the base has groups its A reads all of them: ours of one group, once for every group, is what it has to be."""
    base, model = adapted(lora_alpha=3, usual=True)
    times = {"grouped": 2, "depthwise": 5}
    patterns = {
        "rank_pattern": {n: 2 * g for n, g in times.items()},
        "alpha_pattern": {n: 3 * g for n, g in times.items()},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be merged
        config = LoraConfig(r=2, lora_alpha=3, target_modules=list(KINDS), **patterns)
        stock = get_peft_model(copy.deepcopy(base), config).eval()
    randomise(model)
    with torch.no_grad():
        for name, layer in stock.named_modules():
            if hasattr(layer, "lora_A") and name:
                site = model.get_submodule(name).site("default").structure
                a, b = (
                    (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
                    if len(layer.lora_embedding_A)
                    else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
                )
                g = times.get(name.rpartition(".")[2], 1)
                own = site.A.view(2, -1, *a.shape[2:])
                a.copy_(torch.block_diag(*[own.flatten(1)] * g).view(a.shape) if g > 1 else own.view(a.shape))
                b.copy_(site.B.view(b.shape))
    assert torch.allclose(model(**batch()), stock(**batch()), atol=1e-6)


def test_a_router_reads_what_the_module_reads() -> None:
    _, model = adapted("hydra", ["image"])
    randomise(model)
    layer = next(m for m in model.modules() if isinstance(m, WeftLinear))
    term, conv, x = layer.site("default").structure, layer.get_base_layer(), batch()["image"]
    patches = F.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=2).mT  # [B, positions, in · k]
    f = term.factors(layer.site("default").scale)
    omega = (patches @ f.router.T).softmax(-1)
    u = patches @ f.A.T
    heads = f.B.unflatten(1, (f.heads, 2))
    update = torch.einsum("bpn,bpr,onr->bop", omega, u, heads) * f.scale
    assert torch.allclose(layer(x).flatten(2), conv(x).flatten(2) + update, atol=1e-5)


def test_an_embedding_that_scales_what_it_gives_is_scaled_with_its_adapter() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    base = nn.ModuleDict({"embed": Scaled(7, 4)})
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=2, target_modules=["embed"], init_lora_weights=False))
    layer, ids = model.base_model.model["embed"], torch.arange(7)
    expected = layer(ids)
    assert torch.allclose((layer.weight + layer.get_delta_weight("default"))[ids] * 3, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["grouped", "depthwise"])
def test_slots_of_a_grouped_convolution_are_scored_one_by_one(kind: str) -> None:
    """With a gate per part of the batch h is computed for every group, and without one ΔW: both are the same function."""
    _, model = adapted("plain", [kind], lora_dropout=0.0)
    randomise(model)
    layer = model.base_model.model.get_submodule(kind)
    site, x = layer.site("default"), torch.randn(4, layer.base_layer.in_channels, *[6] * (layer.weight.dim() - 2))
    expected = layer(x)
    site.keep = torch.ones(2, 2)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    site.keep = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    with model.disable_adapter():
        base = layer(x)
    assert torch.allclose(layer(x), torch.cat([expected[:2], base[2:]]), atol=1e-6)


def test_a_convolution_whose_weight_is_read_without_a_call_is_refused() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d = nn.Conv1d(4, 4, 3, groups=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv1d(x, self.conv1d.weight, groups=4)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d = nn.Conv1d(4, 4, 3, groups=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv1d(x.to(self.conv1d.weight.dtype))

    model = get_peft_model(nn.Sequential(Calls()), weftlora.PlainLoraConfig(target_modules=["conv1d"]))
    assert type(model.base_model.model[0].conv1d) is WeftLinear
    with pytest.raises(
        weftlora.TargetError, match=r"0\.conv1d belongs to a Mixer, whose code reads its weight without calling it"
    ):
        get_peft_model(nn.Sequential(Mixer()), weftlora.PlainLoraConfig(target_modules=["conv1d"]))
    with pytest.raises(
        weftlora.TargetError, match="0 is a ConvTranspose1d; of convolutions Conv1d, Conv2d and Conv3d carry"
    ):
        get_peft_model(nn.Sequential(nn.ConvTranspose1d(4, 4, 1)), weftlora.PlainLoraConfig(target_modules=["0"]))


def test_an_embedding_of_a_language_model_trains_beside_its_linears(tmp_path) -> None:
    model = get_peft_model(
        FAMILIES["llama"].build(), weftlora.HydraLoraConfig(r=2, heads=2, target_modules=["embed_tokens", "q_proj"])
    )
    randomise(model)
    batch = FAMILIES["llama"].batch()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    ids = batch["input_ids"]
    assert torch.isfinite(model.generate(input_ids=ids, max_new_tokens=3)).all()


def test_what_is_no_linear_module_is_not_exported(tmp_path) -> None:
    model = get_peft_model(
        FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    )
    for write in (weftlora.export_lora, weftlora.merge):
        with pytest.raises(
            weftlora.MergeError, match=r"model\.embed_tokens is a Embedding; .* model\.merge_and_unload\(\)"
        ):
            write(model, tmp_path / write.__name__)
    assert not list(tmp_path.iterdir())
