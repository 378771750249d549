"""Tiny bases of every family and the structures of the grid, built from configs: no downloads, a few ms each.

model = FAMILIES["llama"].build()         # seeded, eval mode, dropout 0
batch = FAMILIES["llama"].batch()         # keyword arguments of a forward that returns .loss and .logits
config = STRUCTURES["hydra"](r=4)         # a fresh WeftConfig
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import weftlora

SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**overrides: Any) -> LlamaForCausalLM:
    """A decoder with grouped-query attention: 4 heads, 2 key-value heads."""
    return LlamaForCausalLM(LlamaConfig(**{**SIZE, **SPECIAL, "num_key_value_heads": 2, **overrides}))


def gpt2(**overrides: Any) -> GPT2LMHeadModel:
    """A decoder whose linear modules are transformers' Conv1D (weight [in, out]) and whose q, k, v are one module."""
    size = {"vocab_size": 64, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**size, **SPECIAL, **dropout, **overrides}))


def gpt_neox(**overrides: Any) -> GPTNeoXForCausalLM:
    """A decoder with one fused query_key_value module, biases everywhere."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZE, **SPECIAL, **overrides}))


def phi3(**overrides: Any) -> Phi3ForCausalLM:
    """A decoder with fused qkv_proj (grouped-query) and gate_up_proj."""
    return Phi3ForCausalLM(Phi3Config(**{**SIZE, **SPECIAL, "num_key_value_heads": 2, **overrides}))


def bert(**overrides: Any) -> BertForSequenceClassification:
    """An encoder with a classification head, which is trained in full beside the adapter."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**{**SIZE, "num_labels": 3, **dropout, **overrides}))


def t5(**overrides: Any) -> T5ForConditionalGeneration:
    """An encoder-decoder; q, k, v also in cross-attention."""
    size = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**{**size, **special, **overrides}))


class Output(NamedTuple):
    """What the plain model returns, named as transformers' models name it."""

    loss: Tensor | None
    logits: Tensor


class Mixer(nn.Module):
    """One attention-like block with separate q, k, v projections."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, 16), nn.Linear(width, 16)
        self.mlp = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(self.q_proj(x))[..., :16] * self.k_proj(x) + self.v_proj(x)
        return x + self.mlp(torch.tanh(mixed))


class PlainNet(nn.Module):
    """An nn.Module that no library knows: no config, positional input, its own loss."""

    def __init__(self, width: int = 32, classes: int = 5):
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.layers = nn.ModuleList([Mixer(width), Mixer(width)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Output:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        logits = self.head(h.mean(1))
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


def _tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def _classes() -> dict[str, Tensor]:
    return {**_tokens(), "labels": torch.tensor([0, 2])}


def _vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1)), "labels": torch.tensor([0, 4])}


@dataclass(frozen=True)
class Family:
    """One row of the grid: how to build the base, what to feed it, what is trained beside the adapter."""

    make: Callable[..., nn.Module]
    batch: Callable[[], dict[str, Tensor]] = _tokens
    task_type: TaskType | None = None
    modules_to_save: tuple[str, ...] = ()
    from_transformers: bool = True

    def build(self, seed: int = 0, **overrides: Any) -> nn.Module:
        """A fresh base in eval mode; the same seed gives the same weights."""
        torch.manual_seed(seed)
        model = self.make(**overrides).eval()
        for p in model.parameters():  # biases and norms away from 0 and 1, so that mistakes about them show
            p.data.add_(torch.randn_like(p), alpha=0.02)
        return model


FAMILIES: dict[str, Family] = {
    "llama": Family(llama, task_type=TaskType.CAUSAL_LM),
    "gpt2": Family(gpt2, task_type=TaskType.CAUSAL_LM),
    "gpt_neox": Family(gpt_neox, task_type=TaskType.CAUSAL_LM),
    "phi3": Family(phi3, task_type=TaskType.CAUSAL_LM),
    "bert": Family(bert, _classes, task_type=TaskType.SEQ_CLS, modules_to_save=("classifier",)),
    "t5": Family(t5, task_type=TaskType.SEQ_2_SEQ_LM),
    "plain": Family(PlainNet, _vectors, modules_to_save=("head",), from_transformers=False),
}

STRUCTURES: dict[str, Callable[..., weftlora.WeftConfig]] = {
    "plain": lambda **kw: weftlora.WeftConfig(structure=weftlora.Plain(), **kw),
    "hydra": lambda **kw: weftlora.WeftConfig(structure=weftlora.Hydra(heads=3), **kw),
    "hydra_Ax": lambda **kw: weftlora.WeftConfig(structure=weftlora.Hydra(heads=3, router_input="Ax"), **kw),
    "tied_tl6": lambda **kw: weftlora.WeftConfig(structure=weftlora.Tied(train="tl6"), **kw),
    "tied_tl5_shape": lambda **kw: weftlora.WeftConfig(structure=weftlora.Tied(train="tl5", group="shape"), **kw),
    "tied_tl6_fused": lambda **kw: weftlora.WeftConfig(structure=weftlora.Tied(train="tl6", group="fused_qkv"), **kw),
    "tied_vera": lambda **kw: weftlora.WeftConfig(structure=weftlora.Tied(train="vera"), **kw),
    "tied_Bu": lambda **kw: weftlora.WeftConfig(structure=weftlora.Tied(train="Bu"), **kw),
}


def adapter_config(structure: str, family: str, *, heads_too: bool = True, **fields: Any) -> weftlora.WeftConfig:
    """The config of one cell: rank 4 on all linear modules, for Tied also.

    Args:
        heads_too: train the family's classification head in full beside the adapter; without, it is left alone.
    """
    row = FAMILIES[family]
    fields = {"r": 4, "target_modules": "all-linear", **fields}
    if not row.modules_to_save:
        return STRUCTURES[structure](task_type=row.task_type, **fields)
    if heads_too:
        return STRUCTURES[structure](task_type=row.task_type, modules_to_save=list(row.modules_to_save), **fields)
    # no task type: for SEQ_CLS peft would train the head anyway
    return STRUCTURES[structure](exclude_modules=list(row.modules_to_save), **fields)


def randomise(model: nn.Module, seed: int = 7, size: float = 0.1) -> None:
    """Move every trainable parameter away from its start, as training would: no factor stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=size)


def logits(model: nn.Module | PeftModel, batch: dict[str, Tensor]) -> Tensor:
    """The logits of one forward in evaluation mode, without a graph."""
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**batch).logits
    model.train(training)
    return out


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter that requires a gradient."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
