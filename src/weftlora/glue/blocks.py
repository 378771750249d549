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

import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from weftlora.errors import TargetError, suggest
from weftlora.terms.layers.every import All
from weftlora.terms.layers.only import Only
from weftlora.terms.layers.search import Search


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

    def adapts(self, layers: All | Only | Search, module_name: str) -> bool:
        """Whether a targeted module gets a site.

        `All`: yes. `Only`: it names the module, its block, or a module that it is in. `Search`: it is in a block, or modules
        are searched.
        """
        if isinstance(layers, All):
            return True
        block = self.of(module_name)
        if isinstance(layers, Search):
            return block is not None or layers.granularity == "module"
        if block is not None and self.number[block] in layers.blocks:
            return True
        names = (entry for entry in layers.blocks if isinstance(entry, str))
        return any(module_name == name or module_name.startswith(f"{name}.") for name in names)

    def check(self, layers: All | Only | Search, targeted: list[str]) -> None:
        """Raise `TargetError` if an entry of `Only` adapts nothing, or a search has fewer than two groups.

        Args:
            targeted: the modules that would be adapted with layers=All().
        """
        if isinstance(layers, Only):
            for entry in layers.blocks:
                self._check_entry(entry, targeted)
        elif isinstance(layers, Search):
            self._check_search(layers, targeted)

    def _check_search(self, search: Search, targeted: list[str]) -> None:
        groups = {self.of(name) if search.granularity == "block" else name for name in targeted} - {None}
        if len(groups) < 2:
            raise TargetError(
                f"layers=Search() has {len(groups)} {search.granularity}s of {self.model_name} to choose from, with "
                f"{len(targeted)} modules targeted: target modules in at least two, or use layers=All()."
            )
        outside = [name for name in targeted if not self.adapts(search, name)]
        if outside:
            warnings.warn(
                f"{len(outside)} targeted modules outside of all blocks, such as {outside[0]}, have no place in a search of blocks "
                "and are not adapted: name them in exclude_modules, or search with granularity='module'.",
                stacklevel=2,
            )

    def _check_entry(self, entry: int | str, targeted: list[str]) -> None:
        if isinstance(entry, int) and entry >= len(self.names):
            range_ = f", {self.names[0]} (0) to {self.names[-1]} ({len(self.names) - 1})" if self.names else ""
            raise TargetError(
                f"layers=Only names block {entry}, but {self.model_name} has {len(self.names)} blocks{range_}: count from 0, "
                "through all stacks."
            )
        if isinstance(entry, str) and entry not in self.modules:
            raise TargetError(
                f"layers=Only names {entry!r}, which {self.model_name} lacks: {suggest(entry, self.names)}"
            )
        if not any(self.adapts(Only((entry,)), name) for name in targeted):
            where = repr(self.names[entry]) if isinstance(entry, int) else repr(entry)
            raise TargetError(
                f"layers=Only names {where}, in which no module is targeted: leave it out, or change target_modules."
            )


def _is_block(entry: nn.Module) -> bool:
    return not _is_linear(entry) and any(_is_linear(module) for module in entry.modules())


def _is_linear(module: nn.Module) -> bool:
    """Whether a site could stand here: a linear module of any kind, plain, quantised or adapted already."""
    if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)):
        return True
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )
