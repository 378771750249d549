"""Text from a trained run: greedy or sampled, in batches, with the KV cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from weftlora.data import encode_prompt
from weftlora.errors import ConfigError, ModelError
from weftlora.train.load import Trained, load_adapter, load_run
from weftlora.train.measure import evaluating
from weftlora.train.run import Run

Message = dict[str, str]


@dataclass(frozen=True)
class Generation:
    """One answer. `finished` is False where `max_new_tokens` cut it off."""

    prompt: str | list[Message]
    text: str
    tokens: int
    finished: bool
    seconds: float
    tokens_per_s: float


def generate(
    source: Run | str | Path,
    prompt: str | Sequence[Message],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    base: str | None,
) -> Generation:
    """See `weftlora.train.generate`."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} leaves nothing to generate: give at least 1.")
    if temperature < 0:
        raise ConfigError(f"temperature={temperature} has no meaning: use 0 for greedy, or a positive number.")
    trained = open_source(source, base)
    if trained.task == "classification":
        raise ModelError(f"{source} is a classifier and generates no text: use `weftlora eval` on it.")
    tokenizer = trained.base.tokenizer
    ids = _prompt_ids(trained, prompt)
    started = time.monotonic()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        [answer] = complete(trained.model, tokenizer, [ids], max_new_tokens, temperature)
    seconds = time.monotonic() - started
    stop = stop_tokens(trained.model, tokenizer)
    finished = bool(answer) and answer[-1] in stop
    shown = prompt if isinstance(prompt, str) else list(prompt)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return Generation(shown, text, len(answer), finished, round(seconds, 4), round(len(answer) / max(seconds, 1e-9), 1))


def open_source(source: Run | str | Path, base: str | None) -> Trained:
    """A run, a run folder or a bare adapter folder, loaded."""
    if isinstance(source, Run):
        return load_run(source, base)
    folder = Path(source)
    if (folder / "adapter_config.json").is_file():
        return load_adapter(folder, base)
    return load_run(Run.load(folder), base)


def _prompt_ids(trained: Trained, prompt: str | Sequence[Message]) -> list[int]:
    if trained.task == "seq2seq" and isinstance(prompt, str):
        return list(trained.base.tokenizer(prompt)["input_ids"])
    return encode_prompt(trained.base.tokenizer, prompt)


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's end-of-text token and what the model itself names."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return sorted({token for token in (*named, tokenizer.eos_token_id) if token is not None})


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[list[int]]:
    """Answers to tokenised prompts, each up to and including its stop token; `temperature` 0 is greedy.

    The base's own sampling settings are set aside, so that greedy is greedy whatever its generation_config says.
    """
    pad = tokenizer.pad_token_id
    inputs = {key: value.to(model.device) for key, value in _left_padded(prompts, pad).items()}
    stop = stop_tokens(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        use_cache=True,
        **sampling,
    )
    with evaluating(model):
        output = model.generate(**inputs, generation_config=settings)
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return [_until_stop(row, stop) for row in output[:, start:].tolist()]


def _left_padded(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, length - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _until_stop(tokens: list[int], stop: list[int]) -> list[int]:
    end = next((at + 1 for at, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
