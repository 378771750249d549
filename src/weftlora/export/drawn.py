"""Parts of a classifier that its base's checkpoint does not have: a pooler, a head. Loading draws them from the seed of the moment.

An adapter of stock LoRA would then stand on other numbers in every process. So these parts leave in full with it, as what was
trained in full does, and an update on one of them is added to its weight.
"""

from __future__ import annotations

from pathlib import Path

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weftlora.errors import ModelError
from weftlora.export.factors import Pair
from weftlora.export.source import Source
from weftlora.glue.layer import WeftLinear
from weftlora.glue.original import Checkpoint
from weftlora.glue.updates import base_of
from weftlora.train.model import HEADS

PARTS = frozenset({*HEADS, "pooler"})


def drawn_parts(source: Source) -> dict[str, nn.Module]:
    """{name: base module} of the modules with weights that the checkpoint lacks, or is not known to have; classifiers only."""
    base = base_of(source.model)
    if not type(base).__name__.endswith("Classification"):
        return {}
    stored = _stored(source)
    found: dict[str, nn.Module] = {}
    above: list[str] = []  # what is inside of these is a part of them
    for name, module in base.named_modules():
        if PARTS.isdisjoint(name.split(".")) or any(name.startswith(f"{top}.") for top in above):
            continue
        if isinstance(module, (ModulesToSaveWrapper, WeftLinear)):
            above.append(name)
        if isinstance(module, ModulesToSaveWrapper):
            continue
        plain = module.get_base_layer() if isinstance(module, WeftLinear) else module
        if any(True for _ in plain.parameters(recurse=False)) and not _has(stored, f"{name}.weight"):
            found[name] = plain
    return found


def _stored(source: Source) -> set[str]:
    """The names in the checkpoint; none where it cannot be looked into."""
    try:
        return set() if source.base is None else set(Checkpoint(Path(source.base)).where)
    except ModelError:
        return set()


def _has(stored: set[str], wanted: str) -> bool:
    return any(key == wanted or wanted.endswith(f".{key}") or key.endswith(f".{wanted}") for key in stored)


def in_full(drawn: dict[str, nn.Module], pairs: dict[str, Pair]) -> dict[str, Tensor]:
    """{name in the base model: value} of the drawn parts, with the update of those that carry one; they leave `pairs`."""
    values: dict[str, Tensor] = {}
    for name, module in drawn.items():
        values |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        if (pair := pairs.pop(name, None)) is not None:
            w = values[f"{name}.weight"]
            delta = pair.delta().T if isinstance(module, Conv1D) else pair.delta()
            values[f"{name}.weight"] = (w.detach().cpu().double() + delta).float()
    return values
