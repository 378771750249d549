"""Flexora's hypergradients are those of the program that runs: brute-force central differences in fp64 through real steps.

What is tested gives its numbers (W, A, B, moments) and its answer; the program they are differences of is `programs`, which
shares no code with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from peft import get_peft_model
from programs import Descent, Loss, after, by_name, central, lora, transformer_loss
from torch import Tensor, nn
from torch.nn import functional as F

import weftlora
from weftlora.search.driver import LayerSearch
from weftlora.search.hypergradient import Inner

ALPHA = torch.tensor([0.2, -0.3], dtype=torch.float64)


class Branches(nn.Module):
    """Two 'blocks' side by side: y = W₀x + W₁x, so that the loss of squares has its gradients in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(5, 4, bias=False)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return sum(block["up"](x) for block in self.layers)


class Block(nn.Module):
    """Of a Llama, all of it in fp64: transformers' own computes norms and positions in fp32, which central differences see."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(width, width, bias=False) for n in "qkvo"})
        sizes = {"gate_proj": (width, width + 2), "up_proj": (width, width + 2), "down_proj": (width + 2, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        q, k, v = (self.self_attn[f"{n}_proj"](y).unflatten(-1, (2, -1)).transpose(1, 2) for n in "qkv")
        mixed = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(-2))
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y))

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions as a product of complex numbers."""
        half = x.shape[-1] // 2
        rate = torch.tensor([10000 ** (-i / half) for i in range(half)], dtype=x.dtype)
        angle = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), rate)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)


