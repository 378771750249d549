"""Which sites share which tensors (Tied): a key per part, equal keys share.

    module_type   A, B: (last name, in, out, r)
    shape         A, B: (in, out, r)
    fused_qkv     q, k, v of one attention count as one module: A: (which of q, k, v read one input, in, r) over all layers;
                  B: (last name, in, out, r) over all layers; u: the attention it stands in, shared by its q, k, v.
                  Modules outside attention inputs fall back to module_type.

Source: Tied-LoRA, arXiv 2311.09578 (one fused QKV projection per layer) and, for "shape", the baseline of VB-LoRA.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn

from weftlora.errors import ConfigError
from weftlora.terms.structure.tied import Part, Tied, TiedTerm

QKV_FAMILIES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)
FUSED_QKV: frozenset[str] = frozenset({"c_attn", "q_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv", "in_proj_qkv"})
CROSS_ATTENTION: tuple[str, ...] = ("cross", "encdec", "encoder_attn", "inter_attention")


def shared_keys(choice: Tied, name: str, size: tuple[int, int, int]) -> dict[Part, Hashable]:
    """The key of every shared part of the module called `name`; `size` is (r, in, out)."""
    r, fan_in, out = size
    parent, _, last = name.rpartition(".")
    if choice.group == "shape":
        pair: Hashable = ("shape", fan_in, out, r)
        return {"A": pair, "B": pair}
    kind: Hashable = ("type", last, fan_in, out, r)
    roles = same_input(parent, last) if choice.group == "fused_qkv" else None
    if roles is None:
        return {"A": kind, "B": kind}
    return {"A": ("fused", roles, fan_in, r), "B": kind, "u": ("instance", parent, roles, fan_in, r)}


def same_input(parent: str, last: str) -> tuple[str, ...] | None:
    """Which projections beside `last` read the same tensor as it does; None if it is no separate q, k or v."""
    family = next((names for names in QKV_FAMILIES if last in names), None)
    if family is None:
        return None
    if any(mark in parent.lower() for mark in CROSS_ATTENTION):  # q reads the decoder, k and v the encoder
        return family[:1] if last == family[0] else family[1:]
    return family


def attention_inputs(model: nn.Module) -> set[str]:
    """The last names of the model's attention input projections: Tied-LoRA's default targets."""
    lasts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = lasts & FUSED_QKV
    for family in QKV_FAMILIES:
        if lasts.issuperset(family):
            found |= set(family)
    return found


def shared_tensors(model: nn.Module) -> list[torch.Tensor]:
    """The A and B of all tied groups in `model`, each where it is owned."""
    terms = [module for module in model.modules() if isinstance(module, TiedTerm)]
    return [value for term in terms for part in ("A", "B") if (value := getattr(term, part, None)) is not None]


def refuse_reentrant_checkpointing(term: TiedTerm) -> None:
    """Raise where gradients of a shared A or B would come out wrong; to be called in a training forward of several processes.

    Reentrant checkpointing runs one backward per block inside the outer one. DDP counts a parameter as ready after the
    first of them: it raises an obscure error, or (seen with A and B alone) silently averages incomplete gradients.

    Raises:
        ConfigError: this forward is a reentrant recomputation and the term trains a shared factor.
    """
    in_backward = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
    # the other kind recomputes in a backward too, but with hooks for saved tensors in place
    if in_backward and not term.choice.trained.isdisjoint("AB") and _top_hooks(False) is None:
        raise ConfigError(
            "Tied-LoRA with reentrant gradient checkpointing gives wrong gradients in distributed training, because one "
            "shared tensor would get a gradient from many nested backwards: set gradient_checkpointing_kwargs="
            "{'use_reentrant': False}."
        )


_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
