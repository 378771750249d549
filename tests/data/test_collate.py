import pytest
import torch

from weftlora.data import IGNORE, Collator
from weftlora.errors import ConfigError


def row(ids, labels, **raw):
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, **raw}


def test_rows_are_padded_on_the_right():
    batch = Collator(9)([row([1, 2, 3], [IGNORE, 2, 3]), row([4], [4])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [4, IGNORE, IGNORE]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_an_encoder_decoders_labels_have_their_own_length():
    batch = Collator(9)([row([1, 2, 3], [5]), row([4], [6, 7])])
    assert batch["labels"].tolist() == [[5, IGNORE], [6, 7]]


def test_classes_are_one_number_a_row():
    batch = Collator(9)([row([1, 2], 1), row([4], 0)])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64


def test_lengths_are_rounded_up_when_asked():
    batch = Collator(9, pad_to_multiple_of=4)([row([1] * 5, [1] * 5)])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 8)
    assert batch["attention_mask"].sum() == 5
    assert Collator(9, pad_to_multiple_of=5)([row([1] * 5, [1] * 5)])["input_ids"].shape == (1, 5)


def test_raw_columns_are_left_out_unless_kept():
    rows = [row([1], [1], prompt="p", domain="d"), row([2], [2], prompt="q", domain="e")]
    assert set(Collator(9)(rows)) == {"input_ids", "attention_mask", "labels"}
    assert Collator(9, keep=("domain",))(rows)["domain"] == ["d", "e"]


def test_rows_without_labels_can_be_batched():
    assert "labels" not in Collator(9)([{"input_ids": [1], "attention_mask": [1]}])


@pytest.mark.parametrize(
    "given", [{"pad_token_id": None}, {"pad_token_id": -1}, {"pad_token_id": 0, "pad_to_multiple_of": 0}]
)
def test_what_cannot_pad_is_refused(given):
    with pytest.raises(ConfigError, match="Collator"):
        Collator(**given)
