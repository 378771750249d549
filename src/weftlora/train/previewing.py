"""A look before training: what becomes of the rows, what of them is learned, how long the run will take and what memory.

    time      seconds of a forward and a backward pass over a batch of the run, by padded token, times those of the whole run
    memory    the most in use during such passes over the longest rows, and the optimiser's two moments of every trained parameter

Both are measured with the recipe's own model and adapter, on this machine; evaluations, checkpoints and a search of layers come on
top. Nothing is written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from weftlora.data import Loaded, shown
from weftlora.data import load as load_data
from weftlora.progress import Progress, Tick
from weftlora.records import Record
from weftlora.runs import base_model
from weftlora.runs.adapter import parameters
from weftlora.runs.load import recipe_of
from weftlora.runs.recipe import Recipe
from weftlora.runs.run import Run
from weftlora.train import arguments
from weftlora.train.costs import forget_peak, peak_bytes
from weftlora.train.prepare import Prepared, prepare

BINS = 10
TRIED = 3
"""Passes that are timed, after one that pays for what is loaded on first use."""


@dataclass(frozen=True)
class Rows:
    """One split: the account of its rows, and how long they are in tokens."""

    read: int
    empty: int
    dropped: int
    cut: int
    rows: int
    tokens: int
    answer_tokens: int
    median: int
    p95: int
    longest: int
    lengths: list[list[int]]
    """[from, to, rows] of each bin of the histogram, both ends included."""


@dataclass(frozen=True)
class Estimate:
    """What a run will cost, measured on a few passes."""

    device: str
    seconds: float
    seconds_per_step: float
    memory_bytes: int | None
    """None where the machine cannot tell."""
    trainable: int


@dataclass(frozen=True)
class Preview(Record):
    """What a recipe will train on."""

    model: str
    task: str
    format: str
    max_length: int
    columns: list[str]
    """What was made of the columns of each file, a line each."""
    files: dict[str, int]
    """Rows of each file."""
    splits: dict[str, Rows]
    samples: list[list[list[Any]]]
    """The first training rows as [text, whether it is learned] in order."""
    steps: int
    epochs: float
    rows_per_step: int
    tokens_per_epoch: int
    answer_tokens_per_epoch: int
    measured_rows: int
    """Validation rows whose loss is measured each time."""
    defaults: list[str]
    estimate: Estimate | None
    """None where no model was asked for, or nothing is trained."""


def preview(
    source: str | Path | Any, overrides: Sequence[str], model: bool, samples: int, progress: Progress
) -> Preview:
    """See `weftlora.train.preview`."""
    recipe = _recipe(source, overrides)
    bare = recipe.adapter.get("recipe") == "none" or not model
    if bare:
        base = base_model.find(recipe.model, recipe.base_dir)
        data = load_data(recipe.data, base.tokenizer, base_dir=recipe.base_dir, task=base.wants)
        steps, measured = arguments.total_steps(recipe.train, len(data.train)), 0
        defaults, estimate = tuple[str, ...](), None
    else:
        prepared = prepare(recipe)
        base, data, steps, defaults = prepared.base, prepared.data, prepared.steps, prepared.defaults
        measured = 0 if prepared.measured_on is None else len(prepared.measured_on)
        estimate = _estimate(prepared, progress)
    train, size = data.counts["train"], recipe.train.batch_size * recipe.train.accumulation
    return Preview(
        model=base.source,
        task=data.task,
        format=data.format,
        max_length=data.max_length,
        columns=list(data.columns),
        files=dict(data.sources),
        splits={name: _rows(data, name) for name in data.counts},
        samples=[[list(piece) for piece in row] for row in shown(data.train, base.tokenizer, samples)],
        steps=steps,
        epochs=round(steps * size / len(data.train), 2),
        rows_per_step=size,
        tokens_per_epoch=train.tokens,
        answer_tokens_per_epoch=train.answer_tokens,
        measured_rows=measured,
        defaults=list(defaults),
        estimate=estimate,
    )


def _recipe(source: str | Path | Any, overrides: Sequence[str]) -> Recipe:
    if isinstance(source, Run):
        return recipe_of(source, *overrides)
    if isinstance(source, (str, Path)) and (Path(source) / "run.json").is_file():
        return recipe_of(Run.load(source), *overrides)
    return Recipe.read(source, *overrides)


def _rows(data: Loaded, name: str) -> Rows:
    counts, split = data.counts[name], getattr(data, name)
    lengths = sorted(len(ids) for ids in split["input_ids"])
    return Rows(
        counts.read,
        counts.empty,
        counts.dropped,
        counts.truncated,
        counts.rows,
        counts.tokens,
        counts.answer_tokens,
        median=int(statistics.median(lengths)),
        p95=lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
        longest=lengths[-1],
        lengths=histogram(lengths),
    )


def histogram(lengths: Sequence[int], bins: int = BINS) -> list[list[int]]:
    """[from, to, how many] for at most so many bins of equal width; the last ends at the longest.

    >>> histogram([1, 2, 3, 9], bins=3)
    [[1, 3, 3], [4, 6, 0], [7, 9, 1]]
    """
    least, most = min(lengths), max(lengths)
    width = max(1, -(-(most - least + 1) // bins))
    found = [[start, min(start + width - 1, most), 0] for start in range(least, most + 1, width)]
    for length in lengths:
        found[(length - least) // width][2] += 1
    return found


def _estimate(prepared: Prepared, progress: Progress) -> Estimate:
    """What the run costs, by passes over batches as it will see them, and over its longest rows."""
    recipe, model = prepared.recipe.train, prepared.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    lengths = [len(ids) for ids in prepared.data.train["input_ids"]]
    draw, size = Random(recipe.seed), min(recipe.batch_size, len(lengths))
    batches = [draw.sample(range(len(lengths)), size) for _ in range(64)]
    padded = statistics.fmean(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    longest = sorted(range(len(lengths)), key=lengths.__getitem__)[-size:]
    seconds, tokens = 0.0, 0
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        known = forget_peak(device)
        for done, batch in enumerate([longest, *batches[:TRIED]]):
            took = _pass(prepared, batch, device)
            if done:
                seconds, tokens = seconds + took, tokens + len(batch) * max(lengths[row] for row in batch)
            progress(Tick("measuring", done + 1, TRIED + 1))
        peak = peak_bytes(device) if known else None
    trainable = parameters(model)["trainable"]
    step = seconds / tokens * padded * recipe.accumulation
    return Estimate(
        device=arguments.device(),
        seconds=round(step * prepared.steps, 3),
        seconds_per_step=step,
        memory_bytes=None if peak is None else peak + 8 * trainable,
        trainable=trainable,
    )


def _pass(prepared: Prepared, batch: Sequence[int], device: torch.device) -> float:
    """Seconds of a forward and a backward pass over some rows."""
    rows = prepared.data.train.select_columns(["input_ids", "attention_mask", "labels"])
    inputs = {key: value.to(device) for key, value in prepared.collator([rows[row] for row in batch]).items()}
    model, kind = prepared.model.train(), prepared.recipe.train.precision
    started = time.perf_counter()
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)
    with torch.autocast(device.type, half, enabled=half is not None):
        loss = model(**inputs).loss
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return took
