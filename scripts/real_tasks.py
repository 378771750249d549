"""Rows of four real domains in one training set, for evidence/dash-mixture.yaml and examples/mixture-hydralora.yaml.

    python scripts/real_tasks.py        writes runs/mixture/train.jsonl and test.jsonl

Needs WEFT_DATA (see README).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

MIXTURE = Path(__file__).resolve().parent.parent / "runs" / "mixture"


def mixture(folder: Path = MIXTURE) -> dict[str, str]:
    """One file per split, written next to the runs (never into the project)."""
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


if __name__ == "__main__":
    mixture()
