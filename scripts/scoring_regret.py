"""What each way of scoring rank slots loses against the exact one, on a real model: the regret of which slots it takes away.

    python scripts/scoring_regret.py --out bench/regret.json            stories260k on E2E; minutes of the processor
    python scripts/scoring_regret.py --model smollm2 --r 1 --rows 4 --seeds 0 --steps 8 24 --out ...     hours

Needs WEFT_DATA. An adapter on all linear modules is trained on E2E for some steps; then all slots are scored on the same validation
rows: exactly, by the estimate, and by a shortlist, which is exact among four times as many slots as move and has the estimate choose
them. Beside them stands the exact score on other rows, none of the ones in use: what the draw of rows alone loses. No slot is moved.

regret = (sum of the exact scores of the slots that are taken − that of the truly lowest) / |that of the truly lowest|
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import weftlora
from weftlora.data import Collator, DataConfig, load
from weftlora.host.attach import schedules
from weftlora.runs.base_model import resolved
from weftlora.schedule.rank_slots import agreement, lowest, scores

FACTOR = 4
"""Candidates of a shortlist per slot that moves, as by default."""


def places(given: argparse.Namespace, seed: int) -> Any:
    """The model after each of the numbers of steps, as its scoring and the step."""
    data = Path(os.environ["WEFT_DATA"])
    path = str(data / "models" / given.model) if (data / "models" / given.model).is_dir() else given.model
    source = resolved(path, Path.cwd())
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    section = {"train": str(data / "tasks/e2e/train.txt"), "separator": "||", "max_length": given.length, "limit": 600}
    rows = load(DataConfig.parse({**section, "seed": seed, "validation_fraction": 0.2}), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(seed)
    config = weftlora.AllocLoraConfig(r=given.r, rows=given.rows, score="exact", first=10**6, every=1, max_rounds=1)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    columns, collate = ["input_ids", "attention_mask", "labels"], Collator(tokenizer.pad_token_id)
    assert rows.validation is not None
    weftlora.attach(model, validation=list(rows.validation.select_columns(columns)))
    [schedule] = schedules(model).values()
    scoring = schedule.controllers[-1].scoring  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=given.lr))
    train, order = rows.train.select_columns(columns), torch.randperm(len(rows.train)).tolist()
    for step in range(1, max(given.steps) + 1):
        picked = [train[order[(given.batch * step + n) % len(order)]] for n in range(given.batch)]
        model.train()(**collate(picked)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in given.steps:
            model.eval()
            yield step, scoring


def measured(scoring: Any, draw: str) -> dict[str, Any]:
    """How the ways agree with the exact scores of all slots."""
    slots, [(_, count)] = scoring.live(), scoring.groups()
    began = time.process_time()
    truth = scores(scoring.exact(slots, draw), "both")
    exact = time.process_time() - began
    began = time.process_time()
    guess = scores(scoring.scorer.estimate(slots, draw), "both")
    estimate = time.process_time() - began
    short = set(lowest(guess, FACTOR * count))
    worst = max(truth) + 1
    listed = [value if n in short else worst + guess[n] for n, value in enumerate(truth)]
    other = scores(scoring.exact(slots, draw, other=True), "both")
    return {
        "slots": len(slots),
        "moving": count,
        "taylor": agreement(guess, truth, count),
        "shortlist": agreement(listed, truth, count),
        "exact on other rows": agreement(other, truth, count),
        "cpu_seconds": {"exact": round(exact, 3), "taylor": round(estimate, 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="stories260k")
    parser.add_argument("--r", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measures = []
    for seed in given.seeds:
        for step, scoring in places(given, seed):
            found = {"seed": seed, "step": step, **measured(scoring, f"{seed}/{step}")}
            measures.append(found)
            ways = ("taylor", "shortlist", "exact on other rows")
            print(seed, step, {way: round(found[way]["regret"], 4) for way in ways}, found["cpu_seconds"], flush=True)
            write(given, measures)


def write(given: argparse.Namespace, measures: list[dict[str, Any]]) -> None:
    """The record, as far as it goes."""
    if given.out is None:
        return
    command = f"python scripts/scoring_regret.py --model {given.model} --r {given.r} --rows {given.rows} --seeds "
    command += (
        f"{' '.join(map(str, given.seeds))} --steps {' '.join(map(str, given.steps))} --out {given.out.as_posix()}"
    )
    summary = {}
    for way in ("taylor", "shortlist", "exact on other rows"):
        summary[way] = {
            figure: [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, max(values)]
            for figure in ("spearman", "overlap", "regret")
            if (values := [each[way][figure] for each in measures])
        }
    record = {
        "command": command,
        "versions": f"torch {torch.__version__}, {platform.machine()}",
        "model": given.model,
        "n": len(measures),
        "mean, sd, most": summary,
        "measures": measures,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
