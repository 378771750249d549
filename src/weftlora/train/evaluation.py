"""How good is a run on held-out rows: its loss, its classes or its answers; overall and per domain.

What is scored over all rows is counted anew from everything that was predicted, since BLEU and F1 are no means over domains.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftlora.data import IGNORE, Collator, generation_prompts
from weftlora.data import load as load_data
from weftlora.errors import ConfigError, DataError
from weftlora.train import prepare as preparing
from weftlora.train.answers import bleu, exact_match, rouge_l
from weftlora.train.files import write_json
from weftlora.train.generation import complete
from weftlora.train.load import Trained, load_run, recipe_of
from weftlora.train.lock import holding
from weftlora.train.measure import Measured, accuracy, macro_f1, mean_loss
from weftlora.train.progress import Progress, Tick
from weftlora.train.recipe import Recipe
from weftlora.train.run import Run

SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Scores:
    """What was measured on some rows; None where a task has no such score.

    `loss` is in nats per answer token (per row for a classifier); `exact_match`, `bleu` and `rouge_l` are of greedy answers, each
    against the one reference of its row (`weftlora.train.answers`); `exact_match`, `accuracy` and `macro_f1` are in [0, 1], `bleu` and
    `rouge_l` in [0, 100].
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float | None = None
    exact_match: float | None = None
    bleu: float | None = None
    rouge_l: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """The scores of a run (or of its frozen base) on one split."""

    run: str | None
    adapter: str
    task: str
    split: str
    scores: Scores
    domains: dict[str, Scores]
    seconds: float
    signatures: dict[str, str]
    """How BLEU and ROUGE-L were counted and by which version of their libraries; empty where there are no such scores."""

    def record(self) -> dict[str, Any]:
        """The evaluation as plain data, as `eval-<split>.json` and `--json` show it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Predictions:
    """What a model made of some rows, and what it should have: classes, or answers."""

    measured: Measured
    actual: list[int]
    answers: list[str]
    references: list[str]

    @classmethod
    def pooled(cls, parts: Iterable[_Predictions]) -> _Predictions:
        """Those of all rows, from disjoint parts."""
        each = list(parts)
        return cls(
            Measured.pooled(part.measured for part in each),
            *([one for part in each for one in getattr(part, name)] for name in ("actual", "answers", "references")),
        )


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, on which rows."""

    run: Run | None
    name: str
    trained: Trained
    rows: Any
    size: int


def evaluate(
    source: Run | str | Path | Recipe,
    overrides: Sequence[str],
    split: str,
    limit: int | None,
    adapter: str,
    base: str | None,
    batch_size: int | None,
    max_new_tokens: int | None,
    answers: bool,
    progress: Progress,
) -> Evaluation:
    """See `weftlora.train.evaluate`."""
    if split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}: use {' or '.join(SPLITS)}.")
    if adapter not in ("trained", "none"):
        raise ConfigError(f"adapter={adapter!r} cannot be evaluated: use trained, or none for the frozen base.")
    started = time.monotonic()
    subject = _subject(source, overrides, split, adapter, base)
    rows = subject.rows if limit is None else subject.rows.select(range(min(limit, len(subject.rows))))
    size = batch_size or subject.size
    groups = _by_domain(rows)
    bound = max_new_tokens if answers else 0
    found = {name: _predict(subject.trained, part, size, bound, progress) for name, part in groups.items()}
    scores, signatures = _scores(_Predictions.pooled(found.values()), len(rows))
    evaluation = Evaluation(
        run=str(subject.run.folder) if subject.run else None,
        adapter=subject.name,
        task=subject.trained.task,
        split=split,
        scores=scores,
        domains={name: _scores(part, len(groups[name]))[0] for name, part in found.items() if name},
        seconds=round(time.monotonic() - started, 3),
        signatures=signatures,
    )
    if subject.run and limit is None and not overrides:
        suffix = "" if adapter == "trained" else "-base"
        with holding(subject.run.folder, "weftlora eval"):
            write_json(subject.run.folder / f"eval-{split}{suffix}.json", evaluation.record())
    return evaluation


