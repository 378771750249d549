"""A small stack of blocks whose layers can be searched in milliseconds, with a planted answer.

base = Stack(blocks=6)                      # residual blocks of two linear modules each
rows = planted(base, {1, 4}, count=128)     # targets of a teacher: base plus a low-rank update in blocks 1 and 4
search = make(base, rows, weftlora.Search(...)) # a LayerSearch on an adapted copy
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weftlora
from families import randomise
from weftlora.search import Selection
from weftlora.search.batches import Loss
from weftlora.search.driver import LayerSearch
from weftlora.search.hypergradient import Inner

WIDTH = 6


class Block(nn.Module):
    """Pre-norm, two linear modules, residual."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width + 2), nn.Linear(width + 2, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.tanh(self.up(self.norm(x)))))


class Stack(nn.Module):
    """x [rows, width] → y [rows, width] through `blocks` blocks; `checkpointing` is "none", "reentrant" or "non_reentrant"."""

    def __init__(self, blocks: int = 3, width: int = WIDTH, checkpointing: str = "none"):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing == "reentrant":
            x = x.requires_grad_()
        for block in self.blocks:
            kind = self.checkpointing
            x = block(x) if kind == "none" else checkpoint(block, x, use_reentrant=kind == "reentrant")
        return x


class FewBits(nn.Module):
    """A linear module that keeps its weight in int8, as quantisers make them: called, never read."""

    def __init__(self, whole: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.step, self.bias = float(whole.weight.detach().abs().max()) / 7, whole.bias
        self.weight = nn.Parameter((whole.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


def quantised(base: nn.Module) -> nn.Module:
    """`base` with its linear modules in few bits, in place."""
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear):
            base.set_submodule(name, FewBits(module))
    return base


def rounded(base: nn.Module) -> nn.Module:
    """The function of `quantised(base)` in linear modules that are not quantised, in place."""
    for module in base.modules():
        if isinstance(module, nn.Linear):
            few = FewBits(module)
            module.weight.data = few.weight.to(module.weight.dtype) * few.step
    return base


def stack(blocks: int = 3, seed: int = 0, **fields: Any) -> Stack:
    torch.manual_seed(seed)
    return Stack(blocks, **fields).double()


def adapted(base: nn.Module, search: weftlora.Search, seed: int = 1, *, moved: float = 0.0, **fields: Any) -> PeftModel:
    """An fp64 adapter of rank 2 on all linear modules of `base`; `moved` randomises it, as training would.

    Whole-number parameters of a quantised base stay as they are.
    """
    torch.manual_seed(seed)
    config = weftlora.WeftConfig(**{"r": 2, "target_modules": ["up", "down"], "layers": search, **fields})
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    if moved:
        model.double()
        randomise(model, seed, moved)
    return model.double()


def mse(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def labelled_mse(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over rows whose label is not −100, as transformers' losses are over tokens: 0/0 where there is none."""
    counted = batch["labels"] != -100
    return (model(batch["x"]) - batch["y"])[counted].square().mean()


def unlabelled(rows: list[dict[str, Tensor]], which: Collection[int]) -> list[dict[str, Tensor]]:
    """The same rows with labels, which are to be ignored in some of them."""
    return [{**row, "labels": torch.tensor(-100 if i in which else 1)} for i, row in enumerate(rows)]


def rows_of(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def planted(
    base: nn.Module, chosen: Collection[int], count: int = 128, *, size: float = 1.0, noise: float = 0.0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Rows whose targets are those of `base` with a rank-2 update of both modules in the chosen blocks."""
    teacher, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i, block in enumerate(teacher.blocks):
            for module in (block.up, block.down) if i in chosen else ():
                out, fan_in = module.weight.shape
                low = torch.randn(out, 2, generator=draw) @ torch.randn(2, fan_in, generator=draw)
                module.weight.add_(low.double(), alpha=size / (2 * fan_in) ** 0.5)
        x = torch.randn(count, WIDTH, generator=draw).double()
        y = teacher(x)
        return rows_of(x, y + noise * torch.randn(y.shape, generator=draw).double())


def distinct(blocks: int = 6, seed: int = 0) -> Stack:
    """Blocks that each write into two coordinates of their own, so that none can do what another is to learn."""
    torch.manual_seed(seed)
    net = Stack(blocks, 2 * blocks).double()
    with torch.no_grad():
        for i, block in enumerate(net.blocks):
            own = torch.zeros(2 * blocks, 1, dtype=torch.float64)
            own[2 * i : 2 * i + 2] = 1
            block.down.weight.normal_().mul_(own).div_(block.down.weight.norm())
            block.down.bias.mul_(own[:, 0])
    return net


def taught(
    base: Stack, chosen: Collection[int], count: int = 128, *, size: float = 0.5, noise: float = 0.0, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Rows whose targets are those of `base` with a full-rank update of `up` in the chosen blocks."""
    teacher, draw = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for i in sorted(chosen):
            weight = teacher.blocks[i].up.weight
            weight.add_(torch.randn(weight.shape, generator=draw).double(), alpha=size / weight.shape[1] ** 0.5)
        x = torch.randn(count, weight.shape[1], generator=draw).double()
        y = teacher(x)
        return rows_of(x, y + noise * torch.randn(y.shape, generator=draw).double())


def make(
    model: PeftModel,
    rows: list[dict[str, Tensor]],
    *,
    seed: int = 0,
    loss: Loss = mse,
    training: int | None = None,
    **inner: Any,
) -> LayerSearch:
    settings = Inner(
        **{"lr": 1e-2, "batch_size": 4, "accumulation": 1, "schedule": "constant", "max_grad_norm": 0.0, **inner}
    )
    return LayerSearch(
        model, model.peft_config["default"].layers, settings, rows, seed=seed, loss=loss, training=training
    )


SMALL = {"outer_batches": 2, "val_size": 12, "steps": 3}


def searched(structure: dict[str, Any] | None = None, **fields: Any) -> tuple[PeftModel, Selection]:
    """A model of four blocks with its search done, and what was selected: two blocks."""
    search = weftlora.Search(**{**SMALL, "select": "top_k", "top_k": 2, **fields})
    model = adapted(stack(4), search, moved=0.3, **(structure or {}))
    return model, make(model, planted(stack(4), {1, 2}, 40)).run()


def two_adapters() -> PeftModel:
    """A model with a searched adapter, which is active, and another one."""
    model = adapted(stack(3), weftlora.Search(**SMALL))
    model.add_adapter("other", weftlora.PlainLoraConfig(r=2, target_modules=["up", "down"]))
    return model.double()
