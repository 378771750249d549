import pytest
import torch
from datasets import Dataset

from weftlora.data import IGNORE, Collator
from weftlora.data.collate import packed
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


def rows_of(*sizes):
    """Rows that are told apart by their tokens: the first is 10 11 12 ..., the second 20 21 ..."""
    made = [list(range(10 * n, 10 * n + size)) for n, size in enumerate(sizes, start=1)]
    return Dataset.from_dict({"input_ids": made, "attention_mask": [[1] * len(ids) for ids in made], "labels": made})


def test_packed_rows_are_told_apart_and_none_is_lost():
    split = rows_of(5, 3, 4, 2, 6)
    made = packed(split, 8)
    assert len(made) < len(split)
    assert max(map(len, made["input_ids"])) <= 8
    seen = []
    for row in made:
        for number in range(1, max(row["attention_mask"]) + 1):
            places = [at for at, held in enumerate(row["attention_mask"]) if held == number]
            ids = [row["input_ids"][at] for at in places]
            assert [row["labels"][at] for at in places] == [IGNORE, *ids[1:]]  # nothing predicts a first token
            seen.append(ids)
    assert sorted(seen) == sorted(split["input_ids"])


def test_positions_of_packed_rows_begin_anew():
    batch = Collator(pad_token_id=0)([*packed(rows_of(3, 2), 5), *packed(rows_of(2), 5)])
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORE, 11, 12, IGNORE, 21], [IGNORE, 11, IGNORE, IGNORE, IGNORE]]
