"""The transformer blocks of a model, found by object: no naming scheme is assumed.

A stack is an outermost `nn.ModuleList` whose entries hold linear modules without being one; its entries are blocks. Blocks
are numbered in the order in which the model lists them, through all of its stacks:

    Llama   model.layers.0 … n−1                      0 … n−1
    GPT-2   transformer.h.0 …                         0 …
    BERT    bert.encoder.layer.0 …                    0 …
    T5      encoder.block.0 …, decoder.block.0 …      0 … n−1, n … n+m−1

Lists inside a block (T5's sublayers, experts) belong to the block. A block that is listed twice counts once.
"""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D


class Blocks:
    """Names of the blocks of one model, in order; `number[name]` is a block's number."""

    def __init__(self, model: nn.Module):
        self.model_name = type(model).__name__
        self.modules = {name for name, _ in model.named_modules()}
        outer: list[str] = []
        names: dict[int, str] = {}
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{before}.") for before in outer):
                continue
            outer.append(name)
            for i, entry in enumerate(module):
                if _is_block(entry):
                    names.setdefault(id(entry), f"{name}.{i}" if name else str(i))
        self.names = list(names.values())
        self.number = {name: i for i, name in enumerate(self.names)}

    def of(self, module_name: str) -> str | None:
        """The block that a module is in, by name; None outside of all blocks."""
        parts = module_name.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return next((prefix for prefix in prefixes if prefix in self.number), None)


def _is_block(entry: nn.Module) -> bool:
    return not _is_linear(entry) and any(_is_linear(module) for module in entry.modules())


def _is_linear(module: nn.Module) -> bool:
    """Whether a site could stand here: a linear module of any kind, plain, quantised or adapted already."""
    if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)):
        return True
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )
