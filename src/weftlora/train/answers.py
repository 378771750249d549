"""How near generated answers are to their references; one reference per answer.

exact match   share of answers equal to the reference after stripping outer blanks
BLEU          sacrebleu's corpus BLEU with its defaults (tokens 13a, exponential smoothing), 0-100; counts of n-grams are pooled
              over all answers, so it is no mean over rows or domains
ROUGE-L       rouge-score's F-measure of the longest common subsequence, without stemming, mean over rows, 0-100

BLEU counts up to four tokens in a row, and ROUGE-L knows the letters a-z and the digits only. Where the references have nothing
that could be counted, no answer could score above 0, and there is no score.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

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