class Transformer(nn.Module):
    """Two blocks; the loss is that of the next token."""

    def __init__(self, width: int = 8, words: int = 13) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(words, width),
                "layers": nn.ModuleList(Block(width) for _ in range(2)),
                "norm": nn.RMSNorm(width, 1e-6),
            }
        )
        self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.model["embed_tokens"](input_ids)
        for block in self.model["layers"]:
            x = block(x)
        logits = self.lm_head(self.model["norm"](x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@dataclass
class Problem:
    """A search about to take its K steps, and the losses of the same problem written out."""

    search: LayerSearch
    train: Loss
    validation: Loss
    h: float


def adapter(model: nn.Module, loss: object, rows: tuple, **fields: object) -> LayerSearch:
    inner = Inner(batch_size=8, accumulation=1, schedule="constant", **fields.pop("inner"))
    search = weftlora.Search(outer_batches=1, val_size=8, steps=3, **fields)
    torch.manual_seed(1)
    model = get_peft_model(
        model.double(),
        weftlora.WeftConfig(r=2, lora_alpha=3, target_modules=r".*(up|_proj)", layers=search),
        autocast_adapter_dtype=False,
    )
    found = LayerSearch(model.double(), search, inner, *rows, loss=loss)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        for p in found.passes.params:
            p.copy_(0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
        found.alpha.copy_(ALPHA)
    found.gates.write(found.search.gates(ALPHA))
    for site in found.gates.sites:
        site.awaits_search = False
    return found


def plain_names(search: LayerSearch) -> list[str]:
    """The trained parameters as module.A and module.B."""
    return [
        name.replace("base_model.model.", "", 1).replace("weft_site.default.structure.", "") for name in search.named
    ]


def branches(**fields: object) -> Problem:
    torch.manual_seed(0)
    model = Branches()
    draw = torch.Generator().manual_seed(2)
    x, y = (torch.randn(16, n, generator=draw, dtype=torch.float64) for n in (5, 4))
    rows = [[{"x": x[i], "y": y[i]} for i in part] for part in (range(8), range(8, 16))]
    search = adapter(model, lambda m, b: (m(b["x"]) - b["y"]).square().mean(), tuple(rows), **fields)
    weight = [block["up"].get_base_layer().weight.detach() for block in search.model.base_model.model.layers]
    names = plain_names(search)

    def loss(part: slice, theta: list[Tensor], gate: Tensor) -> Tensor:
        of = by_name(names, theta)
        out = sum(lora(x[part], weight[i], *(of[f"layers.{i}.up.{n}"] for n in "AB"), gate[i], 1.5) for i in range(2))
        return (out - y[part]).pow(2).mean()

    return Problem(search, partial(loss, slice(0, 8)), partial(loss, slice(8, 16)), 1e-4)


def transformer(**fields: object) -> Problem:
    torch.manual_seed(0)
    model = Transformer().double()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(0, 13, (16, 6), generator=torch.Generator().manual_seed(2))
    rows = [[{"input_ids": tokens[i], "labels": tokens[i]} for i in part] for part in (range(8), range(8, 16))]
    search = adapter(model, lambda m, b: m(b["input_ids"], b["labels"]), tuple(rows), **fields)
    names = plain_names(search)

    def loss(part: slice, theta: list[Tensor], gate: Tensor) -> Tensor:
        of = by_name(names, theta)

        def adapted(x: Tensor, name: str) -> Tensor:
            block = int(name.split(".")[2])
            return lora(x, weights[f"{name}.weight"], of[f"{name}.A"], of[f"{name}.B"], gate[block], 1.5)

        return transformer_loss(weights, 2, 1e-6, tokens[part], tokens[part], adapted, 2)

    return Problem(search, partial(loss, slice(0, 8)), partial(loss, slice(8, 16)), 1e-4)


PROBLEMS: dict[str, Callable[..., Problem]] = {"branches": branches, "transformer": transformer}


def state_of(search: LayerSearch, kind: str) -> tuple[list[Tensor], Descent]:
    """θ and the optimiser as they are."""
    params, inner = search.passes.params, search.inner
    made = Descent(kind, inner.lr, inner.weight_decay, inner.max_grad_norm)
    kept = [search.loop.optimizer.state.get(p, {}) for p in params]
    if kind == "adamw" and all(kept):
        made.t = int(kept[0]["step"])
        made.m, made.v = ([each[name].clone() for each in kept] for name in ("exp_avg", "exp_avg_sq"))
    return [p.detach().clone() for p in params], made


def errors(problem: Problem, kind: str, warm: bool) -> tuple[float, Tensor, Tensor]:
    """Of the hypergradient, relative; it; and the differences."""
    search = problem.search
    if warm:
        for _ in range(3):
            search._inner_steps()
    theta, start = state_of(search, kind)

    def program(alpha: Tensor) -> float:
        opt = lambda: replace(start, m=list(start.m), v=list(start.v))  # noqa: E731
        return after(theta, alpha, problem.train, problem.validation, opt, search.search.inner_steps)

    expected = central(program, ALPHA, problem.h)
    found = search.hypergradient(search._inner_steps()[1])[1]
    assert found is not None
    return float((found - expected).norm() / expected.norm()), found, expected


INNER = {
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
    "sgd": {"lr": 0.05, "weight_decay": 0.1},
    "sign_sgd": {"lr": 0.01, "weight_decay": 0.1},
}


@pytest.mark.parametrize("state", ["fresh", "warm"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("optimizer", list(INNER))
@pytest.mark.parametrize("problem", list(PROBLEMS))
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_exact_and_fd_are_central_differences_of_the_program(
    steps: int, problem: str, optimizer: str, clip: float, state: str
):
    inner = {"optimizer": optimizer, "max_grad_norm": clip, **INNER[optimizer]}
    found = {}
    for kind, most in (("unrolled_exact", 1e-6), ("unrolled_fd", 1e-2)):
        made = PROBLEMS[problem](inner=inner, inner_steps=steps, hypergrad=kind, fd_step=1e-3)
        if optimizer == "sign_sgd" or (optimizer, state) == ("adamw", "fresh"):
            made.h = 1e-6  # a sign turns, or nearly so, within what a longer difference would span
        error, found[kind], expected = errors(made, optimizer, state == "warm")
        assert error < most, (found[kind], expected)
