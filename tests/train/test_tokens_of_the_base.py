"""What no adapter can mend is found before anything is written: tokens that the base has no row for, an end that it cannot write."""

import shutil
import warnings

import pytest
import torch
from tiny_bases import answers, llama, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import weftlora
from weftlora.errors import ModelError


@pytest.fixture
def base(tmp_path):
    """A base of one's own, to be changed: (its folder, a function that changes model and tokenizer)."""
    folder = llama(tmp_path / "base")

    def change(how):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            how(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return folder, change


def train(tmp_path, folder, rows=None, **adapter):
    write_rows(tmp_path / "rows.jsonl", rows or answers(20))
    return weftlora.train(
        {
            "model": str(folder),
            "data": str(tmp_path / "rows.jsonl"),
            "adapter": {"recipe": "lora", "r": 2, **adapter},
            "train": {"steps": 1},
            "out": str(tmp_path / "run"),
        }
    )


def test_a_token_that_the_embedding_has_no_row_for_is_refused(tmp_path, base):
    folder, change = base
    change(lambda model, tokenizer: tokenizer.add_tokens(["<tool>"]))
    train(tmp_path, folder)  # nothing uses it
    (tmp_path / "other").mkdir()
    rows = [{**row, "prompt": "<tool> " + row["prompt"]} for row in answers(20)]
    with pytest.raises(
        ModelError, match=r"the token '<tool>' \(id \d+\), which is in the rows, .*resize_token_embeddings"
    ):
        train(tmp_path / "other", folder, rows)
    assert not (tmp_path / "other" / "run").exists()
    change(lambda model, tokenizer: model.resize_token_embeddings(len(tokenizer)))
    train(tmp_path / "other", folder, rows)


def test_padding_that_the_embedding_has_no_row_for_is_refused(tmp_path, base):
    folder, change = base
    change(lambda model, tokenizer: tokenizer.add_special_tokens({"pad_token": "<padding>"}))
    with pytest.raises(ModelError, match=r"'<padding>' \(id \d+\), which rows are padded with"):
        train(tmp_path, folder)
    assert not (tmp_path / "run").exists()


def end_of(model, tokenizer):
    return model.get_output_embeddings().weight, tokenizer.eos_token_id


def as_others(model, tokenizer):
    head, end = end_of(model, tokenizer)
    for other in (end + 5, end + 6, end + 7):
        head[other] = head[end]


def as_nothing(model, tokenizer):
    head, end = end_of(model, tokenizer)
    head[end] *= 1e-5


@pytest.mark.parametrize(
    ("change_to", "says"),
    [
        (as_others, "equal to those of 3 other tokens"),
        (as_nothing, "close to zero, as in a row that was never trained"),
    ],
)
def test_an_end_that_the_frozen_base_cannot_write_is_found_before_training(tmp_path, base, change_to, says):
    folder, change = base
    change(change_to)
    with pytest.warns(
        UserWarning, match=rf"answers end with .* cannot write: .*{says}.*adapter\.modules_to_save=\[lm_head\]"
    ):
        train(tmp_path, folder)
    shutil.rmtree(tmp_path / "run")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(tmp_path, folder, modules_to_save=["lm_head"])  # the cure
    assert not [each for each in said if "answers end with" in str(each.message)]
