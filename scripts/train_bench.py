"""What `weftlora train` costs a step, beside a plain loop of transformers' Trainer with peft's LoRA on the same rows.

    python scripts/train_bench.py --out bench/train.json

CPU seconds of the process from the start of training to its end, divided by the steps: with loading rows, logging and checkpoints,
without imports, reading files and loading the model. The bundled model, rank 8 on all linear modules, 16 rows a step, fp32, one
thread. Every round runs each case once in a fresh random order in one process, after a round that is not counted; ratios are paired
by round.

    plain          Trainer, peft's LoraConfig, transformers' collator, Trainer's own defaults of logging and checkpoints
    plain, equal   the same, logging and saving as often as weftlora does
    lora           weftlora.train, its LoRA
    peft:lora      weftlora.train, peft's LoRA
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import weftlora
from weftlora.data import DataConfig, load
from weftlora.data.demo import demo_model_path

ROWS = {"train": "demo", "max_length": 64, "validation_fraction": 0}


class Clock(TrainerCallback):
    """CPU seconds between the start of training and its end."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = -time.process_time()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += time.process_time()


def plain(steps: int, folder: Path, **arguments: Any) -> float:
    """As the documentation of peft has it."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = (kind.from_pretrained(demo_model_path()) for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = load(DataConfig.parse(ROWS), tokenizer).train.select_columns(["input_ids", "attention_mask", "labels"])
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    clock = Clock()
    told = TrainingArguments(
        str(folder / "plain"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    Trainer(
        model=adapted,
        args=told,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[clock],
    ).train()
    return clock.seconds / steps


def ours(recipe: str, steps: int, folder: Path) -> float:
    """As a user runs it."""
    clock = Clock()
    weftlora.train(
        {
            "model": "demo",
            "data": ROWS,
            "adapter": {"recipe": recipe, "r": 8},
            "train": {"steps": steps, "batch_size": 16, "lr": 5e-3, "num_threads": 1},
            "out": str(folder / "run"),
        },
        callbacks=[clock],
        overwrite=True,
    )
    return clock.seconds / steps


CASES: dict[str, Any] = {
    "plain": plain,
    "plain, equal": lambda steps, folder: plain(
        steps, folder, logging_steps=10, logging_first_step=True, save_steps=max(1, -(-steps // 5)), save_total_limit=2
    ),
    "lora": lambda steps, folder: ours("lora", steps, folder),
    "peft:lora": lambda steps, folder: ours("peft:lora", steps, folder),
}
AGAINST = "plain"


def measured(steps: int, rounds: int, seed: int, names: list[str]) -> dict[str, list[float]]:
    """CPU seconds a step of every case, by round."""
    order, found = random.Random(seed), {name: list[float]() for name in names}
    for number in range(rounds + 1):
        for name in order.sample(names, len(names)):
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                cost = CASES[name](steps, Path(folder))
            if number:
                found[name].append(cost)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = measured(given.steps, given.rounds, given.seed, given.cases)
    result: dict[str, Any] = {
        "command": f"scripts/train_bench.py --steps {given.steps} --rounds {given.rounds} --seed {given.seed} --cases "
        + " ".join(repr(name) for name in given.cases),
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(), "threads": 1},
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}
        | {"weftlora": weftlora.__version__, "python": platform.python_version()},
        "against": AGAINST,
        "cases": {},
    }
    for name, costs in found.items():
        ratios = [one / other for one, other in zip(costs, found[AGAINST], strict=True)]
        result["cases"][name] = {
            "cpu_per_step": statistics.median(costs),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "all": [round(cost, 6) for cost in costs],
        }
        spread = f"[{min(ratios):.3f}, {max(ratios):.3f}]"
        print(f"{name:14} {1000 * statistics.median(costs):8.2f} ms   x {statistics.median(ratios):.3f} {spread}")
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
