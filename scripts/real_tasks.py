"""Rows of several real domains in one training set: four for stories260k, six for SmolLM2.

    python scripts/real_tasks.py        writes runs/mixture/{train,test}.jsonl, and runs/llm-rows with a file per domain beside them

The first is for evidence/dash-mixture.yaml and examples/mixture-hydralora.yaml, the second for evidence/llm/. Every row says its
domain, by which scores are told apart; no model is shown it. Needs WEFT_DATA (see README).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

RUNS = Path(__file__).resolve().parent.parent / "runs"
MIXTURE = RUNS / "mixture"
SIX = RUNS / "llm-rows"
Rows = list[dict[str, str]]


def mixture(folder: Path = MIXTURE) -> dict[str, str]:
    """Four domains in a file per split, written next to the runs (never into the project)."""
    names = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    if not all(path.exists() for path in names.values()):
        for split, path in names.items():
            _write(path, [row for rows in _rows(split, COUNT[split], FOUR).values() for row in rows])
    return {split: str(path) for split, path in names.items()}


def six_domains(folder: Path = SIX) -> dict[str, str]:
    """Six domains in a file per split, and the rows of each by itself in DOMAIN-train.jsonl and DOMAIN-test.jsonl."""
    names = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    if not all(path.exists() for path in names.values()):
        for split, path in names.items():
            found = _rows(split, SIX_COUNT[split], DOMAINS)
            for domain, rows in found.items():
                _write(folder / f"{domain}-{split}.jsonl", rows)
            _write(path, [row for rows in found.values() for row in rows])
    return {split: str(path) for split, path in names.items()}


COUNT = {"train": 1200, "test": 250}
SIX_COUNT = {"train": 400, "test": 34}
"""Rows of a domain; evidence/plan.md has 400, and 200 test rows in all."""


def _write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scratch.replace(path)


def _rows(split: str, count: int, domains: Mapping[str, Callable[[Path, str, int], Rows]]) -> dict[str, Rows]:
    root = Path(os.environ["WEFT_DATA"]) / "tasks"
    return {name: [row | {"domain": name} for row in read(root, split, count)] for name, read in domains.items()}


def _e2e(root: Path, split: str, count: int) -> Rows:
    lines = (root / "e2e" / f"{split}.txt").read_text(encoding="utf-8").splitlines()[::3][:count]
    pairs = [line.split("||", 1) for line in lines]
    return [{"prompt": a.strip() + " ", "completion": b.strip()} for a, b in pairs]


def _fairytales(root: Path, split: str, count: int) -> Rows:
    text = (root / "fairytaleqa" / f"questions.{split}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()][:count]
    return [{"prompt": f"Question: {r['question']} Answer: ", "completion": r["answer"]} for r in rows]


def _gsm8k(root: Path, split: str, count: int) -> Rows:
    text = (root / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    rows = [r for r in rows if len(r["question"]) < 160 and len(r["answer"]) < 160][:count]
    return [{"prompt": r["question"] + " ", "completion": r["answer"]} for r in rows]


def _shakespeare(root: Path, split: str, count: int) -> Rows:
    speeches = (root / "shakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")
    pairs = [s.split(":\n", 1) for s in speeches if ":\n" in s and 40 < len(s) < 200]
    part = pairs[:count] if split == "train" else pairs[-count:]
    return [{"prompt": a + ": ", "completion": b.replace("\n", " ")} for a, b in part]


def _sst2(root: Path, split: str, count: int) -> Rows:
    with (root / "sst2" / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [r for r in rows if len(r["sentence"].split()) > 5][:count]  # a few words have no sentiment of their own
    words = {"0": "negative", "1": "positive"}
    return [{"prompt": f"{r['sentence'].strip()} Sentiment: ", "completion": words[r["label"]]} for r in rows]


def _arc(root: Path, split: str, count: int) -> Rows:
    rows = json.loads((root / "commonsense" / "ARC-Easy" / f"{split}.json").read_text(encoding="utf-8"))
    rows = [r for r in rows if len(r["instruction"]) < 400][:count]
    return [{"prompt": r["instruction"] + " ", "completion": r["output"]} for r in rows]


FOUR: dict[str, Callable[[Path, str, int], Rows]] = {
    "e2e": _e2e,
    "fairytale": _fairytales,
    "gsm8k": _gsm8k,
    "shakespeare": _shakespeare,
}
DOMAINS = FOUR | {"sst2": _sst2, "arc": _arc}


if __name__ == "__main__":
    mixture()
    six_domains()
