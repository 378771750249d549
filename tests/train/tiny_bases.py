"""Bases small enough to train in a test, written to a folder as a user would have them, and the rows to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz ->"
SIZE = 4 + len(LETTERS)


def save_tokenizer(folder: Path) -> None:
    """One token a letter, ids 0-3 special."""
    vocabulary = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(LETTERS)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def llama(folder: Path, hidden: int = 32, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # at the usual 0.02 a model this small has no logits worth the name
    )
    return _save(LlamaForCausalLM(config), folder)


def mixture(folder: Path) -> Path:
    """Two blocks of four experts, whose matrices are fused parameters."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return _save(Qwen3MoeForCausalLM(config), folder)


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return _save(BertForMaskedLM(config), folder)


def t5(folder: Path) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=SIZE,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return _save(T5ForConditionalGeneration(config), folder)


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(count: int = 60) -> list[dict[str, str]]:
    """Repeat the letter: a task that a few steps of training can be seen on, in two domains."""
    return [
        {
            "prompt": f"{chr(97 + n % 26)}{chr(97 + n // 26)} ->",
            "completion": chr(97 + n % 26) * 2,
            "domain": "ab"[n % 2],
        }
        for n in range(count)
    ]


def classified(count: int = 60) -> list[dict[str, str]]:
    return [
        {"text": f"{chr(97 + n % 13)}{chr(97 + n // 13)} text", "label": "low" if n % 13 < 6 else "high"}
        for n in range(count)
    ]
