"""What a second stage on some of the blocks costs, against one on all of them: step time, saved activations, trainable parameters.

    python scripts/layer_cost.py [--layers 8] [--hidden 256] [--rounds 9]

A Llama-type model with random weights; tokens go in, so that nothing below the lowest adapted block needs a backward.
Time is CPU time of one thread, medians over rounds in which all cases take turns. With the sizes as they are, the figures are
written to evidence/layer-cost.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weftlora

RESULTS = Path(__file__).resolve().parent.parent / "evidence" / "layer-cost.json"


def model_with(layers: Sequence[int], count: int, hidden: int) -> nn.Module:
    """An adapted model in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=count, num_attention_heads=4
    )
    chosen = weftlora.PlainLoraConfig(r=8, layers=weftlora.Only(tuple(layers)))
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


def measure(layers: int, hidden: int, rounds: int) -> dict[str, Any]:
    """Seconds per round, bytes and trainable parameters of every case."""
    cases = {
        "all": range(layers),
        "every second": range(0, layers, 2),
        "first half": range(layers // 2),
        "last half": range(layers // 2, layers),
    }
    models = {name: model_with(list(at), layers, hidden) for name, at in cases.items()}
    tokens = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(0))
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in cases}
    for turn in range(rounds + 1):
        for name, model in models.items():
            took, found[name]["bytes"] = step(model, tokens)
            found[name]["seconds"] += [took] if turn else []  # the first round warms up
    for name, model in models.items():
        found[name]["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found


def table(cases: dict[str, Any]) -> list[str]:
    """The table of the card: medians and quartiles of ratios within a round."""
    lines = ["| blocks | step time / all | saved activations / all | trainable parameters / all |", "|---|---|---|---|"]
    whole = cases["all"]
    for name, case in cases.items():
        if name == "all":
            continue
        ratios = [a / b for a, b in zip(case["seconds"], whole["seconds"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        memory, numbers = case["bytes"] / whole["bytes"], case["trained"] / whole["trained"]
        lines.append(f"| {name} | {middle:.2f} [{low:.2f}, {high:.2f}] | {memory:.2f} | {numbers:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 8, "hidden": 256, "rounds": 9}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = {name: getattr(parser.parse_args(), name) for name in sizes}
    torch.set_num_threads(1)
    cases = measure(**given)
    if given == sizes:
        versions = f"weftlora {weftlora.__version__}, torch {torch.__version__}"
        content = {"command": "python scripts/layer_cost.py", "versions": versions, **given, "cases": cases}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(table(cases)) + "\n")


if __name__ == "__main__":
    main()
