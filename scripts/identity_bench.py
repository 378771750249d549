"""How much later a run starts because its base is identified by content: with and without, in pairs.

    python scripts/identity_bench.py --out bench/identity.json [--rounds 10] [--base FOLDER]

The base is one of SmolLM2-135M's sizes, stored in bfloat16 (269 MB), with drawn weights: no value of it matters to a hash. A start is
the time from the call of `weftlora.train` to the end of the first optimiser step. Every round starts once per case, in a fresh random
order, each in a process forked from one that has imported everything.

    not verified    --no-verify-base
    new             no file of the base was ever read: its 269 MB are hashed while the first steps run
    known           the hash is in the user's cache
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback

import weftlora
import weftlora.train.loop  # imported once, before the first fork
from weftlora.data.demo import demo_model_path
from weftlora.disk.files import write_json
from weftlora.runs import identity

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
CASES = ("not verified", "new", "known")


class First(TrainerCallback):
    """Says when the first optimiser step has ended, and ends the process with it."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.began, self.cpu = pipe, time.monotonic(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        took = {"seconds": time.monotonic() - self.began, "cpu_seconds": time.process_time() - self.cpu}
        os.write(self.pipe, json.dumps(took).encode())
        os._exit(0)


def start(case: str, base: Path, top: Path) -> dict[str, float]:
    """One start, in a process of its own."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.environ["XDG_CACHE_HOME"] = str(top / case)
        if case == "new":
            os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(dir=top)
        recipe = {
            "model": {"path": str(base), "dtype": "bfloat16"},
            "data": {"train": "demo", "limit": 64, "validation_limit": 4},
            "adapter": "lora",
            "train": {"steps": 2, "batch_size": 1, "save_every": 0, "num_threads": 1},
            "out": tempfile.mkdtemp(dir=top),
        }
        try:
            weftlora.train(recipe, verify_base=case != "not verified", callbacks=[First(writes)])
        finally:
            os._exit(1)
    os.close(writes)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reads, "rb") as told:
        said = told.read()
    if status:
        sys.exit(f"a start failed: {case}")
    found: dict[str, float] = json.loads(said)
    return found


def make_base(folder: Path) -> None:
    """Drawn weights of SmolLM2-135M's sizes, with the demo's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), trust_remote_code=False).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_path(), trust_remote_code=False).save_pretrained(folder)


def summary(rounds: list[dict[str, dict[str, float]]], what: str) -> dict[str, Any]:
    """Per case the median, and how much more than without: mean and standard deviation over pairs, and every pair."""
    found: dict[str, Any] = {}
    for case in CASES:
        later = [each[case][what] - each["not verified"][what] for each in rounds]
        found[case] = {"median": statistics.median(each[case][what] for each in rounds)}
        if case != "not verified":
            spread = statistics.stdev(later)
            found[case] |= {
                "later_mean": statistics.mean(later),
                "later_median": statistics.median(later),
                "later_sd": spread,
                "later_standard_error": spread / len(later) ** 0.5,
                "pairs": later,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="a folder to start on instead")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw, rounds = random.Random(given.seed), []
    with tempfile.TemporaryDirectory(prefix="weft-identity-") as name:
        top = Path(name)
        base = given.base or top / "base"
        if given.base is None:
            make_base(base)
        weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        os.environ["XDG_CACHE_HOME"] = str(top / "known")
        began = time.process_time()
        identity.weights_of(str(base))
        hashed = time.process_time() - began
        for case in CASES:  # not counted
            start(case, base, top)
        for number in range(given.rounds):
            rounds.append({case: start(case, base, top) for case in draw.sample(CASES, len(CASES))})
            print(number, {case: round(took["seconds"], 2) for case, took in rounds[-1].items()}, flush=True)
    record = {
        "command": f"python scripts/identity_bench.py --rounds {given.rounds} --seed {given.seed} --out bench/identity.json",
        "versions": f"weftlora {weftlora.__version__}, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores",
        "base": f"{'a folder given' if given.base else 'drawn weights of the sizes of SmolLM2-135M'}, {weights:,} bytes",
        "n": given.rounds,
        "load_average": os.getloadavg(),
        "hash_cpu_seconds": hashed,
        "cpu_seconds": summary(rounds, "cpu_seconds"),
        "seconds": summary(rounds, "seconds"),
    }
    write_json(given.out, record)


if __name__ == "__main__":
    main()
