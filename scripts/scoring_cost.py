"""What scoring rank slots costs by default: seconds of eight rounds over seconds of the training they are part of.

    python scripts/scoring_cost.py     # writes bench/scoring-cost.json, prints the table of ALoRA's card; ten minutes on one core

Llama-type models of hidden size 128 with 2 to 24 blocks and r = 8 to 64 on all linear modules, so R slots, are trained on
rows of T tokens, 32 to a step; a run has 500 steps, eight rounds score on 32 rows. Steps and one round are timed (process CPU
time, one thread, after a step and a round that are not), and multiplied. What each way would cost by counts alone stands beside
it: that, not the clock, is what `score="auto"` decides by.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import weftlora
from weftlora.host.attach import schedules
from weftlora.schedule.reallocate import ReallocateController
from weftlora.terms.ranks.reallocate import WAYS

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "scoring-cost.json"
STEPS, ROWS, ROUNDS = 500, 32, 8
CASES = ((2, 8, 32), (2, 8, 128), (4, 8, 64), (8, 8, 64), (16, 8, 64), (24, 8, 64), (16, 32, 64), (24, 64, 64))
"""Blocks, r, tokens of a row."""


def timed(run: Callable[[], Any], times: int) -> list[float]:
    """CPU seconds of every run but the first."""
    found = []
    for _ in range(times + 1):
        began = time.process_time()
        run()
        found.append(time.process_time() - began)
    return found[1:]


def measure(blocks: int, r: int, tokens: int) -> dict[str, Any]:
    """One case."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": blocks, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, **sizes))
    model = get_peft_model(base, weftlora.AllocLoraConfig(r=r, rows=ROWS))
    ids = torch.randint(0, 512, (96, tokens), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids[32:]]
    weftlora.attach(model, validation=rows, total_steps=STEPS, tokens_per_step=ROWS * tokens)
    [schedule] = schedules(model).values()
    controller = schedule.controllers[-1]
    assert isinstance(controller, ReallocateController)
    counts = controller.counts(schedule.length)
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-3))

    def step() -> None:
        model(input_ids=ids[:32], labels=ids[:32]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = timed(step, 3)
    rounds = timed(lambda: controller.scoring.measure(1), 2)
    share = ROUNDS * statistics.median(rounds) / (STEPS * statistics.median(steps))
    return {
        "blocks": blocks,
        "r": r,
        "tokens": tokens,
        "slots": counts.slots,
        "way": controller.choice.score,
        "counted": {way: counts.share(way) for way in WAYS},
        "step_seconds": steps,
        "round_seconds": rounds,
        "share": share,
    }


def table(results: dict[str, Any]) -> list[str]:
    """Lines of the card."""
    lines = [
        "| slots R | blocks | tokens T | decided | by counts: exact | shortlist | taylor | measured, CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        counted = " | ".join(f"{case['counted'][way]:.1%}" for way in WAYS)
        spent = ROUNDS * statistics.median(case["round_seconds"])
        whole = STEPS * statistics.median(case["step_seconds"])
        lines.append(
            f"| {case['slots']:,} | {case['blocks']} | {case['tokens']} | `{case['way']}` | {counted} | "
            f"{spent:.1f} / {whole:.0f} = **{case['share']:.1%}** |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "command": "python scripts/scoring_cost.py",
        "versions": f"torch {torch.__version__}, {platform.machine()}",
        "steps": STEPS,
        "rows": ROWS,
        "rounds": ROUNDS,
        "cases": [measure(*case) for case in CASES],
    }
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
