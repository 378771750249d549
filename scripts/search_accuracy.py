"""What a search finds where the answer is known, and how far each hypergradient is from the truth.

    python scripts/search_accuracy.py     # some minutes; writes evidence/search-accuracy.json, prints the tables of the card

A teacher is the base with an update in some of six blocks. An adapter on all six is searched for 25 steps of 16 rows with two
validation micro-batches each; the selected set is compared with the planted one by the Jaccard index. The truth about a hypergradient
is the loss of the same program, all its K optimiser steps included, at α ± h: central differences in fp64 for each α. The blocks,
the teacher and the rows are those of the tests (tests/search/searching.py).
"""

from __future__ import annotations

import copy
import json
import logging
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "search"), str(ROOT / "tests")]

from searching import adapted, distinct, make, planted, stack, taught  # noqa: E402

import weftlora  # noqa: E402
from weftlora.search.agreement import chance, jaccard  # noqa: E402

RESULTS = ROOT / "evidence" / "search-accuracy.json"
BLOCKS = 6
SEEDS = 5
CASES: dict[str, dict[str, Any]] = {
    "1 block": {"k": 1},
    "2 blocks": {"k": 2},
    "3 blocks": {},
    "4 blocks": {"k": 4},
    "3 blocks, 60 steps": {"steps": 60},
    "3 blocks, SGD on α": {"alpha_optimizer": "sgd", "alpha_lr": 5.0},
    "3 blocks, noise in the targets": {"noise": 0.3},
    "3 blocks, lr 1e-2: θ fits in a few steps, then Adam on α follows what is left": {"lr": 1e-2},
    "the same with `inner_lr` 1e-3": {"lr": 1e-2, "inner_lr": 1e-3},
    "3 blocks of a residual stack in which blocks can replace each other": {"replaceable": True, "steps": 60},
}
INNER: dict[str, dict[str, Any]] = {
    "SGD, 0.1": {"optimizer": "sgd", "lr": 0.1},
    "SGD, 1.0": {"optimizer": "sgd", "lr": 1.0},
    "AdamW, 1e-3": {"optimizer": "adamw", "lr": 1e-3},
    "AdamW, 1e-2": {"optimizer": "adamw", "lr": 1e-2},
}
LENGTHS = (1, 2, 4, 8)
STATES = {"fresh": 0, "after 5 steps": 5}
KINDS = ("direct", "unrolled_exact", "unrolled_fd")
H = 1e-6


def recovered(
    seed: int,
    k: int = 3,
    *,
    lr: float = 3e-3,
    steps: int = 25,
    noise: float = 0.0,
    replaceable: bool = False,
    alpha_lr: float = 0.02,
    **search: Any,
) -> dict[str, float]:
    """Jaccard index with the planted blocks of the selection and of as many blocks of largest gradient norm as were planted."""
    chosen = set(random.Random(100 + seed).sample(range(BLOCKS), k))
    base: nn.Module = stack(BLOCKS, seed) if replaceable else distinct(BLOCKS, seed)
    teach: Callable[..., Any] = planted if replaceable else taught
    rows = teach(base, chosen, noise=noise, seed=seed)
    settings = weftlora.Search(outer_batches=2, val_size=32, steps=steps, alpha_lr=alpha_lr, **search)
    targets = ["up", "down"] if replaceable else ["up"]
    model = adapted(base, settings, seed, target_modules=targets, r=2 if replaceable else 8)
    selection = make(model, rows, seed=seed, lr=lr, batch_size=16).run()
    norms = [c.gradient_norm for c in selection.candidates]
    largest = sorted(range(BLOCKS), key=lambda i: -norms[i])[:k]
    size = len(selection.blocks)
    return {
        "search": jaccard([c.block or 0 for c in selection.chosen], chosen),
        "chance": chance(size, k, BLOCKS),
        "gradient_norm": jaccard(largest, chosen),
        "selected": size,
    }


