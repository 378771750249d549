"""BLEU and ROUGE-L of planted answers, against the definitions worked out by hand."""

from __future__ import annotations

import math
import socket

import pytest

from weftlora.runs.scores import bleu, exact_match, rouge_l

CAT = "the cat sat on the mat"


def test_bleu_is_the_mean_of_n_gram_precisions_with_its_brevity_penalty() -> None:
    found = bleu(["the cat sat on mat"], [CAT])
    assert found is not None
    precisions = (5 / 5, 3 / 4, 2 / 3, 1 / 2)  # "on mat", "sat on mat" and "cat sat on mat" are not in the reference
    expected = math.exp(1 - 6 / 5) * math.prod(precisions) ** (1 / 4)
    assert found[0] == pytest.approx(100 * expected)
    assert found[1].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_pools_n_grams_and_is_no_mean_over_rows() -> None:
    answers, references = [CAT, "a dog"], [CAT, "a dog ran off home now"]
    found, first, second = (
        bleu(answers, references),
        bleu(answers[:1], references[:1]),
        bleu(answers[1:], references[1:]),
    )
    assert found is not None
    assert first is not None
    assert second is not None
    assert first[0] == pytest.approx(100)
    pooled = math.exp(1 - 12 / 8)  # all 8, 6, 4 and 3 n-grams of the answers are there; 8 tokens stand for 12
    assert found[0] == pytest.approx(100 * pooled)
    assert found[0] != pytest.approx((first[0] + second[0]) / 2, abs=1)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    found = rouge_l(["The cat, the mat!", "nothing"], [CAT, CAT])
    assert found is not None
    precision, recall = 4 / 4, 4 / 6  # "the cat … the mat"; case and marks do not count
    f = 2 * precision * recall / (precision + recall)
    assert found[0] == pytest.approx(100 * (f + 0) / 2)
    assert found[1].startswith("rouge-score 0.1")


def test_words_are_not_stemmed() -> None:
    found = rouge_l(["cats sitting"], ["cat sits"])
    assert found is not None
    assert found[0] == 0


def test_what_no_answer_could_reach_is_no_score() -> None:
    assert bleu(["one two three"], ["one two three"]) is None
    assert rouge_l(["東京"], ["東京"]) is None


def test_outer_blanks_do_not_count_for_an_exact_match() -> None:
    assert exact_match([" yes\n", "Yes"], ["yes", "yes"]) == 0.5


def test_scoring_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert bleu([CAT], [CAT]) is not None
    assert rouge_l([CAT], [CAT]) is not None
