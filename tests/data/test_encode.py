"""Masks counted by hand: with the letter tokenizer a text of n letters has n tokens; 0 is <s>, 1 is </s>."""

import pytest

from weftlora.data import IGNORE, encode_prompt
from weftlora.data.encode import Encoded, Frame, causal, classification, seq2seq, text
from weftlora.data.examples import Example
from weftlora.errors import ModelError

BOS, EOS = 0, 1


def row(prompt, answer, **more):
    return Example(prompt, answer, None, 1, **more)


def test_the_loss_is_on_the_answer_and_its_end(letters, ids):
    ((encoded,),) = causal(Frame.of(letters), 16, "prompt")([row("ab", "xyz")])
    assert encoded.input_ids == [BOS, *ids("ab"), *ids("xyz"), EOS]
    assert encoded.labels == [IGNORE] * 3 + [*ids("xyz"), EOS]
    assert not encoded.truncated


def test_what_the_tokenizer_puts_around_a_text(letters, bare_letters, framed_letters):
    def around(tokenizer):
        return Frame.of(tokenizer).prefix, Frame.of(tokenizer).suffix

    assert around(letters) == ([BOS], [])
    assert around(bare_letters) == ([], [])
    assert around(framed_letters) == ([BOS], [EOS])


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(framed_letters, ids):
    ((encoded,),) = causal(Frame.of(framed_letters), 16, "prompt")([row("ab", "x")])
    assert encoded.input_ids == [BOS, *ids("ab"), *ids("x"), EOS]


def test_an_answer_that_ends_itself_gets_no_second_end(letters, ids):
    ((encoded,),) = causal(Frame.of(letters), 16, "prompt")([row("a", "x</s>")])
    assert encoded.labels == [IGNORE, IGNORE, *ids("x"), EOS]


def test_an_empty_prompt_still_has_a_token_to_go_on_from(bare_letters, ids):
    ((encoded,),) = causal(Frame.of(bare_letters), 16, "prompt")([row("", "x")])
    assert encoded.input_ids == [BOS, *ids("x"), EOS]
    assert encoded.labels == [IGNORE, *ids("x"), EOS]
    assert encode_prompt(bare_letters, "") == [BOS]


def test_prompt_tokens_are_those_of_generation(letters):
    ((encoded,),) = causal(Frame.of(letters), 16, "prompt")([row("ab", "xyz")])
    assert encode_prompt(letters, "ab") == encoded.input_ids[:3]


@pytest.mark.parametrize(
    ("truncate", "prompt", "answer", "kept"),
    [
        ("prompt", "abcdef", "xyz", "<s>ef|xyz</s>"),  # 7 tokens: BOS, the prompt's last two, the answer, its end
        ("prompt", "abcdef", "vwxyz", None),  # an answer of 6 tokens leaves no room for BOS and one token of prompt
        ("prompt", "", "uvwxy", "<s>|uvwxy</s>"),
        ("completion", "abcd", "xyz", "<s>abcd|xy"),
        ("completion", "abcdef", "xyz", None),
        ("drop", "abcd", "xyz", None),
        ("drop", "abc", "xy", "<s>abc|xy</s>"),
    ],
)
def test_what_a_long_row_loses(letters, ids, truncate, prompt, answer, kept):
    (encoded,) = causal(Frame.of(letters), 7, truncate)([row(prompt, answer)])
    if kept is None:
        assert encoded == []
        return
    before, after = (ids(part) for part in kept.split("|"))
    whole = 1 + len(prompt) + len(answer) + 1 <= 7
    assert encoded == [Encoded(before + after, [IGNORE] * len(before) + after, not whole, prompt, answer)]


def test_all_of_a_text_is_learned_and_long_ones_become_several_rows(letters, ids):
    ((short,), long) = text(Frame.of(letters), 5)([row("", "abc"), row("", "abcdefgh")])
    assert short.input_ids == short.labels == [BOS, *ids("abc"), EOS]
    assert [part.input_ids for part in long] == [[BOS, *ids("abcd")], [BOS, *ids("efgh")], [BOS, EOS]]
    assert not any(part.truncated for part in long)


def test_a_block_of_a_file_does_not_end(letters, ids):
    ((block,),) = text(Frame.of(letters), 8)([row("", "abc", whole=False)])
    assert block.input_ids == [BOS, *ids("abc")]


def test_an_encoder_decoder_gets_prompt_and_answer_apart(framed_letters, ids):
    ((encoded,),) = seq2seq(Frame.of(framed_letters), 8, "prompt")([row("ab", "xyz")])
    assert encoded.input_ids == [BOS, *ids("ab"), EOS]
    assert encoded.labels == [*ids("xyz"), EOS]


def test_what_a_long_encoder_decoder_row_loses(framed_letters, ids):
    frame = Frame.of(framed_letters)
    long_prompt, long_answer = row("abcdefgh", "x"), row("a", "stuvwxyz")
    ((first,), second) = seq2seq(frame, 8, "prompt")([long_prompt, long_answer])
    assert first.input_ids == [BOS, *ids("cdefgh"), EOS]
    assert first.truncated
    assert second == []
    ((first,), (second,)) = seq2seq(frame, 8, "completion")([long_prompt, long_answer])
    assert first.input_ids == [BOS, *ids("abcdef"), EOS]
    assert second.labels == ids("stuvwxyz")
    assert seq2seq(frame, 8, "drop")([long_prompt, long_answer]) == [[], []]


def test_a_class_has_its_number_and_a_long_text_keeps_its_frame(framed_letters, ids):
    encode = classification(Frame.of(framed_letters), 6, "prompt", ["no", "yes"])
    ((short,), (long,)) = encode([row("ab", "yes"), row("abcdef", "no")])
    assert (short.input_ids, short.labels) == ([BOS, *ids("ab"), EOS], 1)
    assert (long.input_ids, long.labels, long.truncated) == ([BOS, *ids("abcd"), EOS], 0, True)
    assert classification(Frame.of(framed_letters), 6, "drop", ["no"])([row("abcdef", "no")]) == [[]]


def test_a_tokenizer_without_an_end_cannot_teach_answers(endless_letters):
    with pytest.raises(ModelError, match="no end-of-text token"):
        causal(Frame.of(endless_letters), 8, "prompt")([row("a", "b")])
