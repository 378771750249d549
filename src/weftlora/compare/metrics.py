"""The scores that methods can be compared by: what each is of, which way is better, and how it is called."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Name = Literal["loss", "exact_match", "accuracy", "macro_f1", "bleu", "rouge_l"]


@dataclass(frozen=True)
class Metric:
    """A score as `weftlora.evaluate` names it."""

    name: str
    title: str
    of: Literal["loss", "answers", "classes", "else"] = "else"
    word: str = ""
    """Of a difference: 0.03 nats."""
    higher: bool = True
    """Whether higher is better."""
    share: bool = False
    """In [0, 1]: said in percent, and a difference in points, which are hundredths."""
    most: float = math.inf
    """The largest there is; the least is 0."""
    digits: int = 4

    @property
    def factor(self) -> float:
        """What a difference is multiplied with where it is said in words."""
        return 100.0 if self.share else 1.0


METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", "loss", "loss", "nats", higher=False),
        Metric("exact_match", "exact match", "answers", "points of exact match", share=True, most=1),
        Metric("accuracy", "accuracy", "classes", "points of accuracy", share=True, most=1),
        Metric("macro_f1", "macro F1", "classes", "points of macro F1", share=True, most=1),
        Metric("bleu", "BLEU", "answers", "points of BLEU", most=100, digits=2),
        Metric("rouge_l", "ROUGE-L", "answers", "points of ROUGE-L", most=100, digits=2),
    )
}


def metric_of(name: str) -> Metric:
    """The metric of a name; one that is not known is said by its own name."""
    return METRICS.get(name) or Metric(name, name.replace("_", " "), word=name)
