"""Time ALoRA's scores: the exact ones and a shortlist against the plain double loop, on the same rows and slots.

    python scripts/score_bench.py --out bench/scores.json

A 12-layer Llama-type model of hidden size 256, r = 2 on all linear modules, trained a few steps so that slots differ. Rounds are
interleaved; a ratio is the loop's process CPU time over the other's in the same round, one thread.
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
from weftlora.schedule.rank_slots import scores
from weftlora.schedule.reallocate import ReallocateController
from weftlora.scoring import brackets
from weftlora.scoring.scorer import Ablation

FACTOR = 4  # candidates of a shortlist per slot that moves


def adapted(dtype: torch.dtype, layers: int, rows: int, tokens: int) -> tuple[Ablation, ReallocateController]:
    """The trained model's scorer and controller."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=128, **sizes)).to(dtype)
    model = get_peft_model(
        base, weftlora.AllocLoraConfig(r=2, rows=rows, first=1000, every=1), autocast_adapter_dtype=False
    )
    ids = torch.randint(0, 512, (96, tokens), generator=torch.Generator().manual_seed(1))
    weftlora.attach(model, validation=[{"input_ids": row, "labels": row} for row in ids[64:]])
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2))
    for step in range(8):
        batch = ids[8 * step : 8 * step + 8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    [schedule] = schedules(model).values()
    controller = schedule.controllers[-1]
    assert isinstance(controller, ReallocateController)
    assert isinstance(controller.scorer, Ablation)
    return controller.scorer, controller


def loop(scorer: Ablation, slots: list[tuple[int, int]], draw: str, own: bool = True) -> torch.Tensor:
    """The plain double loop: two whole forward passes per slot; with the model's own loss, which is fp32 at best, or in fp64."""
    batch = scorer.drawn(draw)

    def loss() -> torch.Tensor:
        if own:
            return scorer._whole_loss(batch)
        assert scorer.way is not None
        return scorer.way.loss(scorer.model(**batch).logits, batch["labels"])

    with torch.no_grad():
        return brackets.brackets_by_definition(scorer.sites, slots, loss)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = run()
    return time.process_time() - began, found


def measure(rounds: int, layers: int, rows: int, tokens: int) -> dict[str, Any]:
    """Every round's seconds and ratios, and how far the scores are apart."""
    scorer, controller = adapted(torch.float32, layers, rows, tokens)
    scorer.model.eval()
    slots, [(_, moving)] = controller.scoring.live(), controller.scoring.groups()
    scorer.exact(slots[:2], "warm")  # finds the way and checks it, once per run
    found: dict[str, list[float]] = {"loop": [], "exact": [], "shortlist": []}
    for number in range(rounds):
        draw = f"0/{number}"
        took, plain = timed(lambda draw=draw: loop(scorer, slots, draw))
        found["loop"].append(took)
        took, fast = timed(lambda draw=draw: scorer.exact(slots, draw))
        found["exact"].append(took)

        def shortlist(draw: str = draw) -> Any:
            worth = scores(scorer.estimate(slots, draw), "both")
            short = sorted(range(len(slots)), key=lambda n: (worth[n], n))[: FACTOR * moving]
            return scorer.exact([slots[n] for n in sorted(short)], draw)

        found["shortlist"].append(timed(shortlist)[0])
        sums = [t.sum(-1).sum(-1) for t in (plain, fast)]
        error = float((sums[0] - sums[1]).abs().max())
        cut = [sorted(range(len(slots)), key=lambda n, s=s: (float(s[n]), n))[:moving] for s in sums]
        print(
            f"round {number}: {[round(v[-1], 2) for v in found.values()]} s, error {error:.1e}, {cut[0] == cut[1]}",
            flush=True,
        )
    doubled, _ = adapted(torch.float64, 4, 4, tokens)
    doubled.model.eval()
    some = [(m, 0) for m in range(0, 28, 3)]
    fast64 = doubled.exact(some, "0/0")
    error64 = (loop(doubled, some, "0/0", own=False).sum(-1) - fast64.sum(-1)).abs().max()
    ratio = {name: [a / b for a, b in zip(found["loop"], found[name], strict=True)] for name in ("exact", "shortlist")}
    return {
        "model": {"layers": layers, "hidden": 256, "rows": rows, "tokens": tokens},
        "slots": len(slots),
        "candidates": FACTOR * moving,
        "rounds": rounds,
        "seconds": found,
        "ratio": ratio,
        "median": {name: statistics.median(values) for name, values in ratio.items()},
        "targets": {"exact": 1.7, "shortlist": 0.5 * len(slots) / (FACTOR * moving)},
        "error_fp32": error,
        "error_fp64": float(error64),
        "same_cut": cut[0] == cut[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.rounds, args.layers, args.rows, args.tokens)
    versions = f"torch {torch.__version__}, {platform.machine()}"
    command = "python scripts/score_bench.py --out bench/scores.json" + (
        f" --rounds {args.rounds}" if args.rounds != 5 else ""
    )
    record = {"command": command, "versions": versions, "clock": "process CPU time, 1 thread", **found}
    print(
        json.dumps(
            {k: record[k] for k in ("slots", "candidates", "median", "targets", "error_fp32", "error_fp64")}, indent=1
        )
    )
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
