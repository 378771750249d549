"""Scores of predictions on rows that no training has seen: losses, classes, generated answers.

    loss          Σ −log p(answer token) / number of answer tokens        perplexity = e^loss
    macro-F1      mean over classes of 2·tp / (2·tp + fp + fn); a class that neither occurs nor is predicted is left out
    exact match   share of answers equal to the reference after stripping outer blanks
    BLEU          sacrebleu's corpus BLEU with its defaults (tokens 13a, exponential smoothing), 0-100; counts of n-grams are pooled
                  over all answers, so it is no mean over rows or domains
    ROUGE-L       rouge-score's F-measure of the longest common subsequence, without stemming, mean over rows, 0-100

An answer has one reference. BLEU counts up to four tokens in a row, and ROUGE-L knows the letters a-z and the digits only: where the
references have nothing that could be counted, no answer could score above 0, and there is no score.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from weftlora.adapted.hooks import in_mode
from weftlora.adapter.shards import is_sharded
from weftlora.progress import Progress, Tick, ignore
from weftlora.runs.head_loss import answer_loss, head_of, is_the_models_own
from weftlora.settings import IGNORE

ROUGE = "rouge-score {}, rougeL F-measure, no stemming"


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are the reference."""
    hits = sum(answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True))
    return hits / len(references)


def bleu(answers: Sequence[str], references: Sequence[str]) -> tuple[float, str] | None:
    """Corpus BLEU and sacrebleu's signature of how it was counted; None where no reference has four tokens."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(force=True)  # no warning about rows that are tokenised already: they are scored as they are
    perfect = metric.corpus_score(list(references), [list(references)])
    if not perfect.totals[-1]:
        return None
    found = metric.corpus_score(list(answers), [list(references)])
    return float(found.score), str(metric.get_signature())


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> tuple[float, str] | None:
    """Mean ROUGE-L and how it was counted; None where no reference has a letter of a-z or a digit."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=False)
    if not any(tokenizer.tokenize(reference) for reference in references):
        return None
    scorer = RougeScorer(["rougeL"], tokenizer=tokenizer)
    pairs = zip(references, answers, strict=True)
    found = [scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs]
    return 100 * sum(found) / len(found), ROUGE.format(importlib.metadata.version("rouge-score"))


Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass(frozen=True)
class Measured:
    """The sum of −log p over `count` answer tokens (rows, for a classifier), in nats, and the predicted classes."""

    total: float
    count: int
    predicted: list[int]

    @classmethod
    def pooled(cls, parts: Iterable[Measured]) -> Measured:
        """What was measured on all rows, from disjoint parts of them: losses weigh by token."""
        each = list(parts)
        return cls(
            sum(part.total for part in each),
            sum(part.count for part in each),
            [label for part in each for label in part.predicted],
        )

    @property
    def loss(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode before is put back."""
    with in_mode(model, training=False), torch.no_grad():
        yield


def batches(rows: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a dataset in order, `size` at a time."""
    for start in range(0, len(rows), size):
        columns = rows[start : start + size]
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def mean_loss(model: Any, rows: Any, collate: Collate, size: int, progress: Progress = ignore) -> Measured:
    """The loss of `model` on tokenised `rows` (input_ids, attention_mask, labels), without what an adapter adds to it in training.

    So the base that holds the adapter is called: around it, stock AdaLoRA adds its penalty to every loss, and cannot run at all
    once it is loaded.
    """
    forward = model.get_base_model() if isinstance(model, PeftModel) and not is_sharded(model) else model
    total, count, predicted = 0.0, 0, list[int]()
    rows = rows.select_columns(["input_ids", "attention_mask", "labels"])
    causal = not model.config.is_encoder_decoder
    head = head_of(forward)
    with evaluating(model):
        if head is not None and not is_the_models_own(forward, head):
            head = None
        for done, batch in enumerate(batches(rows, size), start=1):
            inputs = {key: value.to(model.device) for key, value in collate(batch).items()}
            if head is not None:
                summed, scored, _ = answer_loss(forward, head, inputs)
                total += float(summed)
                count += scored
                progress(Tick("loss", done, math.ceil(len(rows) / size), total / max(count, 1)))
                continue
            output = forward(**inputs)
            labels = inputs["labels"]
            if labels.dim() == 1:
                scored = len(labels)
                predicted += output.logits.argmax(-1).tolist()
            else:
                scored = int((labels[:, 1:] if causal else labels).ne(IGNORE).sum())
            if scored:
                total += float(output.loss) * scored
                count += scored
            progress(Tick("loss", done, math.ceil(len(rows) / size), total / max(count, 1)))
    return Measured(total, count, predicted)


def accuracy(predicted: Sequence[int], actual: Sequence[int]) -> float:
    """The share of rows whose class was predicted."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(list(actual), list(predicted)))


def macro_f1(predicted: Sequence[int], actual: Sequence[int]) -> float:
    """Unweighted mean of the F1 of the classes that occur or are predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(list(actual), list(predicted), average="macro", zero_division=0))
