"""How many heads a HydraLoRA might want: clusters of the texts, counted by the elbow of k-means.

    text_t → TF-IDF, length 1        SSE_k = least Σ_t ‖text_t − its centre‖² over k centres        k = 1 … K
    x_k = (k − 1)/(K − 1)            y_k = (SSE_k − SSE_K)/(SSE_1 − SSE_K)                          from (0, 1) to (1, 0)
    bend_k = (1 − x_k − y_k)/√2      how far the curve lies below its chord; the elbow is the largest

Words are runs of two letters or digits and more, with their combining marks, in lower case. Scripts that are written without
spaces (Han, kana, Thai, Lao, Khmer, Burmese) give pairs of neighbouring characters instead.

Source: HydraLoRA, arXiv 2404.19245, appendix B: TF-IDF, k-means, elbow, and the clusters are used for nothing but their number. Not
given there, so ours: the vectoriser's settings, K, the restarts, and the chord as the elbow's rule.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from weftlora.errors import ConfigError, DataError
from weftlora.extras import needs
from weftlora.records import Record
from weftlora.settings import check_seed, is_whole

CLEAR = 0.05
"""A bend below it is a curve as good as straight: texts without clusters have no elbow."""
RESTARTS = 10
WORDS = 20_000
"""At most so many words (features), the most frequent."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Ranges of scripts without spaces between words."""
MARKS = "".join(c for c in map(chr, range(0x300, 0x1E000)) if unicodedata.category(c).startswith("M"))
"""Combining marks, such as the vowel signs of Indian scripts: part of a word, though no letters."""
RUN = re.compile(f"([{UNSPACED}]+)|(?:[^\\W{UNSPACED}]|[{MARKS}])+")


@dataclass(frozen=True)
class HeadSuggestion(Record):
    """The elbow, and the curve it was read from."""

    heads: int
    sse: list[float]
    """SSE_1 … SSE_K."""
    bend: list[float]
    """How far each k lies below the chord; 0 at both ends."""
    margin: float
    """Bend of the elbow less that of the next best k: small is a close call."""
    runner_up: int | None
    clear: bool
    """Whether the curve bends at all: otherwise the texts have no clusters to count, and 3 is as good (the paper's usual)."""
    sizes: list[int]
    """Texts in each cluster at the elbow, largest first."""
    rows: int
    """Texts looked at."""
    of: int
    """Texts given; more than `rows` where a sample was drawn."""
    seed: int

    def __str__(self) -> str:
        drawn = f", {self.rows:,} drawn of {self.of:,}" if self.rows < self.of else ""
        if not self.clear:
            return f"no clear number of clusters in {self.rows:,} texts{drawn}: one number of heads is as good as another: try 3."
        close = f"; a close call with {self.runner_up}" if self.runner_up and self.margin < CLEAR / 2 else ""
        return f"{self.heads} heads, by the elbow over {self.rows:,} texts{drawn}{close}."


def suggest_heads(texts: Iterable[str], *, largest: int = 10, rows: int = 2000, seed: int = 0) -> HeadSuggestion:
    """Suggest a number of heads from the texts that an adapter will be trained on.

    Args:
        texts: one string per row.
        largest: K, the largest number that is tried.
        rows: with more texts, so many are drawn; k-means is linear in them.
        seed: of that draw and of the starts of k-means.

    Raises:
        DataError: fewer than three different texts, or texts without words.
        ConfigError: a setting that cannot work.
    """
    with needs("train", "weftlora.suggest_heads"):
        from sklearn.feature_extraction.text import TfidfVectorizer

    _check(largest, rows, seed)
    given = _listed(texts)
    chosen = (
        given if len(given) <= rows else [given[i] for i in sorted(random.Random(seed).sample(range(len(given)), rows))]
    )
    _check_different(len(set(chosen)))
    try:
        features = TfidfVectorizer(analyzer=words, sublinear_tf=True, max_features=WORDS).fit_transform(chosen)
    except ValueError:
        raise DataError("the texts have no words of two letters or more to compare: give texts with words.") from None
    different = _different(features)
    _check_different(different)
    largest = min(largest, len(chosen))
    found = [_clusters(features, k, seed) if k <= different else (0.0, []) for k in range(1, largest + 1)]
    sse = [least for least, _ in found]
    bend = bends(sse)
    order = sorted(range(1, largest - 1), key=lambda i: (-bend[i], i))
    best = order[0] if order else 1
    return HeadSuggestion(
        heads=best + 1,
        sse=sse,
        bend=bend,
        margin=bend[best] - bend[order[1]] if len(order) > 1 else bend[best],
        runner_up=order[1] + 1 if len(order) > 1 else None,
        clear=bend[best] > CLEAR,
        sizes=found[best][1],
        rows=len(chosen),
        of=len(given),
        seed=seed,
    )


def words(text: str) -> list[str]:
    """What is counted of a text, in its order.

    >>> words("Ein Faden, a b 2nd; 天气好")
    ['ein', 'faden', '2nd', '天气', '气好']
    """
    found: list[str] = []
    for match in RUN.finditer(text.lower()):
        run = match[0]
        if match[1] is None:
            found += [run] if len(run) > 1 else []
        else:
            found += [a + b for a, b in pairwise(run)] or [run]
    return found


def _listed(texts: object) -> list[str]:
    """The texts that are not blank, read once."""
    if isinstance(texts, Iterable) and not isinstance(texts, (str, bytes, Mapping)):
        held = list(texts)
        if all(isinstance(text, str) for text in held):
            return [text for text in held if text.strip()]
    raise DataError("suggest_heads takes a list of strings, one per row: give the texts of your rows.")


def _different(features: Any) -> int:
    """Rows that differ, in a sparse matrix [rows, words]; where two texts have the same words, theirs are the same."""
    cuts = pairwise(features.indptr.tolist())
    return len({(features.indices[a:b].tobytes(), features.data[a:b].tobytes()) for a, b in cuts})


def _check_different(count: int) -> None:
    if count < 3:
        raise DataError(f"{count} different texts have no clusters to count: give at least 3, better hundreds.")


def bends(sse: Sequence[float]) -> list[float]:
    """How far each point of the curve lies below the chord from its first to its last, both axes scaled to 1."""
    span, last = sse[0] - sse[-1], len(sse) - 1
    if not span > 1e-12 * max(abs(sse[0]), 1.0) or last < 2:
        return [0.0] * len(sse)
    return [(1 - k / last - (value - sse[-1]) / span) / math.sqrt(2) for k, value in enumerate(sse)]


def _clusters(features: Any, k: int, seed: int) -> tuple[float, list[int]]:
    """(SSE, sizes of the clusters, largest first) of the best of some k-means runs."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if k == 1:
        centre = features.mean(axis=0)
        return float(features.multiply(features).sum() - features.shape[0] * (centre @ centre.T).item()), [
            features.shape[0]
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # repeated texts: fewer clusters than k are as good as k
        found = KMeans(k, n_init=RESTARTS, random_state=seed).fit(features)
    sizes = [int((found.labels_ == c).sum()) for c in range(k)]
    return float(found.inertia_), sorted(sizes, reverse=True)


def _check(largest: int, rows: int, seed: int) -> None:
    for name, value, least in (("largest", largest, 3), ("rows", rows, 10)):
        if not is_whole(value, least):
            raise ConfigError(f"suggest_heads({name}={value!r}) is out of range: use a whole number from {least} up.")
    check_seed(seed, "suggest_heads: seed")
