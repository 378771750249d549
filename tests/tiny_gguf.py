"""A GGUF file of a tiny Llama with a tokenizer and a chat template, written by the `gguf` package as llama.cpp's converter would."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADS, KV_HEADS, LAYERS, HIDDEN = 4, 2, 2, 64
_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def words() -> list[str]:
    """Special tokens, the 256 bytes as GPT-2 writes them, and two merged ones."""
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), "th", "the"]


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    """The model that the file is of, in float32."""
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=len(words()), hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(settings)


def _permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k in the order in which llama.cpp rotates them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    path: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    architecture: str = "llama",
    without: str = "",
    seed: int = 0,
    **keys: Any,
) -> PreTrainedModel:
    """Write the file, matrices in `kind`, and give the model that it is of back.

    Args:
        without: a tensor to leave out.
        keys: further keys of the header, a text or a whole number each, with `__` for a dot.
    """
    model, writer = tiny_llama(seed), GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(words()))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(words()) - len(SPECIAL)))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in keys.items():
        put = writer.add_uint16 if isinstance(value, int) else writer.add_string
        put(name.replace("__", "."), value)
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    tensors |= {f"blk.{n}.{own}": f"model.layers.{n}.{theirs}" for n in range(LAYERS) for own, theirs in _BLOCK.items()}
    state = model.state_dict()
    for own, theirs in tensors.items():
        w = state[f"{theirs}.weight"].numpy()
        if own.endswith(("attn_q", "attn_k")):
            w = _permuted(w, HEADS if own.endswith("q") else KV_HEADS)
        if own == without:
            continue
        if w.ndim == 1:
            writer.add_tensor(f"{own}.weight", w)
        else:
            writer.add_tensor(f"{own}.weight", quantize(np.ascontiguousarray(w), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def installed(site: Path, file: Path, name: str = "tiny-carrier", module: str = "tiny_carrier") -> Path:
    """A package in `site` that carries a copy of `file`, as pip would have installed it; importing it raises."""
    import base64

    inside, metadata = site / module, site / f"{name.replace('-', '_')}-1.0.dist-info"
    inside.mkdir(parents=True)
    metadata.mkdir()
    (inside / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    copy = inside / file.name
    copy.write_bytes(file.read_bytes())
    digest = base64.urlsafe_b64encode(hashlib.sha256(copy.read_bytes()).digest()).rstrip(b"=").decode()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    record = f"{module}/{file.name},sha256={digest},{copy.stat().st_size}\n{module}/__init__.py,,\n"
    (metadata / "RECORD").write_text(record)
    (metadata / "top_level.txt").write_text(f"{module}\n")
    return copy