def standing(seed: int, length: int, inner: dict[str, Any], warm: int, kind: str) -> Any:
    """A search with `length` inner steps before it, after `warm` others."""
    base = distinct(BLOCKS, seed)
    settings = weftlora.Search(outer_batches=2, val_size=32, steps=2, inner_steps=length, hypergrad=kind)
    model = adapted(base, settings, seed, moved=0.1, target_modules=["up"])
    search = make(model, taught(base, {1, 3, 4}, seed=seed, size=1.0), seed=seed, batch_size=16, **inner)
    for site in search.gates.sites:
        site.awaits_search = False
    for _ in range(warm):
        search.loop.step(search._batches("train", search.inner.accumulation), keep=False)
    return search


def loss_at(search: Any, alpha: torch.Tensor) -> float:
    """After the inner steps from where `search` stands."""
    search = copy.deepcopy(search)
    search.gates.write(search.search.gates(alpha))
    search._inner_steps()
    return search.hypergradient()[0]


def hypergradients(seed: int, length: int, inner: dict[str, Any], warm: int) -> dict[str, float]:
    """Cosine of each kind to central differences from one and the same state, and how rough the exact one says it is."""
    found: dict[str, float] = {}
    for kind in KINDS:
        search = standing(seed, length, inner, warm, kind)
        if kind == "direct":
            units = torch.eye(BLOCKS, dtype=torch.float64) * H
            truth = torch.tensor([(loss_at(search, e) - loss_at(search, -e)) / (2 * H) for e in units])
            units *= search.search.alpha_lr / H  # what a whole step on α does
            step = torch.tensor([loss_at(search, e) - loss_at(search, -e) for e in units])
        _, gradient = search.hypergradient(search._inner_steps()[1])
        found[kind] = float(torch.nn.functional.cosine_similarity(gradient, truth.double(), dim=0))
        found[f"{kind} of a step"] = float(torch.nn.functional.cosine_similarity(gradient, step.double(), dim=0))
    return found | {"rough": search.rough}


def tables(results: dict[str, Any]) -> list[str]:
    """The two tables of the card: what was found, and the cosines."""
    lines = ["| planted | search | chance | largest ‖∇θ‖ |", "|---|---|---|---|"]
    for name, each in results["planted"].items():
        lines.append(
            f"| {name} | " + " | ".join(f"{_mean(each, c):.2f}" for c in ("search", "chance", "gradient_norm")) + " |"
        )
    lines += [
        "",
        "| inner optimiser | state | "
        + " | ".join(f"K = {n}" for n in LENGTHS)
        + " | exact, least | fd, least | rough |",
        "|---|---|" + "---|" * (len(LENGTHS) + 3),
    ]
    for name, states in results["cosine"].items():
        for state, by_length in states.items():
            each = [one for n in LENGTHS for one in by_length[str(n)]]
            cells = [f"{_mean(by_length[str(n)], 'direct'):.3f}" for n in LENGTHS]
            cells += [f"{min(one[kind] for one in each):.4f}" for kind in KINDS[1:]] + [f"{_mean(each, 'rough'):.2f}"]
            lines.append(f"| {name} | {state} | " + " | ".join(cells) + " |")
    return lines


def _mean(each: Sequence[dict[str, float]], column: str) -> float:
    return fmean(one[column] for one in each)


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("weftlora").setLevel(logging.ERROR)  # that direct is biased is what is measured
    results = {
        "command": "python scripts/search_accuracy.py",
        "versions": f"weftlora {weftlora.__version__}, torch {torch.__version__}",
        "planted": {name: [recovered(seed, **case) for seed in range(SEEDS)] for name, case in CASES.items()},
        "cosine": {
            name: {
                state: {str(n): [hypergradients(seed, n, inner, warm) for seed in range(3)] for n in LENGTHS}
                for state, warm in STATES.items()
            }
            for name, inner in INNER.items()
        },
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(tables(results)))


if __name__ == "__main__":
    main()