def _subject(
    source: Run | str | Path | Recipe, overrides: Sequence[str], split: str, adapter: str, base: str | None
) -> _Subject:
    if isinstance(source, (str, Path)) and (Path(source) / "run.json").is_file():
        source = Run.load(source)
    if isinstance(source, Run):
        if foreign := [text for text in overrides if not text.startswith("data.")]:
            raise ConfigError(
                f"{foreign[0]!r} would not be this run any more: only data.… can be changed when evaluating a run."
            )
        recipe = recipe_of(source, *overrides)
        trained = load_run(source, base, adapted=adapter == "trained")
        data = load_data(
            recipe.data,
            trained.base.tokenizer,
            base_dir=recipe.base_dir,
            task=trained.task,
            labels=source.data["labels"],
        )
        name = source.recipe["adapter"].get("recipe", "weftlora") if adapter == "trained" else "none"
        return _Subject(source, name, trained, _split(data, split), recipe.train.batch_size)
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        Run.load(source)  # says what the folder lacks
    if adapter == "trained":
        raise ConfigError(
            f"{source} is a recipe, not a run: train it first, or give --adapter none to measure its base."
        )
    recipe = Recipe.read(source, *overrides).model_copy(update={"adapter": {"recipe": "none"}})
    if base:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": base})})
    prepared = preparing.prepare(recipe)
    trained = Trained(prepared.base, prepared.model, prepared.task)
    return _Subject(None, "none", trained, _split(prepared.data, split), recipe.train.batch_size)


def _split(data: Any, split: str) -> Any:
    rows = getattr(data, split)
    if rows is None or not len(rows):
        other = [name for name in SPLITS if getattr(data, name) is not None]
        hint = f"use --split {other[0]}." if other else f"name a file with data.{split}=...."
        raise DataError(f"the data has no {split} split: {hint}")
    return rows


def _by_domain(rows: Any) -> dict[str, Any]:
    """The rows of each domain; one nameless group where rows carry none."""
    if "domain" not in rows.column_names:
        return {"": rows}
    where: dict[str, list[int]] = {}
    for index, name in enumerate(rows["domain"]):
        where.setdefault(str(name or ""), []).append(index)
    return {name: rows.select(indices) for name, indices in sorted(where.items())}


def _predict(trained: Trained, rows: Any, size: int, max_new_tokens: int | None, progress: Progress) -> _Predictions:
    """The losses, and the classes or the answers of at most `max_new_tokens` tokens: None as many as it takes, 0 no answers."""
    measured = mean_loss(trained.model, rows, Collator(trained.base.tokenizer.pad_token_id), size, progress)
    if trained.task == "classification":
        return _Predictions(measured, list(rows["labels"]), [], [])
    if max_new_tokens == 0:
        return _Predictions(measured, [], [], [])
    return _Predictions(measured, [], *_answers(trained, rows, size, max_new_tokens, progress))


def _answers(
    trained: Trained, rows: Any, size: int, max_new_tokens: int | None, progress: Progress
) -> tuple[list[str], list[str]]:
    """Greedy answers and their references; batches are sorted by length so that little is padded."""
    prompts = sorted(generation_prompts(rows), key=lambda prompt: len(prompt.input_ids))
    if not prompts:
        return [], []
    tokenizer, texts = trained.base.tokenizer, list[str]()
    bound = max_new_tokens or 1 + max(sum(label != IGNORE for label in labels) for labels in rows["labels"])
    for done in range(0, len(prompts), size):
        batch = prompts[done : done + size]
        answers = complete(trained.model, tokenizer, [prompt.input_ids for prompt in batch], bound)
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
        progress(Tick("answers", min(done + size, len(prompts)), len(prompts)))
    return texts, [prompt.reference for prompt in prompts]


def _scores(found: _Predictions, rows: int) -> tuple[Scores, dict[str, str]]:
    """The scores of what was predicted for so many rows, and the signatures of BLEU and ROUGE-L."""
    measured, actual = found.measured, found.actual
    if actual:
        right, f1 = accuracy(measured.predicted, actual), macro_f1(measured.predicted, actual)
        return Scores(rows, 0, measured.loss, accuracy=right, macro_f1=f1), {}
    perplexity = measured.perplexity if math.isfinite(measured.perplexity) else None
    plain = Scores(rows, measured.count, measured.loss, perplexity)
    if not found.references:
        return plain, {}
    scores: dict[str, Any] = {"exact_match": exact_match(found.answers, found.references)}
    signatures = {}
    for name, score in (("bleu", bleu), ("rouge_l", rouge_l)):
        if (counted := score(found.answers, found.references)) is not None:
            scores[name], signatures[name] = counted
    return dataclasses.replace(plain, **scores), signatures
