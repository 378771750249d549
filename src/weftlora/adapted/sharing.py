"""Which projections of an attention read one input, which of them a model has, and what that means for sites that share tensors."""

from __future__ import annotations

from collections.abc import Collection, Hashable

import torch
from torch import nn

from weftlora.errors import ConfigError
from weftlora.terms.structure import Place, Size, Structure, StructureTerm

QKV_FAMILIES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)
FUSED_QKV: frozenset[str] = frozenset({"c_attn", "q_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv", "in_proj_qkv"})
CROSS_ATTENTION: tuple[str, ...] = ("cross", "encdec", "encoder_attn", "inter_attention")


def shared_keys(
    choice: Structure, name: str, size: tuple[int, int, int], *, expert: bool = False
) -> dict[str, Hashable]:
    """The key of every part that the module called `name` shares; `size` is (r, in, out). With `expert`, of an expert of the fused
    parameter of that name."""
    parent, _, last = name.rpartition(".")
    return choice.shared_keys(Place(name, Size(*size), None if expert else same_input(parent, last), expert))


def same_input(parent: str, last: str) -> tuple[str, ...] | None:
    """Which projections beside `last` read the same tensor as it does; None if it is no separate q, k or v."""
    family = next((names for names in QKV_FAMILIES if last in names), None)
    if family is None:
        return None
    if any(mark in parent.lower() for mark in CROSS_ATTENTION):  # q reads the decoder, k and v the encoder
        return family[:1] if last == family[0] else family[1:]
    return family


def attention_inputs(names: Collection[str]) -> set[str]:
    """Of the modules of these full names, the attention input projections: a fused one, or q, k and v beside each other."""
    by_parent: dict[str, set[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        by_parent.setdefault(parent, set()).add(last)
    found = set()
    for parent, lasts in by_parent.items():
        taken = lasts & FUSED_QKV
        for family in QKV_FAMILIES:
            taken |= set(family) if lasts.issuperset(family) else set()
        found |= {f"{parent}.{last}" if parent else last for last in taken}
    return found


def shared_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The A and B of all structures in `model` that sites share."""
    terms = [module for module in model.modules() if isinstance(module, StructureTerm)]
    return [value for term in terms for part, value in term.shared().items() if part in ("A", "B")]


def refuse_reentrant_checkpointing(method: str) -> None:
    """Raise where gradients of a tensor that sites share and train would come out wrong; to be called in a training forward of
    several processes.

    Reentrant checkpointing runs one backward per block inside the outer one. DDP counts a parameter as ready after the
    first of them: it raises an obscure error, or (seen with A and B alone) silently averages incomplete gradients.

    Raises:
        ConfigError: this forward is a reentrant recomputation.
    """
    in_backward = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
    # the other kind recomputes in a backward too, but with hooks for saved tensors in place
    if in_backward and _top_hooks(False) is None:
        raise ConfigError(
            f"{method} with reentrant gradient checkpointing gives wrong gradients in distributed training, because one "
            "shared tensor would get a gradient from many nested backwards: set gradient_checkpointing_kwargs="
            "{'use_reentrant': False}."
        )


_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
