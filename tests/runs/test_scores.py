from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from weftlora.data import Collator
from weftlora.runs.scores import Measured, accuracy, batches, evaluating, macro_f1, mean_loss

ROWS = Dataset.from_dict(
    {
        "input_ids": [[1, 5, 6, 7, 8, 2], [1, 9, 2]],
        "attention_mask": [[1] * 6, [1] * 3],
        "labels": [[-100, 5, 6, 7, 8, 2], [-100, -100, 2]],
    }
)


@pytest.mark.parametrize("size", [1, 2])
def test_the_loss_is_a_mean_over_answer_tokens_whatever_the_batches(bases: dict[str, Path], size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    by_hand = []
    for row in ROWS:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        by_hand += cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none", ignore_index=-100).tolist()
    scored = [loss for loss in by_hand if loss]
    measured = mean_loss(model, ROWS, Collator(0), size)
    assert measured.count == len(scored) == 6
    assert measured.loss == pytest.approx(sum(scored) / 6, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(sum(scored) / 6), rel=1e-5)


def test_the_mode_before_is_put_back() -> None:
    model = torch.nn.Linear(1, 1)
    for training in (True, False):
        model.train(training)
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
        assert model.training is training


def test_a_part_in_a_mode_of_its_own_keeps_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())
    model[1].eval()
    with evaluating(model):
        pass
    assert [module.training for module in model] == [True, False]


def test_batches_cover_every_row_once_in_order() -> None:
    rows = [row["input_ids"] for batch in batches(ROWS, 1) for row in batch]
    assert rows == ROWS["input_ids"][:]


@pytest.mark.parametrize(
    ("predicted", "f1"),
    [
        ([0, 1, 1, 0], (2 / 3 + 4 / 5) / 2),  # class 0: 2·1/(2+1), class 1: 2·2/(2+3)
        ([0, 0, 0, 0], (2 / 5 + 0) / 2),  # class 1 occurs and is never predicted
        ([2, 1, 0, 1], (0 + 4 / 5 + 0) / 3),  # class 2 is predicted and never occurs
        ([1, 1, 1, 1], (0 + 6 / 7) / 2),
    ],
)
def test_macro_f1_is_the_mean_over_classes_that_occur_or_are_predicted(predicted: list[int], f1: float) -> None:
    assert macro_f1(predicted, [0, 1, 1, 1]) == pytest.approx(f1)


def test_parts_pool_by_token() -> None:
    pooled = Measured.pooled([Measured(6.0, 2, [1]), Measured(0.0, 0, []), Measured(3.0, 4, [0, 2])])
    assert pooled == Measured(9.0, 6, [1, 0, 2])
    assert pooled.loss == 1.5


def test_scores_without_a_token_are_not_a_number() -> None:
    assert math.isnan(Measured(0.0, 0, []).loss)
    assert Measured(1e4, 1, []).perplexity == math.inf
    assert accuracy([1, 0], [1, 1]) == 0.5
