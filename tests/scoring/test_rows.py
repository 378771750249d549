"""Rows to score on: every form that users have them in, drawn by a seed alone; what is no rows; labels that count for nothing."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from allocating import HELD_OUT, TOKENS, alora, bare, controller, random_factors, scorer, train
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import weftlora
from families import FAMILIES
from weftlora.scoring.brackets import shares
from weftlora.scoring.network import RowLoss, recognise
from weftlora.scoring.rows import rows_of


def test_rows_come_in_any_form_and_are_drawn_by_the_seed_alone() -> None:
    rows = [{"input_ids": t.tolist(), "labels": t.tolist()} for t in TOKENS[:10]]
    forms = [
        rows,
        tuple(rows),
        DataLoader([{k: torch.tensor(v) for k, v in row.items()} for row in rows], batch_size=3),
        [{k: torch.tensor([row[k] for row in rows[n : n + 4]]) for k in rows[0]} for n in (0, 4, 8)],
        iter(rows),
    ]
    drawn = [rows_of(form).draw(4, "7/1") for form in forms]
    for one in drawn[1:]:
        assert torch.equal(one["input_ids"], drawn[0]["input_ids"])
    assert not torch.equal(rows_of(rows).draw(4, "7/2")["input_ids"], drawn[0]["input_ids"])


def test_fewer_rows_than_asked_are_all_drawn() -> None:
    assert rows_of(HELD_OUT[:3]).draw(32, "x")["input_ids"].shape == (3, 7)


def test_rows_of_unequal_length_are_padded_and_masked() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    drawn = rows_of(rows).draw(2, "x")
    assert drawn["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert drawn["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert drawn["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "has no rows"),
        (3, "is nothing to draw rows from"),
        ({"input_ids": [1]}, "is nothing to draw rows from"),
        ([[1, 2]], "not a dict"),
    ],
)
def test_what_is_no_rows_is_refused(given: Any, match: str) -> None:
    with pytest.raises(weftlora.WeftError, match=match):
        weftlora.attach(bare(), validation=given)


def test_labels_that_are_all_ignored_are_an_error_not_a_nan() -> None:
    for labels in ([-100] * 7, [5] + [-100] * 6):  # the second counts nowhere: there is nothing before the first token
        model = bare(first=1)
        weftlora.attach(model, validation=[{"input_ids": TOKENS[0].tolist(), "labels": labels}] * 3)
        with pytest.raises(weftlora.WeftError, match="label"):
            train(model, 1)


def test_rows_for_an_adapter_that_scores_nothing_are_refused() -> None:
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.LoraDashConfig(after=3))
    with pytest.raises(weftlora.ConfigError, match="no adapter has it: leave validation out"):
        weftlora.attach(model, validation=HELD_OUT)


def test_what_a_collator_draws_is_drawn_by_the_seed_and_moves_no_generator_of_the_run() -> None:
    """Masking tokens at random, as collators of encoders do, with any of the three generators."""

    def masked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        dice = torch.rand(ids.shape) + random.random() + float(np.random.rand())
        return {"input_ids": torch.where(dice < 1.2, 0, ids), "labels": ids}

    def state() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    rows, before = rows_of(DataLoader(HELD_OUT, collate_fn=masked)), state()
    one = rows.draw(8, "0/1")
    assert state() == before
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    assert torch.equal(rows.draw(8, "0/1")["input_ids"], one["input_ids"])
    assert not torch.equal(rows.draw(8, "0/2")["input_ids"] == 0, one["input_ids"] == 0)
    assert 0 < (one["input_ids"] == 0).sum() < one["input_ids"].numel()


def test_other_rows_are_none_of_those_drawn() -> None:
    rows = rows_of([{"input_ids": [n], "labels": [n]} for n in range(10)])
    one, other = (rows.draw(6, "x", other=each)["labels"].flatten().tolist() for each in (False, True))
    assert (len(one), len(other)) == (6, 4)
    assert sorted(one + other) == list(range(10))
    with pytest.raises(weftlora.DataError, match="all 10 validation rows are drawn"):
        rows.draw(10, "x", other=True)


def test_checking_scores_needs_rows_beside_those_of_a_round() -> None:
    model = bare(check=True, rows=len(HELD_OUT))
    with pytest.raises(weftlora.ConfigError, match=r"check=True\) compares scores on 24 rows .* 24 were given"):
        weftlora.attach(model, validation=HELD_OUT)
    weftlora.attach(bare(check=True, rows=len(HELD_OUT) - 1), validation=HELD_OUT)


def test_fewer_rows_than_a_round_wants_are_said() -> None:
    with pytest.warns(UserWarning, match=r"rows=32\) scores on that many validation rows and 24 were given"):
        weftlora.attach(bare(rows=32), validation=HELD_OUT)


def test_labels_that_count_nowhere_are_an_error_in_a_later_round_too() -> None:
    """By then the way of scoring is known and no loss of the model's own is looked at."""
    model = alora(rows=2)
    random_factors(model)
    s = scorer(model)
    s.exact([(0, 0)], "a")
    s.rows = rows_of([{"input_ids": TOKENS[0], "labels": torch.tensor([5] + [-100] * 6)}] * 3)
    for score in (s.exact, s.estimate):
        with pytest.raises(weftlora.ConfigError, match="no label of the validation rows drawn counts"):
            score([(0, 0)], "b")


def test_rows_without_a_label_among_others_are_scored_with_them() -> None:
    """The first rows count for nothing; the mean is over the labels of all."""
    nothing = {"input_ids": TOKENS[0], "labels": torch.tensor([5] + [-100] * 6)}
    scored = []
    for held in ([nothing] * 4 + HELD_OUT[:2], HELD_OUT[:2]):
        model = bare(rows=6).double()
        weftlora.attach(model, validation=held)
        random_factors(model)
        scored.append(scorer(model).exact(controller(model).scoring.live()[:4], "a").sum(2))
        assert scorer(model).way is not None
    torch.testing.assert_close(scored[0], scored[1], rtol=0, atol=1e-12)


def test_as_many_rows_as_a_round_wants_are_enough(recwarn: pytest.WarningsRecorder) -> None:
    weftlora.attach(bare(rows=len(HELD_OUT)), validation=HELD_OUT)
    assert not [w for w in recwarn if "scores on that many" in str(w.message)]


def test_a_loader_without_a_length_is_read_into_rows() -> None:
    class Endless(IterableDataset):
        def __iter__(self):
            return iter([{"input_ids": t, "labels": t} for t in TOKENS[:6]])

    assert len(rows_of(DataLoader(Endless(), batch_size=2)).items) == 6


def test_a_pass_of_rows_that_are_numbers_has_a_length_of_one() -> None:
    assert shares({"labels": torch.zeros(3), "x": torch.zeros(3)}, 8) == (1, 8)


def test_the_loss_of_a_classifier_is_recognised_by_its_shapes() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, -100, 1, 1])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert recognise(logits, labels, loss) == RowLoss("classes", 4)
    assert recognise(logits, labels, loss * 1.01) is None
