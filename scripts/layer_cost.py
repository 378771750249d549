"""What a second stage on some of the blocks costs, against one on all of them: step time, saved activations, trained numbers.

    python scripts/layer_cost.py [--layers 8] [--hidden 256] [--rounds 9]

A Llama-type model with random weights; tokens go in, so that nothing below the lowest adapted block needs a backward.
Time is CPU time of one thread, medians over rounds in which all cases take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft


def model_with(layers: Sequence[int], count: int, hidden: int) -> nn.Module:
    """An adapted model in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=count, num_attention_heads=4
    )
    chosen = weft.PlainLoraConfig(r=8, layers=weft.Only(tuple(layers)))
    return get_peft_model(LlamaForCausalLM(config), chosen).train()


def step(model: nn.Module, tokens: Tensor) -> tuple[float, int]:
    """CPU seconds of a forward and backward, and bytes of activations saved for the backward (weights left out)."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    began = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    took = time.process_time() - began
    model.zero_grad()
    return took, sum(saved.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 8), ("hidden", 256), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.set_num_threads(1)
    n = given.layers
    cases = {
        "all": range(n),
        "every second": range(0, n, 2),
        "first half": range(n // 2),
        "last half": range(n // 2, n),
    }
    models = {name: model_with(list(at), n, given.hidden) for name, at in cases.items()}
    tokens = torch.randint(512, (4, 128))
    times: dict[str, list[float]] = {name: [] for name in cases}
    held: dict[str, int] = {}
    for turn in range(given.rounds + 1):
        for name, model in models.items():
            took, held[name] = step(model, tokens)
            times[name] += [took] if turn else []  # the first round warms up
    sys.stdout.write(
        "| blocks | step time / all | saved activations / all | trained numbers / all |\n|---|---|---|---|\n"
    )
    trained = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    for name in cases:
        ratios = [a / b for a, b in zip(times[name], times["all"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        memory, numbers = held[name] / held["all"], trained[name] / trained["all"]
        sys.stdout.write(f"| {name} | {middle:.2f} [{low:.2f}, {high:.2f}] | {memory:.2f} | {numbers:.2f} |\n")


if __name__ == "__main__":
    main()
